"""Packed documents: several documents in one row, isolated from each other."""

import torch
from torch import Tensor


def document_runs(documents: Tensor | None, x: Tensor) -> Tensor | None:
    """Number the documents of each row from 0, [B, L] int64.

    Args:
        documents: [B, L] integers, equal for all (consecutive) tokens of a document; or None.
        x: [B, L, ...], for its shape.

    Raises:
        ValueError: not integers, or not [B, L].
    """
    if documents is None:
        return None
    if documents.shape != x.shape[:2] or documents.is_floating_point():
        raise ValueError(
            f"documents must be integers {list(x.shape[:2])}, got {documents.dtype} "
            f"{list(documents.shape)}"
        )
    runs = torch.zeros(documents.shape, dtype=torch.int64, device=documents.device)
    runs[:, 1:] = (documents[:, 1:] != documents[:, :-1]).cumsum(1)
    return runs
