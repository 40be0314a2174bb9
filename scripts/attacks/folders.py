"""The kinds of attacks that spoil what mmkd itself has written: runs, caches, scores, students."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from scripts.attacks.mutate import Schema, damaged, hostile, mutated

TEXTS = (".json", ".jsonl", ".yaml")
RUN = "runs/tiny"
EVAL = ["--tasks", "scenes_pope", "--include", "tasks"]
WORDS = {
    "trained": (
        ["run", "recipe.yaml"],
        ["report", RUN],
        ["eval", RUN],
        ["plan", "recipe.yaml"],
    ),
    "stopped": (["run", "recipe.yaml"], ["run", "recipe.yaml"], ["report", RUN]),
    "cached": (["run", "recipe.yaml"], ["cache", "recipe.yaml"], ["cache", "stats", "cache"]),
}
OF_SCORES = ("results.json", "request.json", "answers.json", "*.jsonl", "report.html")


def runs(draw: random.Random, schema: Schema) -> list[str]:
    """A run's or a cache's folder with one spoilt file."""
    world = "cached" if Path("cache").exists() else "stopped"
    if any(Path("runs").glob("*/*/done.json")):
        world = "trained"
    spoil_one(draw, Path("cache" if world == "cached" else "runs"))
    return draw.choice(WORDS[world])


def releases(draw: random.Random, schema: Schema) -> list[str]:
    """A finished run with spoilt files or hostile settings of a release; nothing is uploaded."""
    words = ["release", RUN, "--out", "released"]
    if draw.random() < 0.2:
        words.append("dtype=bfloat16")
    if draw.random() < 0.3:
        form = schema.definitions["ReleaseConfig"]["properties"]
        key = draw.choice([*form])
        value = hostile(draw) if draw.random() < 0.7 else schema.value(draw, form[key])
        text = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
        words.append(f"{key}={text}".replace("\0", ""))  # no word of a command has a NUL
    else:
        spoil_one(draw, Path(RUN))
    if draw.random() < 0.2:
        words.append("--dry-run")
    return words


def scores(draw: random.Random, schema: Schema) -> list[str]:
    """A finished run whose scores, samples or answers are spoilt."""
    evaluation = Path(RUN, "evaluation")
    files = sorted({p for name in OF_SCORES for p in evaluation.rglob(name)})
    for path in draw.sample(files, draw.choice([1, 1, 2])):
        spoil_file(draw, path)
    report, release = ["report", RUN], ["release", RUN, "--out", "released"]
    again = ["eval", RUN, "--out", f"{RUN}/evaluation"]
    return draw.choice([report, report, release, ["eval", RUN], again, ["run", "recipe.yaml"]])


def converted(draw: random.Random, schema: Schema) -> list[str]:
    """A student that `mmkd convert` has written, with one spoilt file."""
    spoil_one(draw, Path("hybrid"))
    return draw.choice(
        [
            ["run", "recipe.yaml"],
            ["plan", "recipe.yaml"],
            ["eval", "hybrid", *EVAL],
            ["convert", "hybrid", "--out", "made", "--experts", "2"],
        ]
    )


def spoil_one(draw: random.Random, folder: Path) -> None:
    """Spoil a file of a folder; mostly one that holds settings or notes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    small = [p for p in files if p.suffix in TEXTS]
    spoil_file(draw, draw.choice(small if draw.random() < 0.7 else files))


def spoil_file(draw: random.Random, path: Path) -> None:
    """Damage a file, change what it says, delete it, or put a folder in its place."""
    content = path.read_bytes()
    match draw.randrange(6):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.mkdir()
        case 2 | 3 if path.suffix in TEXTS:
            dump: Callable[[Any], str] = yaml.safe_dump if path.suffix == ".yaml" else json.dumps
            text = "\n".join(
                dump(_changed(draw, yaml.safe_load(line))) for line in _documents(path)
            )
            path.write_text(text, errors="replace")
        case _:
            path.write_bytes(damaged(draw, content))


def _documents(path: Path) -> list[str]:
    text = path.read_text()
    return text.splitlines() if path.suffix == ".jsonl" else [text]


def _changed(draw: random.Random, said: Any) -> Any:
    return mutated(draw, said) if isinstance(said, dict | list) else hostile(draw)
