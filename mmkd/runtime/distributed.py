"""Who this process is, and how processes find each other."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmkd.errors import HINT, CheckpointError, MmkdError, PeerError
from mmkd.runtime.files import disk_error, locked

TIMEOUT_S = 1800.0
"""Seconds that a process waits for the others, if the recipe says nothing else."""

_timeout = timedelta(seconds=TIMEOUT_S)

# What torch's backends say when another process is gone; they raise plain RuntimeErrors.
GONE = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
LATE = ("timed out", "timeout")
WORKER = "DataLoader worker (pid"
"""How torch begins to say that a worker of a data loader is gone."""

Item = TypeVar("Item")

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Imagined:
    """Processes that are planned for, with a GPU of so many bytes each, or on this machine."""

    processes: int
    memory: int | None


_imagined: Imagined | None = None
_hidden: dict[str, str] = {}


@contextmanager
def imagined(processes: int, memory: int | None) -> Iterator[None]:
    """Inside, sizes and devices are those of another machine; nothing may run."""
    global _imagined
    _imagined = Imagined(processes, memory)
    try:
        yield
    finally:
        _imagined = None


@contextmanager
def unknown_to_libraries() -> Iterator[None]:
    """Inside, the environment names no launcher, so a library takes this process for the only one.
    `rank` and `world_size` stay the same."""
    found = {name: os.environ.pop(name) for name in LAUNCHED if name in os.environ}
    _hidden.update(found)
    try:
        yield
    finally:
        os.environ.update(found)
        for name in found:
            del _hidden[name]


def _launched(name: str, otherwise: int) -> int:
    """A number that the launcher has told this process."""
    return int({**os.environ, **_hidden}.get(name, otherwise))


def rank() -> int:
    return _launched("RANK", 0)


def world_size() -> int:
    if _imagined is not None:
        return _imagined.processes
    return _launched("WORLD_SIZE", 1)


def choose_device(wanted: str) -> torch.device:
    """The recipe's device; `auto` takes this process's GPU where there is one.

    Raises:
        MmkdError: there is no such device.
    """
    imagined_gpu = _imagined is not None and _imagined.memory is not None
    if wanted != "auto":
        where, hint = "device", "use auto, cpu, cuda or cuda:N"
        try:
            found = torch.device(wanted)
        except (RuntimeError, ValueError, OverflowError) as error:
            raise MmkdError(f"unknown device {wanted!r}", where=where, hint=hint) from error
        if not _can_train(found):
            raise MmkdError(f"torch has no {found.type} device here", where=where, hint=hint)
        if found.type == "cuda" and not imagined_gpu:
            if not torch.cuda.is_available():
                raise MmkdError("torch sees no GPU", where=where, hint="set it to auto or cpu")
            if (found.index or 0) >= (count := torch.cuda.device_count()):
                raise MmkdError(f"torch sees {count} GPU(s), not {wanted}", where=where, hint=hint)
        return found
    if imagined_gpu:
        return torch.device("cuda")
    if torch.cuda.is_available():
        return torch.device("cuda", _launched("LOCAL_RANK", 0))
    return torch.device("cpu")


def _can_train(device: torch.device) -> bool:
    """Whether it is the CPU, a GPU, or what else torch has found on this machine: of the other
    kinds that torch has names for, meta computes nothing."""
    if device.type in ("cpu", "cuda"):
        return True
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type == device.type


def memory_of(device: torch.device) -> int:
    """Bytes that one process may use: its GPU's, or its share of the machine's."""
    if _imagined is not None and _imagined.memory is not None:
        return _imagined.memory
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // _launched("LOCAL_WORLD_SIZE", 1)


def connect(device: torch.device, *, alone: bool = False, timeout_s: float = TIMEOUT_S) -> None:
    """Join the process group that a launcher describes; `alone` makes a group of one process too,
    which otherwise needs none.

    Args:
        device: of this process.
        alone: make a group of one.
        timeout_s: seconds to wait for the others, now and in every exchange.

    Raises:
        PeerError: they did not come.
    """
    global _timeout
    if dist.is_initialized() or (world_size() == 1 and not alone):
        return
    _timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # NCCL exchanges objects on the current GPU
    settings: dict[str, Any] = {"timeout": _timeout}
    if world_size() == 1:
        settings |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(backend, **settings)
    except dist.DistError as error:
        raise PeerError(
            f"process {rank()} waited {timeout_s:.0f} s, and not all {world_size()} came",
            hint="start all of them with the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE",
        ) from error


def new_group(ranks: list[int]) -> Any:
    """A group of some processes that waits as long as the group of all."""
    return dist.new_group(ranks, timeout=_timeout)


def explained(error: BaseException) -> PeerError | None:
    """What an exception says of the other processes, if it is about them."""
    said = str(error)
    if WORKER in said:  # torch raises it wherever the process is when it hears of it
        return PeerError(
            "a process that prepares batches was killed",
            where="data.workers",
            hint="lower it if memory is short; the same command goes on from the newest checkpoint",
        )
    if not (isinstance(error, dist.DistError) or any(word in said for word in GONE)):
        return None
    again = "see the errors of the others; the same command goes on from the newest checkpoint"
    if any(word in said.lower() for word in LATE):
        what = "waits for another process that does not answer"
    else:
        what = "lost the connection to another process"
    return PeerError(f"process {rank()} {what}", hint=again)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(items: list[Item]) -> list[Item]:
    """The items of all ranks, in the order of ranks; every rank calls it."""
    if not dist.is_initialized():
        return items
    gathered: list[list[Item]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in the order of ranks; every rank calls it.

    Gradients flow into the rows of this rank only.

    Args:
        rows: [n, ...] with an n of each rank's own, and [0] or [0, ...] for no rows.
    """
    if not dist.is_initialized():
        return rows
    shapes = gather([(tuple(rows.shape), rows.dtype)])
    most, dtype = max(shapes, key=lambda shape: (shape[0][0], len(shape[0])))
    padded = torch.zeros(most, dtype=dtype, device=rows.device)
    if len(rows):
        padded[: len(rows)] = rows.detach()
    found = [torch.empty_like(padded) for _ in shapes]
    dist.all_gather(found, padded)
    parts = [part[: shape[0]] for part, (shape, _) in zip(found, shapes, strict=True)]
    parts[dist.get_rank()] = rows.view(len(rows), *most[1:])
    return torch.cat(parts)


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_agree(yes: bool) -> bool:
    """Whether all ranks say yes; every rank calls it.

    For example whether a file exists: the ranks look at different moments, and one that decided
    differently from the others would wait for them forever.
    """
    return not gather([] if yes else ["no"])


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Inside, no other command writes into a folder; every rank calls it.

    Raises:
        CheckpointError: on all ranks, if another command does already, or the folder cannot be
            made.
    """
    with ExitStack() as stack:
        problem = ""
        if rank() == 0:
            try:
                stack.enter_context(locked(folder))
            except (CheckpointError, OSError) as error:
                problem = str(disk_error(error) or error)
        for said in gather([problem]):
            if said:
                what, _, hint = said.partition(HINT)
                raise CheckpointError(what, hint=hint)
        yield


def equal_shares(items: Sequence[Item], size: int) -> list[list[Item]]:
    """This rank's share of some work, in as many batches as every other rank's.

    A model that is spread over the ranks only runs when all of them run it, so every rank has to
    run it the same number of times. A rank with too few items gets empty batches at the end. For
    these it runs the model on some other item, or skips them if each rank has the whole model.

    Args:
        items: of all ranks; rank r of R gets items r, r + R, r + 2R, ...
        size: items of a batch.
    """
    ranks = world_size()
    mine = items[rank() :: ranks]
    longest = -(-len(items) // ranks)
    return [list(mine[start : start + size]) for start in range(0, longest, size)]


def leave() -> None:
    """Leave the process group for good; the first rank goes on as one process that no launcher
    started."""
    disconnect()
    if rank() == 0:
        for name in LAUNCHED:
            os.environ.pop(name, None)


def disconnect() -> None:
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
