"""Linear maps of objectives, between the widths of two models."""

from typing import Any

import torch
from torch import Tensor, nn


def linear_map(width: int, to: int) -> nn.Linear:
    """A linear map without bias. It begins as the identity for equal widths, and otherwise as a
    random one that keeps the inner products of the narrower side (it is semi-orthogonal).

    Args:
        width, to: width of its input and of its output.
    """
    made = nn.Linear(width, to, bias=False, dtype=torch.float32)
    if width == to:
        nn.init.eye_(made.weight)
    else:
        nn.init.orthogonal_(made.weight)
    return made


def apply_map(module: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a map to hidden states of any dtype, [..., width], in the precision of its weight;
    returns float32."""
    own: Any = module
    with torch.autocast(hidden.device.type, enabled=False):
        return own(hidden.to(own.weight.dtype)).float()
