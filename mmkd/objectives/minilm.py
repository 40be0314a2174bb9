"""`minilm`: self-relations of the queries, keys and values of a layer, and query-key relations.

Let X be Q, K or V of a layer, split into A relation heads of width d, independent of the number of
attention heads:

    R_a = softmax(X_a X_a^T / sqrt(d))          [n, n]
    L   = sum over Q, K, V of 1 / (A n) sum_a sum_t KL(R_a^T[t] || R_a^S[t])

This is MiniLMv2 (Wang et al. 2021, arXiv 2012.15828, section 3): student and teacher may differ in
width and number of heads. Q, K and V are outputs of the projections, after the attention's own
norms of queries and keys (Qwen3-VL, Gemma 3), without its gate (Qwen3.5) and before the rotary
embedding. For a Mamba mixer they are C, B and x, before its convolution and after the norms that it
has taken over from the attention. As in the paper, relations are computed between all tokens of the
region in a sequence, whether the model attends to them or not; with `causal`, a token is related to
itself and to earlier tokens only. Sequences with only one token of the region are not counted.

The relation `query_key` is in the spirit of the attention distributions of MiniLM (Wang et al.
2020, arXiv 2002.10957, section 3.1):

    R_a = softmax(Q_a K_a^T / sqrt(d))          over the tokens t' <= t

A is then the number of attention heads, which must be equal in student and teacher, and each key
head is used for all query heads of its group. The papers' models have no rotary embedding. Here
queries and keys are compared before it, so that the relation has no positions.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmkd.objectives.base import Outcome
from mmkd.objectives.layer_settings import MiniLmConfig, MiniLmRelation, Projection
from mmkd.objectives.layerwise import Layerwise
from mmkd.objectives.signals import LayerSignals, Signals
from mmkd.objectives.targets import Targets

TILE_ELEMENTS = 2**22  # relations in memory at the same time


class MiniLm(Layerwise):
    config_class = MiniLmConfig
    relates_tokens = True
    config: MiniLmConfig

    @property
    def compares_widths(self) -> bool:
        return False

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indices of the compared layers; none if a model has no attention layer for `last`."""
        if self.config.layers != "last":
            return super().pairs
        theirs = self.config.teacher_layers or self.teacher_attention_layers[-1:]
        return list(zip(self.attention_layers[-1:], theirs, strict=False))

    def rows(self, targets: Targets) -> Tensor:
        """[B, T] bool: tokens of the region, in sequences that have at least two of them."""
        covered = targets.predicts(self.config.region)
        return covered & (covered.sum(1, keepdim=True) > 1)

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        if teacher is None:
            raise ValueError(f"objective {self.name!r} needs a teacher")
        pairs = self.pairs
        if not pairs:
            raise ValueError(f"objective {self.name!r} was built without attention layers")
        rows = self.rows(targets)
        total = torch.zeros((), device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            for mine, theirs in pairs:
                for kind in self.config.relations:
                    own = self._related(student.layers[mine], kind)
                    other = self._related(teacher.layers[theirs], kind)
                    causal = self.config.causal or kind == "query_key"
                    total = total + _relations(own, other, rows, causal)
        return Outcome(total / (count * len(pairs)))

    def _related(self, layer: LayerSignals, kind: MiniLmRelation) -> tuple[Tensor, Tensor]:
        """The tensors whose inner products are the relation, both [B, T, A, d]."""
        if kind == "query_key":
            return _attention_heads(layer)
        x = _projected(layer, kind)
        if x.shape[2] % self.config.heads:
            raise ValueError(f"{self.config.heads} relation heads do not divide width {x.shape[2]}")
        x = x.unflatten(2, (self.config.heads, -1))
        return x, x


def _projected(layer: LayerSignals, kind: Projection) -> Tensor:
    found: Tensor | None = getattr(layer, kind)
    if found is None:
        raise ValueError(f"minilm needs the {kind} of the layer")
    return found


def _attention_heads(layer: LayerSignals) -> tuple[Tensor, Tensor]:
    """Queries, and the keys that they are compared with, both [B, T, heads, d]."""
    queries, keys = _projected(layer, "queries"), _projected(layer, "keys")
    if layer.heads is None:
        raise ValueError("minilm needs the number of attention heads of the layer")
    queries = queries.unflatten(2, (layer.heads, -1))
    keys = keys.unflatten(2, (-1, queries.shape[3]))  # [B, T, key heads, d]
    return queries, keys.repeat_interleave(layer.heads // keys.shape[2], 2)


def _relations(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], rows: Tensor, causal: bool
) -> Tensor:
    """KL divergence of relations, summed over tokens and averaged over relation heads.

    Args:
        student, teacher: as from `MiniLm._related`, [B, T, A, d] with a d of each model's own.
        rows: [B, T] bool, the tokens to relate.
        causal: relate a token to itself and to earlier tokens only.
    """
    heads = student[0].shape[2]
    if teacher[0].shape[2] != heads:
        raise ValueError(f"{heads} heads of the student, {teacher[0].shape[2]} of the teacher")
    wide = torch.promote_types(
        torch.promote_types(student[0].dtype, teacher[0].dtype), torch.float32
    )
    total = student[0].new_zeros((), dtype=wide)
    for index, chosen in enumerate(rows):
        mine, theirs = (
            tuple(x[index][chosen].to(wide).transpose(0, 1) for x in pair)  # [A, n, d]
            for pair in (student, teacher)
        )
        for tile in _tiles(mine[0].shape[1], heads):
            total = total + checkpoint(_divergence, mine, theirs, tile, causal, use_reentrant=False)
    return total / heads


def _divergence(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], tile: slice, causal: bool
) -> Tensor:
    """Summed KL divergence of the relations between the tokens of a tile and all tokens."""
    mine, theirs = (
        _log_relation(a, b, tile, causal)
        for a, b in (student, (teacher[0].detach(), teacher[1].detach()))
    )
    terms = theirs.exp() * (theirs - mine)  # [A, tile, n]
    return (terms.masked_fill(_later(terms, tile), 0) if causal else terms).sum()


def _log_relation(a: Tensor, b: Tensor, tile: slice, causal: bool) -> Tensor:
    """log softmax(a b^T / sqrt(d)) for the tokens of a tile, [A, tile, n]; with `causal`, up to the
    last token of the tile."""
    scores = a[:, tile] @ (b[:, : tile.stop] if causal else b).transpose(1, 2) / a.shape[2] ** 0.5
    if causal:
        scores = scores.masked_fill(_later(scores, tile), -torch.inf)
    return scores.log_softmax(-1)


def _later(scores: Tensor, tile: slice) -> Tensor:
    """[tile, n] bool: the token of the column is later than the token of the row."""
    size = scores.shape[1:]
    return torch.ones(size, dtype=torch.bool, device=scores.device).triu(tile.start + 1)


def _tiles(tokens: int, heads: int) -> list[slice]:
    size = max(1, TILE_ELEMENTS // max(1, heads * tokens))
    return [slice(i, i + size) for i in range(0, tokens, size)]
