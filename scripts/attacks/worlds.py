"""Good worlds, made once, and the command that runs in a spoilt copy of one."""

import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SECONDS, MEMORY = 60.0, 4 * 2**30
"""What a command may take, and how much memory beyond what it starts with."""
OUT, ERR = "stdout.txt", "stderr.txt"
REFERENCE = "reference.json"


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        status: exit status, negative for a signal, None where it took too long.
    """

    status: int | None
    out: str
    err: str
    seconds: float


def forked(work: Callable[[], Any], logs: Path, seconds: float = SECONDS) -> Ended:
    """Run a function in a copy of this process, which has imported everything already."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _inside(work, logs)
    status = None
    while status is None and time.monotonic() - start < seconds:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        else:
            time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what it has started too
    if status is None:
        os.waitpid(child, 0)
    texts = [(logs / name).read_text("utf-8", "replace") for name in (OUT, ERR)]
    return Ended(status, *texts, time.monotonic() - start)


def _inside(work: Callable[[], Any], logs: Path) -> None:
    status = 70
    try:
        os.setsid()
        for number, name in ((1, OUT), (2, ERR)):
            os.dup2(os.open(logs / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        most = _virtual() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _virtual() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def command(words: list[str]) -> Callable[[], None]:
    """`mmkd WORDS` as a function."""

    def run() -> None:
        from mmkd.cli import main

        sys.argv = ["mmkd", *words]
        main()

    return run


class Worlds:
    """Folders to copy.

    `good` has a recipe and what it reads; `trained` a finished run as well, `stopped` one that was
    broken off, `cached` a teacher's cache, `scored` a finished run of a hybrid student with scores
    and answers, `converted` a hybrid that the recipe starts from.

    Args:
        home: where they are made.
    """

    NAMES = ("good", "trained", "stopped", "cached", "scored", "converted")

    def __init__(self, home: Path):
        self.home, self.bases = home, home / "bases"
        self.bases.mkdir(parents=True)
        for work in (self._prepare, *(self._finish(name) for name in self.NAMES)):
            ended = forked(work, home, 600)
            if ended.status != 0:
                raise SystemExit(f"cannot make the good worlds: {ended.err}")

    def _prepare(self) -> None:
        from mmkd.data.scenes.build import build_scenes
        from tests.support.bad_inputs import Given, world_in
        from tests.support.tiny import write_tiny_model

        build_scenes(self.home / "scenes", seed=0, train=2, validation=2, evaluation=2)
        write_tiny_model(self.home / "scenes" / "processor", self.home / "model")
        given = Given(self.home / "given", self.home / "model")
        for name in self.NAMES:
            with world_in(self.bases / name, given) as world:
                if name == "trained":
                    world.take(given.trained, "runs")
                elif name == "stopped":
                    world.take(given.stopped, "runs")
                    world.stage(steps=2, checkpoint={"interval": 1})
                elif name == "cached":
                    world.cache()
                    world.take(given.cached, "cache")
                elif name in ("scored", "converted"):
                    self._with_tasks(world, name)
                world.raw.setdefault("evaluate", {})["samples"] = {"images": ["picture.png"]}
                Path("recipe.yaml").write_text(yaml.safe_dump(world.raw))

    def _with_tasks(self, world: Any, name: str) -> None:
        for part in ("tasks", "eval"):
            shutil.copytree(self.home / "scenes" / part, part)
        if name == "scored":
            world.raw["student"]["convert"] = [{"kind": "mamba", "layers": "all"}]
            world.raw["evaluate"] = {"tasks": ["scenes_pope"], "include": "tasks"}
            return
        with suppress(SystemExit):
            command(["convert", "model", "--out", "hybrid", "--keep-attention", "none"])()
        world.raw["student"] = {"model": "hybrid"}

    def _finish(self, name: str) -> Callable[[], None]:
        """Run a copy to its end, and note what comes out where nothing is spoilt."""

        def work() -> None:
            folder = self.home / "finished" / name
            shutil.copytree(self.bases / name, folder, symlinks=True)
            os.chdir(folder)
            try:
                command(["run", "recipe.yaml"])()
            except SystemExit as end:
                if end.code:
                    raise
            if name in ("trained", "scored"):
                shutil.copytree(folder, self.bases / name, symlinks=True, dirs_exist_ok=True)
            text = json.dumps({"losses": losses(folder), "student": student(folder)})
            (self.home / f"{name}.{REFERENCE}").write_text(text)

        return work

    def copy(self, name: str, target: Path) -> None:
        shutil.copytree(self.bases / name, target, symlinks=True)

    def reference(self, name: str) -> dict[str, Any]:
        return json.loads((self.home / f"{name}.{REFERENCE}").read_text())


def losses(folder: Path) -> list[Any]:
    """[step, loss] of all lines of the only stage."""
    found = []
    for path in sorted(folder.glob("runs/*/*/metrics.jsonl")):
        for line in path.read_text("utf-8", "replace").splitlines():
            try:
                said = json.loads(line)
                found.append([said["step"], said["loss"]])
            except (ValueError, TypeError, KeyError):
                found.append(["damaged", line[:80]])
    return found


def student(folder: Path, place: str = "runs/*/*/student") -> str:
    """The checksum of the finished student's weights; "" where there is none."""
    found = sorted(folder.glob(f"{place}/model.safetensors"))
    return hashlib.sha256(found[-1].read_bytes()).hexdigest() if found else ""
