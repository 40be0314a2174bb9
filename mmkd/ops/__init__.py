"""Numerical functions of the objectives and the mixers. They work on plain tensors.

The scan, the convolution and the experts are part of `mmkd_models`, whose files are copied into
student folders. They are imported when they are first used, because `mmkd_models` imports
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmkd.ops.cross_entropy import linear_cross_entropy
from mmkd.ops.divergence import linear_divergence
from mmkd.ops.gram import gram_inner
from mmkd.ops.head_losses import CHUNK_BYTES, head_losses
from mmkd.ops.kept_tokens import KeptTokens
from mmkd.ops.likelihood import BinaryKind, binary_divergence
from mmkd.ops.pair_loss import linear_pair_loss
from mmkd.ops.row_kl import row_kl
from mmkd.ops.set_logps import set_logps
from mmkd.ops.sinkhorn import linear_sinkhorn
from mmkd.ops.terms import DIVERGENCES, Head, HeadLoss, SparseRows
from mmkd.ops.token_logps import token_logps
from mmkd.ops.uld import linear_uld

__all__ = [
    "CHUNK_BYTES",
    "DIVERGENCES",
    "BinaryKind",
    "Head",
    "HeadLoss",
    "KeptTokens",
    "Routing",
    "SparseRows",
    "balance_loss",
    "binary_divergence",
    "causal_conv",
    "causal_conv_step",
    "expert_ffn",
    "gram_inner",
    "head_losses",
    "linear_cross_entropy",
    "linear_divergence",
    "linear_pair_loss",
    "linear_sinkhorn",
    "linear_uld",
    "route",
    "row_kl",
    "set_logps",
    "ssd_matrix",
    "ssd_scan",
    "ssd_step",
    "token_logps",
    "z_loss",
]

if TYPE_CHECKING:
    from mmkd_models.experts import Routing, balance_loss, expert_ffn, route, z_loss
    from mmkd_models.scan import causal_conv, causal_conv_step, ssd_matrix, ssd_scan, ssd_step

_LAZY = {
    "mmkd_models.experts": ("Routing", "balance_loss", "expert_ffn", "route", "z_loss"),
    "mmkd_models.scan": (
        "causal_conv",
        "causal_conv_step",
        "ssd_matrix",
        "ssd_scan",
        "ssd_step",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
