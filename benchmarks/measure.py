"""Time and peak memory, as all benchmarks here measure them."""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmkd.runtime.files import write_json
from mmkd.runtime.progress import console


def median_seconds(methods: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median time of each method, one call of each in turn; a first round warms up."""
    return {name: statistics.median(taken) for name, taken in seconds(methods, repeats).items()}


def seconds(methods: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Times of each method, one call of each in turn; a first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for repeat in range(repeats + 1):
        for name, call in methods.items():
            start = _now()
            call()
            if repeat:
                times[name].append(_now() - start)
    return times


def ratio_quartiles(times: Mapping[str, list[float]], name: str) -> dict[str, list[float]]:
    """Quartiles of one method's time divided by each other method's of the same round. What else
    runs on the machine slows both down."""
    return {
        other: statistics.quantiles([a / b for a, b in zip(times[name], taken, strict=True)])
        for other, taken in times.items()
        if other != name
    }


def _now() -> float:
    """Seconds, when a GPU in use has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Collectives(TorchDispatchMode):
    """Inside, counts the collectives of this process, whoever calls them.

    Attributes:
        counts: by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.counts[func._opname.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def peak_bytes(make: Callable[..., Callable[[], Any]], size: tuple, small: tuple) -> int:
    """Growth of the peak resident size during `make(*size)()`, in a fresh process.

    Where a GPU is in use, growth of the peak of what tensors take there, in this process.

    Args:
        make: importable; builds the inputs and returns what is measured.
        size: its arguments.
        small: arguments for a call before it, so that no library is loaded while measuring.
    """
    if torch.cuda.is_initialized():
        return _peak(make, size, small, torch.get_num_threads())
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (make, size, small, torch.get_num_threads()))


def _peak(make: Callable[..., Callable[[], Any]], size: tuple, small: tuple, threads: int) -> int:
    torch.set_num_threads(threads)
    make(*small)()
    call = make(*size)
    if torch.cuda.is_initialized() and torch.cuda.memory_allocated():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - held
    Path("/proc/self/clear_refs").write_text("5")  # the high water falls to what is resident now
    before = _status("VmHWM")
    call()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """Bytes that /proc says of this process (Linux). getrusage's peak is inherited from the
    parent process, this one is not."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(s.split()[1]) * 1024 for s in lines if s.startswith(name))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    models = [s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def save(args: argparse.Namespace, **record: Any) -> None:
    """Write settings, machine and what was measured to `args.json`, or print them."""
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "out")}
    record = {"settings": settings, "machine": machine(), **record}
    if args.json:
        write_json(args.json, record)
        console.print(f"wrote {args.json}", highlight=False)
    else:
        print(json.dumps(record))
