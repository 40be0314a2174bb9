"""The kinds of attacks: each spoils a world and gives the words of a command."""

import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

from mmkd.recipe import load_recipe, to_yaml
from scripts.attacks.mutate import Schema, damaged, hostile, mutated

RUN = ["run", "recipe.yaml"]
LOOK = (RUN, ["plan", "recipe.yaml"], ["data", "check", "recipe.yaml", "--workers", "1"])
TEMPLATE = [
    "{% for i in range(10 ** 9) %}{% for j in range(10 ** 9) %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    *("{{ raise_exception('a\nb') }}", "{{ messages[99].x.y }}", "{{ 1 / 0 }}"),
    *("{{ 'x' * 10 ** 9 }}", "{{ messages.append(messages[0]) }}", "{% if %}", "{{", "\0", ""),
    *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{% include 'x' %}"),
    *("{{ messages | tojson }}", "\x1b[2J"),
]
WORDS = {
    "trained": (RUN, ["report", "runs/tiny"], ["eval", "runs/tiny"], ["plan", "recipe.yaml"]),
    "stopped": (RUN, RUN, ["report", "runs/tiny"]),
    "cached": (RUN, ["cache", "recipe.yaml"], ["cache", "stats", "cache"]),
}


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
    _change(data={"train": name, "images": ".", "on_bad_sample": draw.choice(["stop", "skip"])})
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
    """A picture of another format, size or mode, or with other bytes."""
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
        _change(data={"train": "records.json", "on_bad_sample": "skip"})
    return draw.choice([*LOOK, [*LOOK[2], "--decode"]])


def templates(draw: random.Random, schema: Schema) -> list[str]:
    """A chat template with something put in, taken out or turned around."""
    path = draw.choice([*Path("model").glob("chat_template*"), Path("model/chat_template.jinja")])
    text = path.read_text() if path.exists() else ""
    at, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
    if draw.random() < 0.6:
        text = text[:at] + draw.choice(TEMPLATE) + text[at:]
    else:
        text = text[:at] + text[end:]
    path.write_text(text)
    return draw.choice(LOOK[:2])


def folders(draw: random.Random, schema: Schema) -> list[str]:
    """A run's or a cache's folder with a file that is damaged, of another shape, gone or a link."""
    world = "cached" if Path("cache").exists() else "stopped"
    if any(Path("runs").glob("*/*/done.json")):
        world = "trained"
    top = Path("cache" if world == "cached" else "runs")
    files = sorted(p for p in top.rglob("*") if p.is_file())
    small = [p for p in files if p.suffix in (".json", ".jsonl", ".yaml")]
    path = draw.choice(small if draw.random() < 0.7 else files)
    content = path.read_bytes()
    match draw.randrange(6):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.mkdir()
        case 2 | 3 if path.suffix in (".json", ".yaml"):
            said = yaml.safe_load(content)
            changed = mutated(draw, said) if isinstance(said, dict | list) else hostile(draw)
            dump: Callable[[Any], str] = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
            path.write_text(dump(changed), errors="replace")
        case _:
            path.write_bytes(damaged(draw, content))
    return draw.choice(WORDS[world])


def _change(**parts: Any) -> None:
    raw = yaml.safe_load(Path("recipe.yaml").read_text())
    Path("recipe.yaml").write_text(yaml.safe_dump({**raw, **parts}))


KINDS = {
    "recipes": (recipes, ("good",)),
    "records": (records, ("good",)),
    "pictures": (pictures, ("good",)),
    "templates": (templates, ("good",)),
    "folders": (folders, ("trained", "stopped", "cached")),
}
"""How each kind spoils a world, and which worlds it takes."""
