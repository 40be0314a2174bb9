"""Where a live teacher's weights are."""

import torch
from transformers import PreTrainedModel

from mmkd.recipe import TeacherPlacement
from mmkd.runtime import distributed
from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.sharded import ShardedTeacher

SHARE = 0.4
"""Of a device's memory that a whole teacher may take: the rest is the student's."""


def choose_placement(
    wanted: TeacherPlacement, weights: int, device: torch.device
) -> TeacherPlacement:
    """The recipe's placement; `auto` spreads a teacher that takes too much of a device.

    Args:
        wanted: by the recipe.
        weights: bytes of the whole teacher.
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
    """The teacher, ready to run."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # bitsandbytes' packed weights cannot be cut into the pieces that DeepSpeed spreads.
    packed = wanted == "auto" and getattr(model, "is_quantized", False)
    placement = "replicated" if packed else choose_placement(wanted, weights, device)
    if placement == "replicated":
        return LiveTeacher(model, device)
    return ShardedTeacher(model, device, offload=placement == "offload")
