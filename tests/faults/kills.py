"""Kills at random moments: does a run that is killed again and again end like one that is not?

    python tests/faults/kills.py --kills 100 --json runs/faults.json

The run has two stages (dropout, a sparse hybrid student, a teacher), a checkpoint every other step
and an evaluation. Each start is killed at a moment drawn by chance, one process or all of them, and
the same command goes on. After some kills it may finish: losses, weights and scores must be those
of a run that nobody disturbed, to the last bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))
from rich.table import Table

from mmkd.runtime.files import read_json, write_json
from mmkd.runtime.progress import console
from tests.support import warm
from tests.support.recipes import tiny_recipe
from tests.support.tiny import write_tiny_model

ENGINES: dict[str, tuple[dict[str, Any], int]] = {
    "torch x1": ({"kind": "torch"}, 1),
    "torch x2": ({"kind": "torch"}, 2),
    "ZeRO 1 x2": ({"kind": "deepspeed", "zero": 1}, 2),
    "ZeRO 2 x2": ({"kind": "deepspeed", "zero": 2}, 2),
    "ZeRO 3 x2": ({"kind": "deepspeed", "zero": 3}, 2),
}
MOMENTS = ("start", "step", "save", "stage change", "evaluation")
STAGES = ("01-first", "02-second")
STEPS, EVERY = 12, 2
PATIENCE = 120.0
"""Seconds after which a run that should have reached a moment, or ended, counts as hanging."""


@dataclass(frozen=True)
class Kill:
    """One kill: where it was aimed and where it hit, and what it cost.

    Attributes:
        processes: that were killed.
        alive: processes there were.
        step: steps done in the stage.
        saved: the step that the next start goes on from.
        status: exit status of the command, None where it was killed itself.
    """

    engine: str
    aim: str
    hit: str
    processes: int
    alive: int
    step: int
    saved: int
    status: int | None


def start_cold(words: list[str], log: Path) -> subprocess.Popen:
    """Start `mmkd` with a new Python, in a session of its own."""
    with log.open("w") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "mmkd.cli", *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def start_warm(words: list[str], log: Path) -> warm.Command:
    """The same from a process that has imported the libraries, which takes no seconds."""
    return warm.Command(*words, log=log, session=True)


Process = subprocess.Popen | warm.Command


class Run:
    """One recipe on one engine, and what its folder says."""

    def __init__(
        self,
        home: Path,
        name: str,
        engine: str,
        start: Callable[[list[str], Path], Process] = start_cold,
    ):
        settings, self.nproc = ENGINES[engine]
        self._start = start
        self.seconds_to_start = 6.0 if start is start_cold else 2.0
        self.engine, self.folder = engine, home / name
        self.log = home / f"{name}.log"
        self.recipe = home / f"{name}.yaml"
        stage = {
            "objectives": [{"kind": "ce"}, {"kind": "kl"}],
            "steps": STEPS,
            "batch": {"size": 2, "total": 4},
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"interval": EVERY},
            "engine": {"device": "cpu", **settings},
        }
        raw = tiny_recipe(
            home / "scenes",
            home / "model",
            home,
            name=name,
            teacher={"model": str(home / "model")},
            student={
                "model": str(home / "model"),
                "convert": [
                    {"kind": "mamba", "keep_attention": [0], "init": "mimic"},
                    {"kind": "moe", "experts": 2, "top_k": 1, "layers": "all"},
                ],
            },
            stages=[{"name": s.partition("-")[2], **stage} for s in STAGES],
            evaluate={
                "tasks": ["scenes_vqa"],
                "include": str(home / "scenes" / "tasks"),
                "limit": 8,
                "teacher": False,
            },
        )
        self.recipe.write_text(yaml.safe_dump(raw))

    def start(self) -> Process:
        return self._start(["run", str(self.recipe), "--nproc", str(self.nproc)], self.log)

    def workers(self, process: Process) -> list[psutil.Process]:
        """The processes that train, or score."""
        own = psutil.Process(process.pid)
        if self.nproc == 1:
            return [own]
        return [p for p in own.children() if p.status() != psutil.STATUS_ZOMBIE]

    def finish(self) -> None:
        """Run to the end."""
        process = self.start()
        status = process.wait(PATIENCE)
        if status:
            raise AssertionError(f"{self.engine}: status {status}\n{self.log.read_text()[-4000:]}")

    def steps(self, stage: str) -> int:
        path = self.folder / stage / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def saved(self, stage: str) -> int:
        """The step that a new start goes on from."""
        if (self.folder / stage / "done.json").exists():
            return self.steps(stage)
        saves = (self.folder / stage / "checkpoints").glob("step-*")
        return max((int(p.name[5:]) for p in saves if p.suffix != ".partial"), default=0)

    def stage(self) -> str:
        """The stage that is not done."""
        return STAGES[(self.folder / STAGES[0] / "done.json").exists()]

    def moment(self) -> str:
        """What the run is doing, by its folder."""
        if (self.folder / STAGES[1] / "done.json").exists():
            return "evaluation"
        if any(self.folder.glob("*/.student.*.partial")):
            return "stage change"
        if any(self.folder.glob("*/checkpoints/*.partial")):
            return "save"
        if self.steps(self.stage()):
            return "step"
        return "stage change" if self.stage() == STAGES[1] else "start"

    def traces(self) -> set[tuple[str, int]]:
        """What work leaves behind: files with their sizes, and lines about evaluation."""
        files = [p for p in self.folder.rglob("*") if p.is_file()]
        found = {(str(p), p.stat().st_size) for p in files}
        return found | {("evaluations", self.log.read_text().count("evaluation"))}

    def outcome(self) -> dict[str, Any]:
        """All that may not depend on kills."""
        scores = read_json(self.folder / "evaluation" / "student" / "results.json")["scores"]
        metrics = {
            stage: [
                {k: v for k, v in json.loads(line).items() if k != "seconds"}
                for line in (self.folder / stage / "metrics.jsonl").read_text().splitlines()
            ]
            for stage in STAGES
        }
        students = {s: self.folder / s / "student" / "model.safetensors" for s in STAGES}
        return {
            "scores": scores,
            "metrics": metrics,
            "weights": {stage: path.read_bytes() for stage, path in students.items()},
            "left": [p.name for p in self.folder.rglob("*.partial")]
            + [p.name for p in self.folder.rglob("checkpoints")],
        }


def disturb(run: Run, draw: random.Random) -> Kill | None:
    """Start the run and kill it at a moment drawn by chance; None if it ended before that."""
    now = run.moment()
    aim = draw.choice(MOMENTS[max(MOMENTS.index(now) - 2, 0) :])
    aim = "evaluation" if now == "evaluation" else aim
    stage, before = run.stage(), run.saved(run.stage())
    wanted = before + draw.randint(1, 4)
    process = run.start()
    untouched = run.traces()
    deadline = time.monotonic() + PATIENCE
    while len(run.workers(process)) < run.nproc:
        assert time.monotonic() < deadline
        time.sleep(0.01)

    def there() -> bool:
        if aim == "start":
            return True
        if aim == "step":
            return run.steps(stage) >= wanted or run.stage() != stage
        if aim == "evaluation":
            return run.moment() == aim
        return run.moment() == aim or run.moment() == "evaluation"

    while not there() and process.poll() is None:
        assert time.monotonic() < deadline, f"{run.engine} hangs\n{run.log.read_text()[-4000:]}"
        time.sleep(0.001)
    time.sleep(draw.uniform(0, run.seconds_to_start if aim in ("start", "evaluation") else 0.05))
    if process.poll() is not None:
        return None
    workers = run.workers(process)
    one = run.nproc > 1 and len(workers) > 1 and draw.random() < 0.5
    status = None
    if one:
        draw.choice(workers).kill()
        status = process.wait(PATIENCE)
        said = run.log.read_text()
        assert "was killed (SIGKILL)" in said or status == 0, said[-4000:]
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    stage = run.stage()
    return Kill(
        run.engine,
        aim,
        "start" if run.traces() == untouched else run.moment(),
        1 if one else len(workers),
        len(workers),
        run.steps(stage),
        run.saved(stage),
        status,
    )


def torment(
    home: Path,
    engine: str,
    kills: int,
    draw: random.Random,
    start: Callable[[list[str], Path], Process] = start_cold,
) -> list[Kill]:
    """Kill runs on an engine that often, some times each, and compare each with a quiet one.

    Raises:
        AssertionError: a run came out otherwise, hangs, or lost more than its last steps.
    """
    quiet = Run(home, f"quiet-{len(list(home.glob('*.yaml')))}", engine, start)
    quiet.finish()
    expected = quiet.outcome()
    assert not expected["left"]
    found: list[Kill] = []
    while len(found) < kills:
        run = Run(home, f"killed-{len(list(home.glob('*.yaml')))}", engine, start)
        for _ in range(min(draw.randint(6, 12), kills - len(found))):
            kill = disturb(run, draw)
            if kill is None:
                break
            found.append(kill)
            assert kill.step - kill.saved <= EVERY, kill
            console.print(
                f"{len(found):3} {engine}: {kill.processes} of {kill.alive} at {kill.hit}, "
                f"step {kill.step}, saved {kill.saved}",
                highlight=False,
            )
            if kill.hit == "evaluation" and draw.random() < 0.5:
                break
        run.finish()
        outcome = run.outcome()
        for key, value in expected.items():
            shown = outcome[key] if key in ("left", "scores") else ""
            assert outcome[key] == value, f"{engine}: {key} differs in {run.folder} {shown}"
    return found


def prepare(home: Path) -> None:
    """Data and model."""
    from mmkd.data.scenes.build import build_scenes

    build_scenes(home / "scenes", seed=0, train=64, validation=16, evaluation=6)
    write_tiny_model(home / "scenes" / "processor", home / "model", dropout=0.2)


def report(kills: list[Kill]) -> None:
    table = Table(title="kills survived")
    for name in ("engine", *MOMENTS, "all", "of one process"):
        table.add_column(name, justify="right")
    for engine in ENGINES:
        mine = [k for k in kills if k.engine == engine]
        hits = Counter(k.hit for k in mine)
        one = sum(k.processes < k.alive for k in mine)
        table.add_row(engine, *(str(hits[m]) for m in MOMENTS), str(len(mine)), str(one))
    console.print(table)
    lost = [k.step - k.saved for k in kills]
    console.print(
        f"{len(kills)} kills, every run ended like the undisturbed one; steps done again: at most "
        f"{max(lost)}, {sum(lost) / len(lost):.2f} a kill",
        highlight=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    kills: list[Kill] = []
    started = time.monotonic()
    with TemporaryDirectory() as folder:
        prepare(Path(folder))
        share, more = divmod(args.kills, len(ENGINES))
        for number, engine in enumerate(ENGINES):
            kills += torment(Path(folder), engine, share + (number < more), draw)
    report(kills)
    if args.json:
        seconds = round(time.monotonic() - started)
        write_json(args.json, {"seconds": seconds, "kills": [asdict(k) for k in kills]})


if __name__ == "__main__":
    main()
