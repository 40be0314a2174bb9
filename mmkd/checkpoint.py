"""Checkpoints of an unfinished stage: engine state, random states, step.

A checkpoint folder `step-N` exists only when it is complete; the newest one is where a stage
resumes. The data position needs no state: batches are addressed by step.
"""

import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmkd.engines import Engine
from mmkd.files import write_json

STATE = "state.json"


def save_checkpoint(folder: Path, step: int, engine: Engine, keep: int) -> None:
    """Write `folder/step-N`, then delete all but the newest `keep`. Every rank calls it."""
    target = folder / f"step-{step}"
    partial = folder / f"step-{step}.partial"
    if engine.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    engine.barrier()
    engine.save(partial)
    torch.save(_random_states(), partial / f"random-{engine.rank}.pt")
    engine.barrier()
    if engine.rank == 0:
        write_json(partial / STATE, {"step": step, "world_size": engine.world_size})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in find_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    engine.barrier()


def load_checkpoint(folder: Path, engine: Engine) -> int:
    """Restore the newest checkpoint below `folder`; returns its step, 0 if there is none."""
    found = find_checkpoints(folder)
    if not found:
        return 0
    newest = found[-1]
    engine.load(newest)
    states = newest / f"random-{engine.rank}.pt"
    if states.exists():
        _restore(torch.load(states, weights_only=True))
    return _step_of(newest)


def find_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    complete = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
    return sorted(complete, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _random_states() -> dict:
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


def _restore(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy(), *rest))
    version, internal, normal = states["python"]
    random.setstate((version, tuple(internal), normal))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
