"""DeepSpeed's start, and what student and teacher need to be run by it."""

import logging
import os
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mmkd.runtime import distributed

_group: Any = None


def start(device: torch.device) -> Any:
    """DeepSpeed itself, with its processes connected."""
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if device.type == "cpu":
        # Else it compiles a communication op for minutes; gloo does without.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    from deepspeed.comm.torch import TorchBackend

    # Its own groups would wait for half an hour, whatever the recipe says.
    TorchBackend.new_group = lambda self, ranks: distributed.new_group(ranks)
    # DeepSpeed calls functions of torch.distributed that torch 2.13 has renamed.
    warnings.filterwarnings("ignore", message=".*torch.distributed", category=FutureWarning)
    os.environ.setdefault("LOCAL_RANK", "0")
    distributed.connect(device, alone=True)
    _forget_old_groups()
    deepspeed.init_distributed(auto_mpi_discovery=False)
    return deepspeed


def _forget_old_groups() -> None:
    """DeepSpeed keeps its copy of the group of all processes, even when that has ended and another
    one has begun."""
    global _group
    from deepspeed.utils import groups

    if dist.group.WORLD is not _group:
        groups._WORLD_GROUP = None
        _group = dist.group.WORLD


def gathered(parameters: list[nn.Parameter], *, changed: bool = False) -> AbstractContextManager:
    """Parameters that stage 3 has spread, whole inside; `changed` keeps what rank 0 writes."""
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters, modifier_rank=0 if changed else None)
