"""Numerics under the objectives and the mixers: they know tensors only.

The scan and the convolution live where they can travel with a student's weights.
"""

from mmkd.ops.cross_entropy import linear_cross_entropy
from mmkd.ops.divergence import KINDS, linear_divergence
from mmkd.ops.gram import gram_inner
from mmkd_models.scan import causal_conv, causal_conv_step, ssd_matrix, ssd_scan, ssd_step

__all__ = [
    "KINDS",
    "causal_conv",
    "causal_conv_step",
    "gram_inner",
    "linear_cross_entropy",
    "linear_divergence",
    "ssd_matrix",
    "ssd_scan",
    "ssd_step",
]
