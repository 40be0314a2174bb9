"""Run a function on several connected processes."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

SECONDS = 60


def on_ranks(work: Callable[[int], Any], count: int, folder: Path) -> list[Any]:
    """What `work(rank)` returns or raises on each of `count` processes that are connected."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def run(rank: int) -> None:
        store = dist.FileStore(str(folder / "store"), count)
        dist.distributed_c10d._update_default_pg(None)  # that of the test's own process, if any
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
        try:
            results.put((rank, work(rank)))
        except Exception as error:
            results.put((rank, str(error)))
        results.close()
        results.join_thread()
        os._exit(0)  # an inherited group cannot be taken down here

    processes = [context.Process(target=run, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=SECONDS) for _ in processes)
    finally:
        for process in processes:
            process.join(SECONDS)
            process.kill()
    return [found[rank] for rank in range(count)]
