"""Checkpoints of an unfinished stage: what training changed, random states, step.

checkpoints/step-N/
  state.json                 step, number of ranks, size and checksum of every other file
  tensors-RANK-PART.safetensors
  random-RANK.pt

A folder `step-N` exists only when it is complete. Tensors are whole and named by what they are, so
that any engine on any number of ranks goes on from them. The data position needs no state: batches
are addressed by step.

torch.distributed.checkpoint also loads into another number of ranks. For that, tensors that are cut
among ranks must be DTensors or ShardedTensors; the parts that DeepSpeed makes are neither. It
writes no checksums, by which a damaged file is found before anything of it is loaded, and describes
the files in a pickle, which can run code when it is read.
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmkd.engines import Engine
from mmkd.engines.state import WEIGHTS
from mmkd.errors import CheckpointError
from mmkd.runtime import distributed
from mmkd.runtime.files import read_json, sha256, sync_file, sync_folder, write_json
from mmkd.runtime.progress import say
from mmkd.runtime.shapes import State, read_if

STATE = "state.json"
PART_BYTES = 2**30


def save_checkpoint(
    folder: Path,
    step: int,
    engine: Engine,
    *,
    records_per_step: int,
    keep: int | None,
    only_weights: bool = False,
) -> None:
    """Write `folder/step-N`, then delete all but the newest `keep`, if given. Every rank calls it.

    With `only_weights` the optimizer's states are left out: nothing can resume from it.

    Raises:
        CheckpointError: on all ranks, if one could not write; older checkpoints stay.
    """
    target = folder / f"step-{step}"
    partial = folder / f"step-{step}.partial"
    if engine.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.barrier()
    files, problem = _write(partial, engine, only_weights=only_weights)
    said = [json.loads(text) for text in distributed.gather([json.dumps([files, problem])])]
    problem = next((p for _, p in said if p), None)
    if problem is None and engine.rank == 0:
        written = {name: facts for part, _ in said for name, facts in part.items()}
        state = {
            "step": step,
            "world_size": engine.world_size,
            "records_per_step": records_per_step,
            "files": written,
        }
        problem = _attempt(lambda: write_json(partial / STATE, state))
    problems = distributed.gather([problem] if problem else [])
    if problems:
        if engine.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        before = [step_of(p) for p in find_checkpoints(folder)]
        raise CheckpointError(
            f"cannot save step {step} ({problems[0]})",
            where=str(folder),
            hint="free space and run again: it goes on from "
            + (f"step {before[-1]}" if before else "the start of the stage"),
        )
    if engine.rank == 0:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        sync_folder(folder)
        for old in [] if keep is None else find_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    engine.barrier()


def _write(
    folder: Path, engine: Engine, *, only_weights: bool
) -> tuple[dict[str, Any], str | None]:
    """Write this rank's share of the tensors and its random states.

    Returns its files with size and checksum, and what went wrong. A rank that cannot write still
    goes through all tensors: gathering them takes every rank.
    """
    problem: str | None = None
    names: list[str] = []
    part: dict[str, Tensor] = {}

    def flush() -> None:
        nonlocal problem, part
        name, tensors = f"tensors-{engine.rank}-{len(names)}.safetensors", part
        names.append(name)
        problem = problem or _attempt(lambda: save_file(tensors, folder / name))
        part = {}

    tensors: Iterator[tuple[str, Tensor]] = engine.tensors()
    if only_weights:  # they come first
        tensors = takewhile(lambda named: named[0].startswith(f"{WEIGHTS}/"), tensors)
    for number, (key, tensor) in enumerate(tensors):
        if number % engine.world_size == engine.rank:
            part[key] = tensor.detach().to("cpu", copy=True).contiguous()
            if sum(t.nbytes for t in part.values()) > PART_BYTES:
                flush()
    flush()
    names.append(f"random-{engine.rank}.pt")
    problem = problem or _attempt(lambda: torch.save(random_states(), folder / names[-1]))
    files = {} if problem else {name: _facts(folder / name) for name in names}
    return files, problem


def _attempt(write: Callable[[], Any]) -> str | None:
    """Write; returns what went wrong."""
    try:
        write()
    except (OSError, SafetensorError, RuntimeError) as error:  # each library has its own
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _facts(path: Path) -> dict[str, Any]:
    sync_file(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def load_checkpoint(folder: Path, engine: Engine, *, records_per_step: int) -> int:
    """Go on from the newest sound checkpoint below `folder`; returns its step, 0 if there is none.

    A damaged one is named and passed over. Every rank calls it.

    Raises:
        CheckpointError: its steps saw another number of records.
    """
    for path in reversed(find_checkpoints(folder)):
        damages = distributed.gather([d] if (d := _damage(path, engine)) else [])
        if damages:
            if engine.rank == 0:
                say(f"{path}: {damages[0]}; passed over")
            continue
        _refuse_other_batch(path, records_per_step)
        step = step_of(path)
        engine.restore(SavedTensors(path), step)
        states = path / f"random-{engine.rank}.pt"
        if states.exists():
            restore_random_states(torch.load(states, weights_only=True))
        return step
    return 0


def check_batch(folder: Path, records_per_step: int) -> None:
    """What can be told without reading the checkpoints below `folder` whole.

    Raises:
        CheckpointError: their steps saw another number of records.
    """
    for path in find_checkpoints(folder):
        if read_if(State, path / STATE) is not None:  # else it is passed over
            _refuse_other_batch(path, records_per_step)


def _refuse_other_batch(path: Path, records_per_step: int) -> None:
    saw = read_json(path / STATE)["records_per_step"]
    if saw != records_per_step:
        raise CheckpointError(
            f"a step saw {saw} records, now it would see {records_per_step}",
            where=str(path),
            hint=f"set batch.total={saw}, it holds for any number of processes",
        )


def _damage(path: Path, engine: Engine) -> str | None:
    """What is wrong with a checkpoint; ranks share the files among them."""
    state = read_if(State, path / STATE)
    if state is None:
        return f"{STATE} cannot be read"
    files = state["files"]
    if state["step"] != step_of(path):
        return f"{STATE} is of step {state['step']}"
    if unknown := {f.name for f in path.glob("*.safetensors")} - set(files):
        return f"{STATE} knows nothing of {min(unknown)}"
    for number, (name, facts) in enumerate(sorted(files.items())):
        if number % engine.world_size == engine.rank:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"] or sha256(file) != facts["sha256"]:
                return f"{name} is damaged (checksum)"
    return None


class SavedTensors(Mapping[str, Tensor]):
    """A checkpoint's tensors by name, read when asked for."""

    def __init__(self, folder: Path):
        self._files: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                self._files |= dict.fromkeys(file.keys(), path)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def load_weights(folder: Path, step: int, engine: Engine) -> None:
    """Take the weights of `folder/step-N`. Every rank calls it.

    Raises:
        CheckpointError: it is gone or damaged.
    """
    path = folder / f"step-{step}"
    damages = distributed.gather([d] if (d := _damage(path, engine)) else [])
    if damages:
        raise CheckpointError(
            damages[0], where=str(path), hint="delete the stage's folder to train it again"
        )
    engine.restore_weights(SavedTensors(path))


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    complete = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(complete, key=step_of)


def step_of(path: Path) -> int:
    """The step that a checkpoint is of."""
    return int(path.name.removeprefix("step-"))


def random_states() -> dict:
    """The states of all random generators that this process draws from."""
    state: Any = np.random.get_state()
    kind, keys, position, has_gauss, gauss = state
    version, internal, normal = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(keys.copy()), position, has_gauss, gauss),
        "python": (version, list(internal), normal),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict) -> None:
    """Go on drawing from what `random_states` gave."""
    torch.set_rng_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    version, internal, normal = states["python"]
    random.setstate((version, tuple(internal), normal))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
