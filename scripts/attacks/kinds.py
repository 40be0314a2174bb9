"""The kinds of attacks: each spoils a world and gives the words of a command."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from mmkd.recipe import load_recipe, to_yaml
from scripts.attacks import folders
from scripts.attacks.mutate import Schema, damaged, mutated
from scripts.attacks.worlds import SECONDS

RUN = ["run", "recipe.yaml"]
LOOK = (RUN, ["plan", "recipe.yaml"], ["data", "check", "recipe.yaml", "--workers", "1"])
TEMPLATES = [
    "{% for i in range(10 ** 9) %}{% for j in range(10 ** 9) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    *("{{ raise_exception('a\nb') }}", "{{ messages[99].x.y }}", "{{ 1 / 0 }}"),
    *("{{ 'x' * 10 ** 9 }}", "{{ messages.append(messages[0]) }}", "{% if %}", "{{", "\0", ""),
    *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% include 'x' %}"),
    *("{{ messages | tojson }}", "\x1b[2J"),
]


def recipes(draw: random.Random, schema: Schema) -> list[str]:
    """A recipe with other values along its schema, or other bytes."""
    path = Path("recipe.yaml")
    raw = yaml.safe_load(path.read_text())
    if draw.random() < 0.7:  # every default written out, so that there is more to spoil
        raw = yaml.safe_load(to_yaml(load_recipe(raw)))
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        raw = schema.spoil(draw, raw) if draw.random() < 0.7 else mutated(draw, raw)
    content = yaml.safe_dump(raw, allow_unicode=draw.random() < 0.5).encode("utf-8", "replace")
    if draw.random() < 0.25:
        content = damaged(draw, content)
    path.write_bytes(content)
    return draw.choice([*LOOK, ["bench", "recipe.yaml", "--steps", "1"], ["cache", "recipe.yaml"]])


def records(draw: random.Random, schema: Schema) -> list[str]:
    """Records of another shape, in any of the formats that are read."""
    good = json.loads(Path("records.json").read_text())[0]
    rows = [good, good, good]
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(rows))
        if isinstance(rows[at], dict | list):
            rows[at] = mutated(draw, rows[at])
    write = draw.choice([_json, _jsonl, _parquet, _shard])
    name = write(draw, rows)
    if draw.random() < 0.3:
        Path(name).write_bytes(damaged(draw, Path(name).read_bytes()))
    _change(data={"train": name, "images": ".", "on_bad_record": draw.choice(["stop", "skip"])})
    return draw.choice(LOOK)


def _json(draw: random.Random, rows: list[Any]) -> str:
    Path("new.json").write_text(json.dumps(rows))
    return "new.json"


def _jsonl(draw: random.Random, rows: list[Any]) -> str:
    Path("new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "new.jsonl"


def _parquet(draw: random.Random, rows: list[Any]) -> str:
    mappings = [row if isinstance(row, dict) else {"row": str(row)} for row in rows]
    names = sorted({str(key) for row in mappings for key in row})
    columns = {}
    for name in names:
        values = [row.get(name) for row in mappings]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError):
            columns[name] = pa.array([json.dumps(v) for v in values])
    pq.write_table(pa.table(columns), "new.parquet")
    return "new.parquet"


def _shard(draw: random.Random, rows: list[Any]) -> str:
    picture = Path("picture.png").read_bytes()
    with tarfile.open("new.tar", "w") as archive:
        for number, row in enumerate(rows):
            key = draw.choice([f"{number:04d}", "0000", "../up", "a\nb", "a/b.c", "x" * 300])
            parts = [("json", json.dumps(row).encode()), ("png", picture)]
            for kind, content in draw.sample(parts, draw.choice([1, 2, 2, 2])):
                entry = tarfile.TarInfo(f"{key}.{kind}")
                entry.size = len(content)
                entry.type = draw.choice([tarfile.REGTYPE] * 9 + [tarfile.SYMTYPE])
                archive.addfile(entry, io.BytesIO(content))
    return "new.tar"


def pictures(draw: random.Random, schema: Schema) -> list[str]:
    """An image of another format, size or mode, or with other bytes."""
    kind = draw.choice(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "EPS", "ICO", "PCX"])
    mode = draw.choice(["RGB", "RGB", "L", "1", "P", "CMYK", "RGBA", "I;16", "F"])
    sizes = [(64, 64), (1, 1), (1, 3000), (3000, 1), (2, 2)]
    saved = io.BytesIO()
    try:
        Image.new(mode, draw.choice(sizes)).save(saved, kind)
    except (OSError, ValueError, KeyError):
        Image.new("RGB", (8, 8)).save(saved, "PNG")
    content = saved.getvalue()
    if draw.random() < 0.7:
        content = damaged(draw, content)
    Path("picture.png").write_bytes(content)
    if draw.random() < 0.3:
        _change(data={"train": "records.json", "on_bad_record": "skip"})
    return draw.choice([*LOOK, [*LOOK[2], "--decode"]])


def templates(draw: random.Random, schema: Schema) -> list[str]:
    """A chat template with something put in, taken out or turned around."""
    path = draw.choice([*Path("model").glob("chat_template*"), Path("model/chat_template.jinja")])
    text = path.read_text() if path.exists() else ""
    at, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
    if draw.random() < 0.6:
        text = text[:at] + draw.choice(TEMPLATES) + text[at:]
    else:
        text = text[:at] + text[end:]
    path.write_text(text)
    return draw.choice(LOOK[:2])


def processes(draw: random.Random, schema: Schema) -> list[str]:
    """A recipe or records as above, for a run of two processes."""
    draw.choice([recipes, records])(draw, schema)
    return [*RUN, "--nproc", "2"]


def _change(**parts: Any) -> None:
    raw = yaml.safe_load(Path("recipe.yaml").read_text())
    Path("recipe.yaml").write_text(yaml.safe_dump({**raw, **parts}))


@dataclass(frozen=True)
class Kind:
    """A kind of attack.

    Attributes:
        spoil: spoils the world that is the working directory; returns the words of a command.
        worlds: names of the worlds that it can spoil.
        weight: how often it is drawn, relative to the others.
        seconds: the time limit of its command.
    """

    spoil: Callable[[random.Random, Schema], list[str]]
    worlds: tuple[str, ...]
    weight: float = 1.0
    seconds: float = SECONDS


KINDS = {
    "recipes": Kind(recipes, ("good",), 2.0),
    "records": Kind(records, ("good",)),
    "pictures": Kind(pictures, ("good",)),
    "templates": Kind(templates, ("good",)),
    "folders": Kind(folders.runs, ("trained", "stopped", "cached"), 2.0),
    "releases": Kind(folders.releases, ("scored",)),
    "scores": Kind(folders.scores, ("scored",)),
    "converted": Kind(folders.converted, ("converted",)),
    "processes": Kind(processes, ("good",), 0.3, 240.0),
}
