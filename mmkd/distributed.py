"""Who this process is, and how processes find each other."""

import os

import torch
import torch.distributed as dist

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def choose_device(wanted: str) -> torch.device:
    """The recipe's device; `auto` takes this process's GPU where there is one."""
    if wanted != "auto":
        return torch.device(wanted)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def memory_of(device: torch.device) -> int:
    """Bytes that one process may use: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def connect(device: torch.device, *, alone: bool = False) -> None:
    """Join the process group that a launcher describes; `alone` makes a group of one process too,
    which otherwise needs none."""
    if dist.is_initialized() or (world_size() == 1 and not alone):
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size() > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather(items: list[str]) -> list[str]:
    """The items of all ranks, in the order of ranks; every rank calls it."""
    if not dist.is_initialized():
        return items
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def total(values: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


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
