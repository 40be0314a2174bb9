"""One stage on every engine: how far are its losses from those of plain torch in one process?

    python -m benchmarks.engine_losses --json runs/bench/engine_losses.json

Runs the quickstart's mimic stage through `mmkd run`, in float32, on torch and on ZeRO 0 to 3, at
one and two processes, with the teacher whole on each process and spread over them. Runs that are
there already are not made again.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.measure import save
from mmkd.runtime.progress import console, log_to_console, track

RECIPE = "configs/quickstart.yaml"
RECORDS = 32
PARTS = ("loss", "ce", "kl", "kl_vision")
ENGINES = {
    "torch": "{kind: torch, device: cpu}",
    **{f"ZeRO {z}": f"{{kind: deepspeed, zero: {z}, device: cpu}}" for z in range(4)},
}
TEACHERS = ("replicated", "sharded")


def losses(engine: str, processes: int, teacher: str, steps: int, out: Path) -> list[dict]:
    """The loss and its parts at each step, by name."""
    name = f"{engine.replace(' ', '').lower()}-{processes}-{teacher}"
    stage = out.resolve() / name / "01-mimic"
    if not (stage / "done.json").exists():
        words = [
            "variants={}",
            "evaluate=null",
            f"name={name}",
            f"output_dir={out.resolve()}",
            f"teacher.placement={teacher}",
            f"stages.0.steps={steps}",
            f"stages.0.batch={{size: {RECORDS // processes}, total: {RECORDS}}}",
            "stages.0.precision=float32",
            f"stages.0.engine={ENGINES[engine]}",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "mmkd.cli", "run", RECIPE, "--nproc", str(processes), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    return [{part: json.loads(line)[part] for part in PARTS} for line in lines]


def distances(found: list[dict], expected: list[dict]) -> dict[str, float]:
    """The largest distance over all steps and parts, of the loss alone, and of the last step's."""
    every = [
        {part: abs(a[part] - b[part]) for part in PARTS}
        for a, b in zip(found, expected, strict=True)
    ]
    return {
        "any_part": max(max(step.values()) for step in every),
        "loss": max(step["loss"] for step in every),
        "last_loss": every[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/engine-losses"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    log_to_console()
    settings = [(e, n, t) for t in TEACHERS for n in (1, 2) for e in ENGINES]
    results: list[dict[str, Any]] = []
    expected: list[dict] = []
    for engine, processes, teacher in track(settings, "engines", len(settings)):
        found = losses(engine, processes, teacher, args.steps, args.out)
        expected = expected or found  # torch, one process, the teacher whole
        results.append(
            {
                "engine": engine,
                "processes": processes,
                "teacher": teacher,
                **distances(found, expected),
                "losses": [step["loss"] for step in found],
            }
        )
    report(results, args.steps)
    save(args, results=results)


def report(results: list[dict[str, Any]], steps: int) -> None:
    table = Table(title=f"largest distance of a loss over {steps} steps")
    for name in ("engine", "processes", "teacher", "loss", "any objective's part", "last loss"):
        table.add_column(name, justify="right")
    for r in results:
        distances = [f"{r[key]:.1e}" for key in ("loss", "any_part")]
        last = f"{r['losses'][-1]:.6f}"
        table.add_row(r["engine"], str(r["processes"]), r["teacher"], *distances, last)
    console.print(table)


if __name__ == "__main__":
    main()
