"""`minilm`: self-relations of the queries, keys and values of a layer.

Let X be Q, K or V of a layer, split into A relation heads of width d, independent of the number of
attention heads:

    R_a = softmax(X_a X_a^T / sqrt(d))          [n, n]
    L   = sum over Q, K, V of 1 / (A n) sum_a sum_t KL(R_a^T[t] || R_a^S[t])

This is MiniLMv2 (Wang et al. 2021, arXiv 2012.15828, section 3): student and teacher may differ in
width and number of heads. Q, K and V are outputs of the projections, after the attention's own
norms of queries and keys (Qwen3-VL, Gemma 3), without its gate (Qwen3.5) and before the rotary
embedding. For a Mamba mixer they are C, B and x, before its convolution and after the norms that it
has taken over from the attention. As in the paper, relations are computed between all tokens of the
region in a sequence, whether the model attends to them or not. Sequences with only one token of the
region are not counted.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmkd.objectives.base import LayerSignals, Outcome, Signals, Targets
from mmkd.objectives.layerwise import Layerwise
from mmkd.objectives.settings import MiniLmConfig, Projection

TILE_ELEMENTS = 2**22  # relations in memory at the same time


class MiniLm(Layerwise):
    config_class = MiniLmConfig
    relates_tokens = True
    config: MiniLmConfig
    compares_widths = False

    def rows(self, targets: Targets) -> Tensor:
        """[B, T] bool: tokens of the region, in sequences that have at least two of them."""
        covered = targets.predicts(self.config.region)
        return covered & (covered.sum(1, keepdim=True) > 1)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if teacher is None:
            raise ValueError(f"objective {self.name!r} needs a teacher")
        rows = self.rows(targets)
        total = torch.zeros((), device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            for mine, theirs in self.pairs:
                for kind in self.config.relations:
                    own = _projected(student.layers[mine], kind)
                    other = _projected(teacher.layers[theirs], kind)
                    total = total + self._relations(own, other, rows)
        return Outcome(total / (count * len(self.pairs)))

    def _relations(self, student: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
        """KL divergence of relations, summed over tokens and averaged over relation heads.

        Args:
            student, teacher: [B, T, D], D may differ.
            rows: [B, T] bool, the tokens to relate.
        """
        wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        total = student.new_zeros((), dtype=wide)
        for mine, theirs, chosen in zip(student, teacher, rows, strict=True):
            pair = [self._heads(x[chosen].to(wide)) for x in (mine, theirs)]  # [A, n, d]
            for tile in _tiles(pair[0].shape[1], self.config.heads):
                total = total + checkpoint(_divergence, *pair, tile, use_reentrant=False)
        return total / self.config.heads

    def _heads(self, x: Tensor) -> Tensor:
        if x.shape[1] % self.config.heads:
            raise ValueError(f"{self.config.heads} relation heads do not divide width {x.shape[1]}")
        return x.unflatten(1, (self.config.heads, -1)).transpose(0, 1)


def _projected(layer: LayerSignals, kind: Projection) -> Tensor:
    found: Tensor | None = getattr(layer, kind)
    if found is None:
        raise ValueError(f"minilm needs the {kind} of the layer")
    return found


def _divergence(student: Tensor, teacher: Tensor, tile: slice) -> Tensor:
    """Summed KL divergence of the relations between the tokens of a tile and all tokens."""
    mine, theirs = (
        (x[:, tile] @ x.transpose(1, 2) / x.shape[2] ** 0.5).log_softmax(-1)  # [A, tile, n]
        for x in (student, teacher.detach())
    )
    return (theirs.exp() * (theirs - mine)).sum()


def _tiles(tokens: int, heads: int) -> list[slice]:
    size = max(1, TILE_ELEMENTS // max(1, heads * tokens))
    return [slice(i, i + size) for i in range(0, tokens, size)]
