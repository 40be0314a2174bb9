"""Processor, GPUs, and the kernels that run on them."""

import importlib
import importlib.metadata
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from mmkd.commands.doctor.isolated import Finding
from mmkd.errors import one_line

GIB = 2**30
SLOW = "set precision to auto or float32 in the recipe"
TORCH_PATH = "torch's own path runs in its place"


def cpu() -> list[Finding]:
    import torch

    from mmkd.engines import choose_precision
    from mmkd.runs.provenance import processor_name

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    able = torch.cpu.get_capabilities()
    there = ", ".join(name for name in ("avx512_bf16", "amx_bf16") if able.get(name))
    found = [Finding("ok", f"{cores} cores, {torch.get_num_threads()} threads, {processor_name()}")]
    if choose_precision("auto", torch.device("cpu")) == "bfloat16":
        half = Finding("ok", f"multiplied in hardware ({there})", name="CPU bfloat16")
    else:
        slow = "several times slower than float32 here"
        half = Finding("missing", slow, SLOW, name="CPU bfloat16")
    return [*found, half]


def memory() -> list[Finding]:
    import torch

    from mmkd.runtime.distributed import memory_of

    whole = f"{memory_of(torch.device('cpu')) / GIB:.1f} GiB"
    free = _available()
    return [Finding("ok", whole if free is None else f"{whole}, {free / GIB:.1f} GiB available")]


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable")), None)
    return None if kib is None else int(kib) * 1024


def gpus() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        return [_gpu(number) for number in range(torch.cuda.device_count())]
    if shutil.which("nvidia-smi") is None:
        return [Finding("missing", "no NVIDIA driver: everything runs on the CPU")]
    if torch.version.cuda is None:
        detail = f"there is a driver, and torch {torch.__version__} is built without CUDA"
        return [Finding("broken", detail, "pip install --force-reinstall torch")]
    try:
        torch.cuda.init()
        reason = "torch finds no GPU"
    except Exception as error:
        reason = one_line(error)
    hidden = "CUDA_VISIBLE_DEVICES" in os.environ
    return [Finding("broken", reason, "unset CUDA_VISIBLE_DEVICES" if hidden else "nvidia-smi")]


def _gpu(number: int) -> Finding:
    import torch

    from mmkd.engines import choose_precision

    device = torch.device("cuda", number)
    free, whole = torch.cuda.mem_get_info(device)
    major, minor = torch.cuda.get_device_capability(device)
    half = choose_precision("auto", device) == "bfloat16"
    detail = (
        f"{torch.cuda.get_device_name(device)}, {whole / GIB:.0f} GiB, {free / GIB:.0f} GiB free, "
        f"compute capability {major}.{minor}, {'bfloat16' if half else 'no bfloat16'}"
    )
    return Finding("ok", detail, "" if half else SLOW, name=f"GPU {number}")


def backends() -> list[Finding]:
    """What connects the processes of a run."""
    import torch
    import torch.distributed as dist

    there = {"gloo": dist.is_available() and dist.is_gloo_available()}
    if torch.cuda.is_available():
        there["nccl"] = dist.is_available() and dist.is_nccl_available()
    lost = [name for name, found in there.items() if not found]
    if lost:
        return [Finding("missing", f"torch has no {', '.join(lost)}")]
    return [Finding("ok", ", ".join(there))]


def kernel(package: str) -> list[Finding]:
    """A package of CUDA kernels, by what the student's own code takes from it."""
    from mmkd_models import kernels

    wanted = {
        name: module for name, (owner, module) in kernels.PACKAGES.items() if owner == package
    }
    if all(find_spec(module.split(".")[0]) is None for module in wanted.values()):
        return [Finding("missing", f"for CUDA; {TORCH_PATH}")]
    for name in wanted:
        found = kernels.load(name)
        if isinstance(found, Exception):
            return [Finding("broken", f"{name}: {one_line(found)}; {TORCH_PATH}")]
    return [Finding("ok", f"{_version(package)}: {', '.join(wanted)}")]


def triton() -> list[Finding]:
    if find_spec("triton") is None:
        return [Finding("missing", "comes with torch for CUDA; mamba-ssm needs it")]
    importlib.import_module("triton.language")
    return [Finding("ok", _version("triton"))]


def flash_attention() -> list[Finding]:
    if find_spec("flash_attn") is None:
        return [Finding("missing", "only attn_implementation: flash_attention_2 needs it")]
    importlib.import_module("flash_attn")
    return [Finding("ok", _version("flash-attn"))]


def grouped_product() -> list[Finding]:
    """torch's product of all experts at once, run on the device that training takes."""
    import torch
    import torch.nn.functional as F

    from mmkd.runtime.distributed import choose_device
    from mmkd_models.experts import expert_ffn, route

    if not hasattr(F, "grouped_mm"):
        return [Finding("missing", "sparse students on a GPU in bfloat16 need it")]
    device = choose_device("auto")
    x = torch.ones(16, 32, dtype=torch.bfloat16, device=device)
    weights = torch.ones(2, 32, 32, dtype=torch.bfloat16, device=device, requires_grad=True)
    routing = route(x[:, :2].float(), 1)
    made = expert_ffn(x, routing, weights, weights, activation=F.relu, backend="grouped")
    made.sum().backward()
    if not made.eq(32 * 32).all():
        return [Finding("broken", f"wrong products on {device.type}")]
    return [Finding("ok", f"torch {torch.__version__}, ran on {device.type}")]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"
