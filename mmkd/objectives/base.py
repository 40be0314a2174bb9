"""Base class of objectives, and the tensors that they read.

An objective does not access a model. Its inputs are the `Signals` of student and teacher, the
`Targets` of the batch, and the number of rows (positions) that it covers in the global batch. With
that number, the loss of a stage is a mean per covered token over all ranks and accumulation steps,
and does not depend on the batch layout.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from mmkd.objectives.base_settings import Need, ObjectiveConfig, Region
from mmkd.objectives.chunks import Chunks
from mmkd.ops import CHUNK_BYTES, SparseRows

if TYPE_CHECKING:
    from mmkd.objectives.ensemble import Ensemble


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
class DecoderParts:
    """Modules of a decoder, from which objectives make modules of their own.

    Attributes:
        layers: the decoder layers.
        final_norm: the norm after the last one; None if it is not known.
        width: of the residual stream.
    """

    layers: Sequence[nn.Module]
    final_norm: nn.Module | None
    width: int


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


@dataclass(frozen=True)
class Targets:
    """Token ids, masks and labels of a batch. A mask marks tokens, not the positions that predict
    them.

    Attributes:
        input_ids: [B, T] int64.
        attention: [B, T] bool, False on padding.
        response: [B, T] bool, tokens of the assistant's turns, including the end of turn.
        vision: [B, T] bool, image tokens.
        vision_labels: [B, T] int64 or None, the token of the object's name for image tokens inside
            an object's box, -100 elsewhere.
        end_id: id of the end-of-turn token.
        background: [B, T] bool or None, tokens of a labelled image that are outside of all boxes.
        rejected: [B] bool or None, sequences with rejected answers: the second half of a batch of
            preference pairs.
        reference_logps: [B] or None, log-probabilities of the answers under the reference model of
            a preference objective.
        starts: [B, T] bool or None, first token of each record in packed rows.
        chunks: pieces of responses that student and teacher have in common, or None.
        sources: [B, T] int64 or None, index of the data source of a token's record.
        in_selected_sources: [B, T] bool or None, tokens of the records that the objective covers;
            None for all.
    """

    input_ids: Tensor
    attention: Tensor
    response: Tensor
    vision: Tensor
    vision_labels: Tensor | None = None
    background: Tensor | None = None
    end_id: int = 0
    rejected: Tensor | None = None
    reference_logps: Tensor | None = None
    starts: Tensor | None = None
    chunks: Chunks | None = None
    sources: Tensor | None = None
    in_selected_sources: Tensor | None = None

    def of(self, sources: frozenset[int] | None) -> "Targets":
        """The same targets, with regions restricted to the records of some data sources; None for
        all sources."""
        if sources is None:
            return self
        if self.sources is None:
            raise ValueError("the batch does not say which sources its records are from")
        wanted = torch.tensor(sorted(sources), device=self.sources.device)
        return replace(self, in_selected_sources=torch.isin(self.sources, wanted))

    def predicts(self, region: Region) -> Tensor:
        """[B, T] bool: the rows (positions) whose output distributions belong to a region.

        Position t predicts token t+1, so `response` begins at the last prompt token. `vision`
        covers the positions of the image tokens themselves (LLaVA-KD, arXiv 2410.16236, section
        3.2), and `all` covers every position except padding. Rejected answers and records of other
        data sources belong to no region.
        """
        if region == "vision":
            rows = self.vision
        elif region == "all":
            rows = self.attention
        elif region == "prompt":
            rows = self._before(self.attention & ~self.response & ~self.vision)
        else:
            rows = self._before(self.response)
        rows = rows if self.in_selected_sources is None else rows & self.in_selected_sources
        return rows if self.rejected is None else rows & ~self.rejected[:, None]

    def predicts_text(self) -> Tensor:
        """[B, T] bool: the rows whose next token is a text token of the same record."""
        return self._before(self.attention & ~self.vision)

    def predicts_answers(self) -> Tensor:
        """[B, T] bool: the rows that predict response tokens, including those of rejected
        answers."""
        return self._before(self.response)

    def _before(self, tokens: Tensor) -> Tensor:
        if self.starts is not None:
            tokens = tokens & ~self.starts  # the token before belongs to another record
        rows = torch.zeros_like(tokens)
        rows[:, :-1] = tokens[:, 1:]
        return rows & self.attention

    def next_ids(self) -> Tensor:
        """[B, T] int64: the next token at each position. The last column has no meaning."""
        return torch.roll(self.input_ids, -1, dims=1)


@dataclass(frozen=True)
class Outcome:
    """The value of an objective on one micro-batch.

    Attributes:
        loss: scalar, divided by the number of rows in the global batch. The sum over micro-batches
            and ranks is the mean over the global batch.
        metrics: further scalars with the same normalisation.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def scale_to_global_mean(mean: Tensor, rows: Tensor, count: float) -> Tensor:
    """Scale a mean over the rows of this micro-batch, so that the sum over micro-batches and ranks
    is the mean over the global batch.

    Args:
        mean: scalar, mean over `rows`.
        rows: [B, T] bool, the rows that the mean covers.
        count: number of rows in the global batch.
    """
    return mean * (rows.sum().double() / count).to(mean.dtype)


class Objective:
    """Base class of all objectives. A subclass sets `config_class` and implements `__call__`.

    Attributes:
        config_class: class of its settings.
        relates_tokens: the objective compares the tokens of a sequence with each other, so a
            sequence must hold one record only (no packing).
        relates_records: the objective compares records with each other, so a micro-batch must hold
            at least two, or a step if it `gathers`.
        any_vocabulary: the teacher may have another tokenizer, because the objective reads image
            tokens or chunks only.
        accepts_stored_rows: the objective can read the output distributions of a teacher's cache.
        own: modules whose parameters train with the student, made by `own_modules`; None if the
            objective has none.
        teacher: name of the teacher that it compares with, if there are several.
        sources: indices of the data sources whose records it covers; None for all.
        ensemble: all teachers, if the teacher's weight depends on the row; else None.
    """

    config_class: ClassVar[type[ObjectiveConfig]]
    relates_tokens: ClassVar[bool] = False
    relates_records: ClassVar[bool] = False
    any_vocabulary: ClassVar[bool] = False
    accepts_stored_rows: ClassVar[bool] = False

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        shared_vocabulary: int | None = None,
        mamba_layers: Sequence[int] = (),
        attention_layers: Sequence[int] = (),
        teacher_attention_layers: Sequence[int] = (),
        head_memory: int = CHUNK_BYTES,
        head_backend: str = "auto",
    ):
        """
        Args:
            config: an instance of `config_class`.
            shared_vocabulary: number of tokens that teacher and student share; None if their heads
                have the same size.
            mamba_layers: indices of the student's Mamba layers, which layer-wise objectives cover
                by default.
            attention_layers, teacher_attention_layers: indices of the layers that have attention,
                of the student and of its primary teacher.
            head_memory: bytes for the logits of a chunk of rows and the tensors computed from them.
            head_backend: "auto" or "torch", implementation of the losses on the head's output.
        """
        self.config = config
        self.shared_vocabulary = shared_vocabulary
        self.mamba_layers = list(mamba_layers)
        self.attention_layers = list(attention_layers)
        self.teacher_attention_layers = list(teacher_attention_layers)
        self.head_memory = head_memory
        self.head_backend = head_backend
        self.own: nn.Module | None = None
        self.teacher: str | None = None
        self.sources: frozenset[int] | None = None
        self.ensemble: Ensemble | None = None

    def for_teacher(
        self,
        teacher: str,
        weight: float,
        sources: frozenset[int] | None,
        ensemble: "Ensemble | None" = None,
    ) -> "Objective":
        """A copy of the objective for one of several teachers.

        Args:
            teacher: name of the teacher, which becomes part of the objective's name.
            weight: is multiplied with the objective's own weight.
            sources: indices of the data sources on which the teacher is used; None for all.
            ensemble: all teachers, if the weight depends on the row; else None.
        """
        made = copy.copy(self)
        changes = {"name": f"{self.name}.{teacher}", "weight": weight * self.config.weight}
        made.config = self.config.model_copy(update=changes)
        made.teacher, made.sources, made.ensemble = teacher, sources, ensemble
        return made

    @final
    @property
    def needs(self) -> frozenset[Need]:
        """The inputs that this objective requires, from its settings."""
        return self.config.needs

    @property
    def name(self) -> str:
        return self.config.metric_name

    @property
    def gathers(self) -> bool:
        """Whether it compares all records of a step; see `mmkd.objectives.gathered`."""
        return False

    @property
    def metric_names(self) -> list[str]:
        """Names of the metrics of its outcomes, if it can be one of several teachers' objectives:
        then they are 0 for a batch without the teacher's records."""
        return []

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indices of the decoder layers that it compares: (student layer, teacher layer)."""
        return []

    @property
    def compares_widths(self) -> bool:
        """Whether it compares decoder layers of equal widths."""
        return False

    @property
    def exits(self) -> list[Exit]:
        """The exits of the student that it reads."""
        return []

    def own_modules(self, student: DecoderParts, teacher: DecoderParts | None) -> nn.Module | None:
        """Make the modules that belong to the objective, such as a map between widths.

        They train with the student. They are a part of checkpoints, and neither of the student's
        folder nor of a release. The modules must be called in every forward pass, also if the
        batch has no rows, because processes gather sharded weights together.

        Args:
            student: its modules before the stage, with all weights. They must be copied to be used.
            teacher: those of the primary teacher; None if its model does not run.
        """
        return None

    @property
    def forced(self) -> Literal["mixer", "block"] | None:
        """Which part of the student's layers runs on the teacher's input; None for no part."""
        return None

    def rows(self, targets: Targets) -> Tensor:
        """[B, T] bool: the rows (positions) over which this objective averages."""
        raise NotImplementedError

    @final
    def counted_rows(self, targets: Targets) -> Tensor:
        """[B, T] bool: the rows over which the stage's mean is taken: those that it covers, or
        those that any teacher of a normalised ensemble covers.

        Args:
            targets: of all data sources.
        """
        shared = self.ensemble if self.ensemble and self.ensemble.normalize else self
        return self.rows(targets.of(shared.sources))

    @final
    @property
    def reads_hidden(self) -> tuple[Region, ...]:
        """Regions in which this objective reads the teacher's final hidden states, if it reads
        nothing else of the teacher; from its settings."""
        return self.config.reads_hidden

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        """Compute the loss of one micro-batch.

        Args:
            student: signals of the student.
            teacher: signals of the teacher; None if the objective needs none.
            targets: of the micro-batch.
            count: number of the objective's rows in the global batch.
        """
        raise NotImplementedError
