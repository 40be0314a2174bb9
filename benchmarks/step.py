"""Whole training steps: with a live teacher, on half of the image tokens, from its cache, without
a teacher, and a lower bound.

    python -m benchmarks.step --json runs/bench/step.json
    python -m benchmarks.step --device cuda --precision bfloat16 --json ...

The quickstart's mimic stage on encoded batches (CE + KL + KL over the image tokens).
`floor`: what the models alone take (`mmkd bench` says of what). All in turn in this process,
medians. The quickstart's student is small; `--student teacher` takes the teacher's own size.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.table import Table

from benchmarks.measure import median_seconds, save
from mmkd.commands.bench import floor_of, prepare
from mmkd.commands.build_cache import build_cache
from mmkd.recipe import Recipe, load_recipe
from mmkd.runtime.progress import console

RECIPE = "configs/quickstart.yaml"
STUDENTS = {"quickstart": [], "teacher": ["student.convert=[]"]}


def recipes(folder: Path, args: argparse.Namespace, records: int) -> dict[str, Recipe]:
    """The stage with a live teacher, on half of the image tokens, from the cache, and with
    cross-entropy alone, on the first records."""
    data = folder / "records.parquet"
    pq.write_table(pq.read_table("data/scenes/train.parquet").slice(0, records), data)
    common = [
        "variants={}",
        f"data.train={data}",
        f"stages.0.batch={{size: {args.batch}}}",
        f"stages.0.precision={args.precision}",
        f"stages.0.engine={{device: {args.device}}}",
        *STUDENTS[args.student],
    ]
    cache = ["teacher.source=cache", f"teacher.cache={{folder: {folder / 'cache'}}}"]
    return {
        "with a live teacher": load_recipe(RECIPE, common),
        "with half of the image tokens": load_recipe(
            RECIPE, [*common, "stages.0.image_tokens.keep=0.5"]
        ),
        "from its cache": load_recipe(RECIPE, common + cache),
        "cross-entropy": load_recipe(RECIPE, [*common, "stages.0.objectives=[{kind: ce}]"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--student", choices=list(STUDENTS), default="quickstart")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = recipes(folder, args, 8 * args.batch)
        build_cache(made["from its cache"])
        calls: dict[str, Callable[[], Any]] = {}
        for label, recipe in made.items():
            stage, student = prepare(recipe, 0, folder)
            batches = [stage.stream.batches(number)[0] for number in range(8)]
            count = iter(range(10**6))

            def step(stage: Any = stage, batches: Any = batches, count: Any = count) -> None:
                number = next(count)
                stage.step(number + 1, [batches[number % 8]])

            calls[label] = step
            if label == "with a live teacher":

                def floor(
                    stage: Any = stage,
                    student: Any = student,
                    batches: Any = batches,
                    count: Any = iter(range(10**6)),  # noqa: B008
                ) -> None:
                    floor_of(stage, student, stage.teachers, [batches[next(count) % 8]])

                calls["floor"] = floor
        seconds = median_seconds(calls, args.repeats)
    report(seconds)
    save(args, seconds=seconds)


def report(seconds: dict[str, float]) -> None:
    table = Table(title="ms a step")
    for name in ("step", "ms", "of the floor", "of cross-entropy"):
        table.add_column(name, justify="right")
    for name, taken in seconds.items():
        parts = [f"{taken / seconds[k]:.2f}x" for k in ("floor", "cross-entropy")]
        table.add_row(name, f"{1e3 * taken:.1f}", *parts)
    console.print(table)


if __name__ == "__main__":
    main()
