"""Checks of losses on a head's output, and of the tensors that they read."""

import math

import torch
from torch import Tensor

from mmkd.ops.terms import KINDS, WITH_LABELS, Head, HeadLoss, SparseRows


def check(loss: HeadLoss, student: Head, teacher: Head | SparseRows | None) -> None:
    """
    Raises:
        ValueError: an unknown kind, a setting out of range, or shapes that do not match.
    """
    rows, size = student.hidden.shape[0], student.weight.shape[0]
    if student.hidden.dim() != 2:
        raise ValueError(f"hidden states must be [N, H], got {list(student.hidden.shape)}")
    _check_rows(loss, rows)
    if loss.kind == "ce":
        return
    _check_settings(loss)
    if teacher is None:
        raise ValueError(f"{loss.kind} needs a teacher")
    if isinstance(teacher, SparseRows):
        _check_stored(loss, teacher, rows)
        return
    if teacher.hidden.shape[0] != rows:
        raise ValueError(f"{rows} student rows but {teacher.hidden.shape[0]} teacher rows")
    smaller = min(size, teacher.weight.shape[0])
    if loss.vocab_size is None and size != teacher.weight.shape[0]:
        raise ValueError(
            f"the heads have {size} (student) and {teacher.weight.shape[0]} (teacher) rows: give "
            "vocab_size, the number of tokens that both share"
        )
    if loss.vocab_size is not None and not 0 < loss.vocab_size <= smaller:
        raise ValueError(f"vocab_size is {loss.vocab_size}, it must be between 1 and {smaller}")


def _check_rows(loss: HeadLoss, rows: int) -> None:
    mask, weights = loss.mask, loss.row_weights
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (rows,)):
        raise ValueError(f"mask must be bool [{rows}], got {mask.dtype} {list(mask.shape)}")
    if weights is not None and (not weights.is_floating_point() or weights.shape != (rows,)):
        raise ValueError(
            f"row_weights must be floating point [{rows}], got {weights.dtype} "
            f"{list(weights.shape)}"
        )
    if loss.kind in ("ce", *WITH_LABELS) and _shape(loss.targets) != (rows,):
        raise ValueError(f"{loss.kind} needs targets [{rows}]")


def _shape(x: Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else tuple(x.shape)


def _check_settings(loss: HeadLoss) -> None:
    if loss.kind not in KINDS:
        raise ValueError(f"unknown divergence {loss.kind!r}, known: {', '.join(KINDS[1:])}")
    part = loss.teacher_part
    if loss.temperature <= 0:
        raise ValueError(f"temperature is {loss.temperature}, it must be positive")
    if part.temperature <= 0:
        raise ValueError(f"the teacher's temperature is {part.temperature}, it must be positive")
    if part.top_k is not None and part.top_k < 1:
        raise ValueError(f"top_k is {part.top_k}, it must be at least 1")
    if part.top_p is not None and not 0 < part.top_p <= 1:
        raise ValueError(f"top_p is {part.top_p}, it must be in (0, 1]")
    if part.rest not in ("cell", "drop"):
        raise ValueError(f"rest is {part.rest!r}, it must be cell or drop")
    if not 0 <= loss.beta <= 1:
        raise ValueError(f"beta is {loss.beta}, it must be in [0, 1]")
    if loss.kind == "alpha":
        if not math.isfinite(loss.alpha):
            raise ValueError(f"alpha is {loss.alpha}, it must be finite")
    elif not 0 <= loss.alpha < 1:
        raise ValueError(f"alpha is {loss.alpha}, it must be in [0, 1)")
    if loss.kappa == 0 or math.isnan(loss.kappa):
        raise ValueError(f"kappa is {loss.kappa}, it must not be 0")
    if not 0 < loss.gamma < math.inf:
        raise ValueError(f"gamma is {loss.gamma}, it must be positive and finite")


def _check_stored(loss: HeadLoss, teacher: SparseRows, rows: int) -> None:
    part = loss.teacher_part
    if part.temperature != 1 and part.rest == "cell":
        raise ValueError(
            f"stored rows are of temperature 1, the loss asks for {part.temperature}: take "
            "rest='drop', which needs no probability of the other tokens"
        )
    if part.top_k is not None and part.top_k > teacher.ids.shape[1]:
        raise ValueError(f"top_k is {part.top_k}, stored rows have {teacher.ids.shape[1]} tokens")
    if teacher.at.shape != (rows,):
        raise ValueError(f"stored rows are for {len(teacher.at)} rows, the batch has {rows}")
    wanted = teacher.at if loss.mask is None else teacher.at[loss.mask]
    if bool((wanted < 0).any()):
        raise ValueError(f"{int((wanted < 0).sum())} rows of {loss.kind} are not stored")
