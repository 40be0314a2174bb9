"""Cases of bad input: the action of a user, and the expected message."""

import hashlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file

from mmkd.cli import main
from mmkd.commands import build_cache
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from tests.support import hub_server
from tests.support.breaking import broken_off
from tests.support.recipes import tiny_recipe

RECORD: dict[str, Any] = {
    "id": "r1",
    "image": "picture.png",
    "conversations": [
        {"from": "human", "value": "<image>\nIs there a cat?"},
        {"from": "gpt", "value": "yes"},
    ],
}
TURNS = RECORD["conversations"]
FIRST = "records.json: record 0 (id r1): "
HUB = "https://huggingface.co"
RUN = ["run", "recipe.yaml"]


def record(**changes: Any) -> dict[str, Any]:
    """The good record with other values; None takes a key away."""
    return {k: v for k, v in {**RECORD, **changes}.items() if v is not None}


def write(content: str | bytes, name: str = "recipe.yaml") -> None:
    """Write a file of the world."""
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def change_json(path: str, change: Any) -> None:
    """Change the content of a JSON file in place."""
    found = json.loads(Path(path).read_text())
    change(found)
    Path(path).write_text(json.dumps(found))


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        kind: what is bad.
        name: of the test.
        did: what the user did, for docs/errors.md.
        parts: words of the message: what is wrong, where, how to fix it.
        prepare: spoils a good world; returns the words of the command, None for `RUN`.
        leaves: a folder that stays because it is whole.
    """

    kind: str
    name: str
    did: str
    parts: tuple[str, ...]
    prepare: Callable[["World"], list[str] | None]
    leaves: str | None = None


CASES: list[Case] = []


def case(kind: str, did: str, *parts: str, leaves: str | None = None) -> Callable[[Any], Any]:
    """Put a function that spoils the world into the table."""

    def keep(prepare: Callable[["World"], list[str] | None]) -> Any:
        CASES.append(Case(kind, prepare.__name__, did, parts, prepare, leaves))
        return prepare

    return keep


def overridden(kind: str, name: str, word: str, *parts: str) -> None:
    """Put into the table what `key=value` behind a good recipe spoils."""
    CASES.append(Case(kind, name, f"`{word}`", parts, lambda world: [*RUN, word]))


class Given:
    """What many cases start from, each made once: models, runs, a teacher's cache.

    Runs name everything relative to the folder that they are run in, so that a copy goes on.
    """

    def __init__(self, folder: Path, model: Path):
        self.folder, self.model = folder, model

    @cached_property
    def good(self) -> Path:
        """A recipe's model, teacher, records and image."""
        folder = self.folder / "good"
        shutil.copytree(self.model, folder / "model")
        shutil.copytree(self.model, folder / "teacher")
        weights = folder / "teacher" / "model.safetensors"
        tensors = {name: tensor + 0.01 for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
        Image.new("RGB", (64, 64), "red").save(folder / "picture.png")
        (folder / "records.json").write_text(json.dumps([RECORD]))
        return folder

    @cached_property
    def trained(self) -> Path:
        """A folder with a finished run."""
        with self._copy("trained") as world:
            pipeline.run(load_recipe(world.raw))
        return world.folder

    @cached_property
    def stopped(self) -> Path:
        """A folder with a run that was broken off behind its first checkpoint."""

        with self._copy("stopped") as world:
            world.stage(steps=2, checkpoint={"interval": 1})
            with broken_off(lambda stage, number: number > 1):
                pipeline.run(load_recipe(world.raw))
        return world.folder

    @cached_property
    def cached(self) -> Path:
        """A folder with the teacher's cache."""
        with self._copy("cached") as world:
            world.cache()
            build_cache.build_cache(load_recipe(world.raw))
        return world.folder

    @contextmanager
    def _copy(self, name: str) -> Iterator["World"]:
        with world_in(self.folder / name, self) as world, redirect_stdout(io.StringIO()):
            yield world


class World:
    """The folder in which a command is run, with a good recipe, records and models to spoil.

    Attributes:
        folder: the working directory.
        raw: the recipe.
        given: what can be copied here.
        patch: what is to be undone.
        neutral: what messages are to call things of this test.
    """

    def __init__(self, folder: Path, given: Given, patch: pytest.MonkeyPatch, stack: ExitStack):
        self.folder, self.given, self.patch, self._stack = folder, given, patch, stack
        self.raw = tiny_recipe(Path("scenes"), "model", Path("runs"), stage={"steps": 1})
        self.raw["data"] = {"train": "records.json"}
        self.neutral: dict[str, str] = {}

    def records(self, *rows: Any, name: str = "records.json") -> None:
        Path(name).write_text(json.dumps(list(rows)))
        self.raw["data"] = {"train": name}

    def stage(self, **changes: Any) -> None:
        self.raw["stages"][0].update(changes)

    def pairs(self) -> None:
        """Records of preference pairs."""
        said = {k: v for k, v in RECORD.items() if k != "conversations"}
        asked, answered = RECORD["conversations"]
        other = {**answered, "value": "Something else."}
        self.records({**said, "chosen": [asked, answered], "rejected": [asked, other]})

    def teach(self, *objectives: dict[str, Any]) -> None:
        """A teacher, and objectives that read it."""
        self.raw["teacher"] = {"model": "teacher"}
        self.stage(objectives=list(objectives) or [{"kind": "kl"}])

    def cache(self) -> None:
        """The teacher from its cache."""
        self.teach()
        self.raw["teacher"] |= {"source": "cache", "cache": {"folder": "cache"}}

    def take(self, made: Path, name: str) -> None:
        """Copy a folder that was made in another world."""
        shutil.copytree(made / name, name, symlinks=True)

    def hub(self) -> hub_server.Hub:
        """A Hub that can be reached."""
        hub = self._stack.enter_context(hub_server.in_place(self.patch))
        self.neutral[hub.url] = HUB
        return hub


@contextmanager
def world_in(folder: Path, given: Given) -> Iterator[World]:
    """A world as the working directory."""
    shutil.copytree(given.good, folder)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.chdir(folder)
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval's import sets it
        yield World(folder, given, patch, stack)


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        message: what stands on stderr.
        changed: paths that are new, gone or other than before.
    """

    status: Any
    message: str
    changed: list[str]


def outcome(case: Case, world: World) -> Outcome:
    """Spoil the world, run the command, and look."""
    words = case.prepare(world) or RUN
    recipe = Path("recipe.yaml")
    if not recipe.exists():
        recipe.write_text(yaml.safe_dump(world.raw))
    before = contents(world.folder)
    status, message = run(words, world.patch)
    for real, neutral in {f"{world.folder.resolve()}/": "", **world.neutral}.items():
        message = message.replace(real, neutral)
    after = contents(world.folder)
    changed = [p for p in before.keys() | after.keys() if before.get(p) != after.get(p)]
    kept = [p for p in changed if case.leaves is None or not p.startswith(case.leaves)]
    return Outcome(status, message, sorted(kept))


def refused(case: Case, world: World) -> str:
    """The message of a case, which is one line, and after which nothing on disk has changed."""
    found = outcome(case, world)
    assert found.status == 2, found.message
    assert found.message.startswith("mmkd: ")
    assert "\n" not in found.message
    assert found.message.count(" -- ") == 1, "what is wrong, and what to do about it"
    for part in case.parts:
        assert part in found.message
    assert found.changed == []
    return found.message


def run(words: list[str], patch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """Exit status and stderr of `mmkd WORDS` in this process."""
    patch.setattr(sys, "argv", ["mmkd", *words])
    said = io.StringIO()
    for handler in log_handlers():
        patch.setattr(handler, "stream", said)
    environment = mock.patch.dict(os.environ)  # a command sets variables for its own process
    with environment, redirect_stdout(io.StringIO()), redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            return end.code, said.getvalue().strip()
    raise AssertionError("main always exits")


def log_handlers() -> Iterator[logging.StreamHandler]:
    """What libraries log goes to a terminal too: a user would read it beside the message."""
    loggers = [logging.getLogger(name) for name in ("", *logging.root.manager.loggerDict)]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        if type(handler) is logging.StreamHandler:
            yield handler


def contents(folder: Path) -> dict[str, str]:
    """Each file's checksum and each link's target, by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found
