"""Checkpoints of an unfinished stage: everything that training changes, random states, step.

checkpoints/step-N/
  state.json                 step, number of ranks, size and checksum of every other file; shares of
                             the sources if they change (`data.sampling`)
  tensors-RANK-PART.safetensors
  random-RANK.pt

A folder `step-N` exists only if it is complete. Tensors are not sharded and have fixed names, so
any engine with any number of ranks can load them. The position in the data needs no state, because
batches are a function of the step, and of shares that are stored.

torch.distributed.checkpoint can also load with another number of ranks. For that, sharded tensors
must be DTensors or ShardedTensors; DeepSpeed's shards are neither. It writes no checksums, with
which damage is found before anything is loaded, and describes the files in a pickle, which can run
code when it is read.
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
    mixture: dict[str, Any] | None = None,
) -> None:
    """Write `folder/step-N`, then delete all but the newest `keep` checkpoints, if given. Every
    rank must call it.

    With `only_weights`, optimizer states are left out, and training cannot resume from it.
    `mixture` has the shares of the sources, if they change (`mmkd.training.domains`).

    Raises:
        CheckpointError: on all ranks, if one rank could not write. Older checkpoints are kept.
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
            **({} if mixture is None else {"mixture": mixture}),
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

    A rank that cannot write still iterates over all tensors, because gathering them needs all
    ranks.

    Returns:
        Its files with size and checksum, and error messages.
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
    """Call `write`, and return the error message, if there is one."""
    try:
        write()
    except (OSError, SafetensorError, RuntimeError) as error:  # types of the different libraries
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _facts(path: Path) -> dict[str, Any]:
    sync_file(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def load_checkpoint(folder: Path, engine: Engine, *, records_per_step: int) -> int:
    """Resume from the newest undamaged checkpoint in `folder`. Returns its step, 0 if there is
    none.

    Damaged checkpoints are logged and skipped. Every rank must call it.

    Raises:
        CheckpointError: its steps had another number of records.
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


def saved_mixture(folder: Path, step: int) -> dict[str, Any] | None:
    """The shares of the sources in a checkpoint; None if it has none."""
    state = read_if(State, folder / f"step-{step}" / STATE)
    return None if state is None else state.get("mixture")


def check_batch(folder: Path, records_per_step: int) -> None:
    """Check the number of records per step of checkpoints, without loading tensors.

    Raises:
        CheckpointError: the steps of a checkpoint had another number of records.
    """
    for path in find_checkpoints(folder):
        if read_if(State, path / STATE) is not None:  # else it is passed over
            _refuse_other_batch(path, records_per_step)


def _refuse_other_batch(path: Path, records_per_step: int) -> None:
    saw = read_json(path / STATE)["records_per_step"]
    if saw != records_per_step:
        raise CheckpointError(
            f"a step had {saw} records, and now it would have {records_per_step}",
            where=str(path),
            hint=f"set batch.total={saw}, which is valid for any number of processes",
        )


def _damage(path: Path, engine: Engine) -> str | None:
    """A description of a checkpoint's damage, or None. Each rank checks a share of the files."""
    state = read_if(State, path / STATE)
    if state is None:
        return f"{STATE} cannot be read"
    files = state["files"]
    if state["step"] != step_of(path):
        return f"{STATE} is of step {state['step']}"
    if unknown := {f.name for f in path.glob("*.safetensors")} - set(files):
        return f"{STATE} does not list {min(unknown)}"
    for number, (name, facts) in enumerate(sorted(files.items())):
        if number % engine.world_size == engine.rank:
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != facts["bytes"] or sha256(file) != facts["sha256"]:
                return f"{name} is damaged (checksum)"
    return None


class SavedTensors(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name. They are read when they are accessed."""

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
    """Load the weights of `folder/step-N` into the student. Every rank must call it.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
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
    """The step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def random_states() -> dict:
    """The states of all random number generators of this process."""
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
    """Restore the states that `random_states` has returned."""
    torch.set_rng_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    version, internal, normal = states["python"]
    random.setstate((version, tuple(internal), normal))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
