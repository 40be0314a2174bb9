"""Numerics under the objectives: they know tensors only."""

from mmkd.ops.cross_entropy import linear_cross_entropy
from mmkd.ops.divergence import KINDS, linear_divergence

__all__ = ["KINDS", "linear_cross_entropy", "linear_divergence"]
