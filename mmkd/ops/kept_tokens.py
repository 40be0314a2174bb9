"""Which tokens of padded rows are kept, if some of them are left out."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeptTokens:
    """Columns of padded rows, from which shorter rows are made.

    Attributes:
        columns: [B, L] int64, columns of the [B, T]. The kept tokens of a row come first, in their
            order. The others are padding: columns of tokens that are not kept.
        real: [B, L] bool, False on padding.
    """

    columns: Tensor
    real: Tensor

    @classmethod
    def of(cls, keep: Tensor) -> "KeptTokens":
        """The shortest rows that hold all kept tokens.

        Args:
            keep: [B, T] bool, tokens that are kept; False on padding.
        """
        order = keep.logical_not().byte().argsort(dim=1, stable=True)  # [B, T]
        columns = order[:, : int(keep.sum(1).max())]
        return cls(columns, keep.gather(1, columns))

    def __call__(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, L, ...]."""
        rows = torch.arange(len(self.columns), device=self.columns.device)[:, None]
        return x[rows, self.columns]

    def keep(self, length: int) -> Tensor:
        """[B, T] bool, tokens that are kept.

        Args:
            length: T.
        """
        kept = self.real.new_zeros(len(self.real), length)
        return kept.scatter(1, self.columns, self.real)

    def new_columns(self, length: int) -> Tensor:
        """[B, T] int64: the column of each kept token in the shorter rows, 0 for other tokens.

        Args:
            length: T.
        """
        numbers = torch.arange(self.columns.shape[1], device=self.columns.device)
        found = self.columns.new_zeros(len(self.columns), length)
        return found.scatter(1, self.columns, numbers.expand_as(self.columns) * self.real)

    def truncate(self, batch_size: int) -> "KeptTokens":
        """The first `batch_size` rows."""
        return KeptTokens(self.columns[:batch_size], self.real[:batch_size])

    def to(self, device: torch.device) -> "KeptTokens":
        return KeptTokens(self.columns.to(device), self.real.to(device))
