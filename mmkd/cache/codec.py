"""Encoding of a row: the k most likely tokens, their log-probabilities, the others' probability.

    k ids          ceil(log2 V) bits each, the likeliest token first
    k - 1 logs     -log p of the others in 12 bits: 3 of exponent, 9 of mantissa
    rest           -log of the mass of all other tokens in 16 bits: 4 and 12

The likeliest token's probability is what is left of 1. At V = 152,000 and k = 34 a row has 1,024
bits, 128 bytes. No p but the first is above 1/2, so that 2^-1 ... 2^7 hold all that matters of
their -log p, to 2^-10 of itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WORD = 64
LEAST = 1e-30


@dataclass(frozen=True)
class Float:
    """A positive number by its exponent from `low` on and some bits of its mantissa."""

    low: int
    exponent_bits: int
    mantissa_bits: int

    @property
    def bits(self) -> int:
        return self.exponent_bits + self.mantissa_bits

    def levels(self, x: np.ndarray) -> np.ndarray:
        """uint64 levels of float32 numbers, rounded; what is out of range goes to its end."""
        shift = 23 - self.mantissa_bits
        raw = np.maximum(x, 0).astype(np.float32).view(np.uint32).astype(np.int64)
        levels = (raw - self._base + (1 << (shift - 1))) >> shift
        return np.clip(levels, 0, (1 << self.bits) - 1).astype(np.uint64)

    def numbers(self, levels: np.ndarray) -> np.ndarray:
        """float32 numbers of levels."""
        raw = (levels.astype(np.int64) << (23 - self.mantissa_bits)) + self._base
        return raw.astype(np.uint32).view(np.float32)

    @property
    def _base(self) -> int:
        return int(np.array(2.0**self.low, dtype=np.float32).view(np.uint32))


OTHERS = Float(low=-1, exponent_bits=3, mantissa_bits=9)
REST = Float(low=-10, exponent_bits=4, mantissa_bits=12)


@dataclass(frozen=True)
class RowCodec:
    """Encodes and decodes rows.

    Attributes:
        vocabulary: size of the vocabulary.
        k: tokens that are kept, at most `vocabulary`.
    """

    vocabulary: int
    k: int

    @property
    def widths(self) -> list[int]:
        """Bits of each field, in order."""
        ids = max(1, (self.vocabulary - 1).bit_length())
        return [ids] * self.k + [OTHERS.bits] * (self.k - 1) + [REST.bits]

    @property
    def words(self) -> int:
        """64-bit words of a row."""
        return -(-sum(self.widths) // WORD)

    def encode(self, ids: Tensor, log_probs: Tensor, rest: Tensor) -> np.ndarray:
        """Pack rows.

        Args:
            ids: [n, k] int64, in order of decreasing probability.
            log_probs: [n, k].
            rest: [n], total probability of all other tokens.

        Returns:
            [n, words] uint64.
        """
        others = OTHERS.levels(-log_probs[:, 1:].double().cpu().numpy())
        left = REST.levels(-np.log(rest.double().clamp(min=LEAST).cpu().numpy()))
        columns = [*ids.cpu().numpy().astype(np.uint64).T, *others.T, left]
        packed = np.zeros((len(ids), self.words), dtype=np.uint64)
        for (word, at, width), values in zip(self._places(), columns, strict=True):
            packed[:, word] |= values << np.uint64(at)
            if at + width > WORD:
                packed[:, word + 1] |= values >> np.uint64(WORD - at)
        return packed

    def decode(self, packed: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Ids [n, k] int64, log-probabilities [n, k] and log of the rest [n], float32."""
        columns = []
        for word, at, width in self._places():
            values = packed[:, word] >> np.uint64(at)
            if at + width > WORD:
                values = values | packed[:, word + 1] << np.uint64(WORD - at)
            columns.append(values & np.uint64((1 << width) - 1))
        ids = np.stack(columns[: self.k], 1).astype(np.int64)
        log_rest = -REST.numbers(columns[-1])
        logs = np.empty((len(packed), self.k), dtype=np.float32)
        if self.k > 1:
            logs[:, 1:] = -OTHERS.numbers(np.stack(columns[self.k : -1], 1))
        told = np.exp(logs[:, 1:].astype(np.float64)).sum(1) + np.exp(log_rest.astype(np.float64))
        floor = np.exp(logs[:, 1].astype(np.float64)) if self.k > 1 else np.full(len(packed), LEAST)
        logs[:, 0] = np.log(np.maximum(1 - told, floor))
        return torch.from_numpy(ids), torch.from_numpy(logs), torch.from_numpy(log_rest)

    def _places(self) -> Iterator[tuple[int, int, int]]:
        """Word, bit in it and width of each field."""
        bit = 0
        for width in self.widths:
            yield bit // WORD, bit % WORD, width
            bit += width
