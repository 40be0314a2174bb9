"""Placement of a live teacher's weights: replicated, sharded or offloaded to the CPU."""

import torch
from transformers import PreTrainedModel

from mmkd.recipe import TeacherPlacement
from mmkd.runtime import distributed
from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.sharded import ShardedTeacher

SHARE = 0.4
"""Largest share of a device's memory for a replicated teacher. The rest is for the student."""


def choose_placement(
    wanted: TeacherPlacement, weights: int, device: torch.device
) -> TeacherPlacement:
    """Resolve `auto`: a teacher that is too large for one device is sharded.

    Args:
        wanted: the recipe's placement.
        weights: size of the teacher's weights in bytes.
        device: of this rank.
    """
    if wanted != "auto":
        return wanted
    if weights <= SHARE * distributed.memory_of(device):
        return "replicated"
    return "sharded" if distributed.world_size() > 1 else "offload"


def place_teacher(
    model: PreTrainedModel, wanted: TeacherPlacement, device: torch.device
) -> LiveTeacher:
    """Place a model's weights, and return the teacher."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # DeepSpeed cannot shard the packed weights of bitsandbytes.
    packed = wanted == "auto" and getattr(model, "is_quantized", False)
    placement = "replicated" if packed else choose_placement(wanted, weights, device)
    if placement == "replicated":
        return LiveTeacher(model, device)
    return ShardedTeacher(model, device, offload=placement == "offload")
