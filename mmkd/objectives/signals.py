"""The tensors of student and teacher that objectives read."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.ops import SparseRows


@dataclass(frozen=True)
class LayerSignals:
    """Tensors of one decoder layer.

    Attributes:
        mixer_input: [B, T, H], input of the attention or of the Mamba mixer.
        mixer_heads: [B, T, heads * P], input of its output projection.
        mixer_output: [B, T, H], its output.
        block_input, block_output: [B, T, H], the residual stream before and after the layer; None
            if only the mixer ran.
        matrix: [B, heads, T, T] or None, attention probabilities, or the mixing matrix of a mixer.
        queries, keys, values: [B, T, D] or None, after the attention's own norms and before the
            rotary embedding. D may differ between the three.
        heads: number of attention heads of the queries; None if queries are not recorded, or their
            heads are not known.
    """

    mixer_input: Tensor
    mixer_heads: Tensor
    mixer_output: Tensor
    block_input: Tensor | None = None
    block_output: Tensor | None = None
    matrix: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None
    heads: int | None = None

    def truncate(self, batch_size: int) -> "LayerSignals":
        """Keep the first `batch_size` sequences of each tensor."""
        return self.map(lambda x: x[:batch_size])

    def map(self, change: Callable[[Tensor], Tensor]) -> "LayerSignals":
        """Apply a function to each tensor."""
        tensors: dict[str, Any] = {
            name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True)
class Exit:
    """A place after a decoder layer of the student where the output head is read.

    Attributes:
        layer: index of the decoder layer.
        block: a further decoder layer, which runs on the layer's output; None for none.
        norm: is applied last, in place of the decoder's final norm; None for the final norm.
    """

    layer: int
    block: nn.Module | None = None
    norm: nn.Module | None = None


@dataclass(frozen=True)
class ExitSignals:
    """What an exit reads.

    Attributes:
        hidden: [B, T, H], the input of the output head.
        share: share of the decoder's layers that have run.
    """

    hidden: Tensor
    share: float


@dataclass(frozen=True)
class RouterSignals:
    """Tensors of one sparse layer.

    Attributes:
        logits: [B, T, E] float32, the router's logits.
        top_k: number of experts per token.
    """

    logits: Tensor
    top_k: int


@dataclass(frozen=True)
class Signals:
    """Tensors of one model, captured in one forward pass.

    Attributes:
        hidden: [B, T, H], final hidden states, the input of the output head. H is 0 if no objective
            reads them, and the forward pass stopped after the last layer that is read.
        head_weight: [V, H].
        head_bias: [V] or None.
        embeddings: [B, T, H], the decoder's input: word embeddings, and the connector's output at
            image tokens.
        layers: by index, the decoder layers that objectives read.
        forced_mixers: the same for mixers that ran on the input of the teacher's mixer.
        forced_blocks: the same for layers that ran on the input of the teacher's layer.
        routers: sparse layers by index.
        own_hidden: [B, T', H] or None, final hidden states at the teacher's own tokens, if its
            tokens differ from the student's. `hidden` is then aligned with the student's tokens.
        exits: the exits that objectives read.
    """

    hidden: Tensor
    head_weight: Tensor
    head_bias: Tensor | None = None
    embeddings: Tensor | None = None
    layers: dict[int, LayerSignals] = field(default_factory=dict)
    forced_mixers: dict[int, LayerSignals] = field(default_factory=dict)
    forced_blocks: dict[int, LayerSignals] = field(default_factory=dict)
    routers: dict[int, RouterSignals] = field(default_factory=dict)
    own_hidden: Tensor | None = None
    exits: dict[Exit, ExitSignals] = field(default_factory=dict)

    def detached(self) -> "Signals":
        """The same signals, with the head's weight and bias detached from the graph."""
        bias = None if self.head_bias is None else self.head_bias.detach()
        return replace(self, head_weight=self.head_weight.detach(), head_bias=bias)

    def truncate(self, batch_size: int) -> "Signals":
        """Keep the first `batch_size` sequences of each tensor."""
        if len(self.hidden) == batch_size:
            return self
        return self._map(lambda x: x[:batch_size])

    def to(self, device: torch.device) -> "Signals":
        """Move all tensors except the head's to a device."""
        return self._map(lambda x: x.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Signals":
        """Apply a function to each tensor except the head's."""
        return replace(
            self,
            hidden=change(self.hidden),
            embeddings=None if self.embeddings is None else change(self.embeddings),
            layers={i: layer.map(change) for i, layer in self.layers.items()},
            forced_mixers={i: layer.map(change) for i, layer in self.forced_mixers.items()},
            forced_blocks={i: layer.map(change) for i, layer in self.forced_blocks.items()},
            routers={i: replace(r, logits=change(r.logits)) for i, r in self.routers.items()},
            own_hidden=None if self.own_hidden is None else change(self.own_hidden),
            exits={p: replace(read, hidden=change(read.hidden)) for p, read in self.exits.items()},
        )


@dataclass(frozen=True)
class StoredSignals:
    """A teacher's outputs for a batch, read from its cache.

    Attributes:
        rows: output distributions at the stored positions of the [B * T].
        signals: final hidden states at the stored positions, zeros elsewhere, with a head that
            gives the same inner products of logits as the teacher's; None if the cache contains no
            hidden states.
    """

    rows: SparseRows
    signals: Signals | None = None

    def truncate(self, batch_size: int) -> "StoredSignals":
        """Returns itself: sequences that only fill up a batch are not in the cache."""
        return self

    def to(self, device: torch.device) -> "StoredSignals":
        """Move the final hidden states to a device. The distributions belong to the batch."""
        return replace(self, signals=None if self.signals is None else self.signals.to(device))


TeacherSignals = Signals | StoredSignals
