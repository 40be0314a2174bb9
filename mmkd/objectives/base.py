"""What an objective is: tensors in, one scalar and named metrics out.

An objective never sees a model. It gets the student's and the teacher's `Signals`, the batch's
`Targets`, and the number of covered rows in the global batch, so that the loss of a stage is a mean
per covered token over all ranks and accumulation steps, whatever the batch layout.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from mmkd.objectives.chunks import Chunks
from mmkd.objectives.settings import Need, ObjectiveConfig, Region
from mmkd.ops import CHUNK_BYTES, SparseRows


@dataclass(frozen=True)
class LayerSignals:
    """Read off one decoder layer.

    Attributes:
        mixer_input: [B, T, H], what enters the attention or the mixer.
        mixer_heads: [B, T, heads * P], what enters its output projection.
        mixer_output: [B, T, H], what it returns.
        block_input, block_output: [B, T, H], the layer's residual stream before and after; None
            where the mixer ran alone.
        matrix: [B, heads, T, T] or None, how tokens mix: attention's probabilities, or a mixer's
            matrix.
        queries, keys, values: [B, T, D] or None, as the attention compares them: after its norms,
            before positions are rotated in; D may differ.
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

    def first(self, rows: int) -> "LayerSignals":
        """The same of a batch's first rows."""
        return replace(self, **{n: x[:rows] for n, x in vars(self).items() if x is not None})


@dataclass(frozen=True)
class RouterSignals:
    """Read off one sparse layer.

    Attributes:
        logits: [B, T, E] float32, the router's scores of the experts.
        top_k: experts that a token meets.
    """

    logits: Tensor
    top_k: int


@dataclass(frozen=True)
class Signals:
    """Read off one model in one forward.

    Attributes:
        hidden: [B, T, H], final hidden states, what the head is applied to.
        head_weight: [V, H].
        head_bias: [V] or None.
        embeddings: [B, T, H], what enters the decoder: word embeddings, and the connector's output
            at image tokens.
        layers: decoder layers by number, where an objective asks for them.
        forced_mixers: the same, but each mixer fed with what entered the teacher's mixer.
        forced_blocks: the same, but each layer fed with what entered the teacher's layer.
        routers: sparse layers by number.
        own_hidden: [B, T', H] or None, final hidden states of a teacher on its own tokens, where
            `hidden` is what matches the student's.
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

    def detached(self) -> "Signals":
        """The same with a head that gets no gradient."""
        bias = None if self.head_bias is None else self.head_bias.detach()
        return replace(self, head_weight=self.head_weight.detach(), head_bias=bias)

    def first(self, rows: int) -> "Signals":
        """The same of a batch's first rows, without what else the model saw."""
        if len(self.hidden) == rows:
            return self
        return replace(
            self,
            hidden=self.hidden[:rows],
            embeddings=None if self.embeddings is None else self.embeddings[:rows],
            layers={i: layer.first(rows) for i, layer in self.layers.items()},
            forced_mixers={i: layer.first(rows) for i, layer in self.forced_mixers.items()},
            forced_blocks={i: layer.first(rows) for i, layer in self.forced_blocks.items()},
            routers={i: replace(r, logits=r.logits[:rows]) for i, r in self.routers.items()},
            own_hidden=None if self.own_hidden is None else self.own_hidden[:rows],
        )


@dataclass(frozen=True)
class StoredSignals:
    """What was read from a teacher's cache.

    Attributes:
        rows: its output distributions, of the batch's [B * T].
        signals: its final hidden states where they are stored, zeros elsewhere, and a head of the
            same inner products as the teacher's; None if the cache holds none.
    """

    rows: SparseRows
    signals: Signals | None = None

    def first(self, rows: int) -> "StoredSignals":
        """The same: what a filler adds was never stored."""
        return self


TeacherSignals = Signals | StoredSignals


@dataclass(frozen=True)
class Targets:
    """What the tokens of a batch are; all masks are about the token itself, not its prediction.

    Attributes:
        input_ids: [B, T] int64.
        attention: [B, T] bool, False on padding.
        response: [B, T] bool, tokens that the assistant says, end of turn included.
        vision: [B, T] bool, image tokens.
        vision_labels: [B, T] int64 or None, the word that names what an image token shows,
            -100 where there is none.
        end_id: the end-of-turn token.
        background: [B, T] bool or None, image tokens of a labelled picture that show no object.
        rejected: [B] bool or None, rows of rejected answers: the second half of a batch of pairs.
        reference_logps: [B] or None, log-probabilities of the answers by a preference's reference.
        starts: [B, T] bool or None, first tokens of the records of packed rows.
        chunks: pieces of responses that student and teacher have in common, or None.
        sources: [B, T] int64 or None, the number of the data source that a token's record is from.
        heard: [B, T] bool or None, tokens of the records that count; None for all.
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
    heard: Tensor | None = None

    def of(self, sources: frozenset[int] | None) -> "Targets":
        """The same with only the records of some data sources in any region; None for all."""
        if sources is None:
            return self
        if self.sources is None:
            raise ValueError("the batch does not say which sources its records are from")
        wanted = torch.tensor(sorted(sources), device=self.sources.device)
        return replace(self, heard=torch.isin(self.sources, wanted))

    def predicts(self, region: Region) -> Tensor:
        """[B, T] bool: the rows whose output distribution a region covers.

        Text is predicted one position before it stands: the row of the last prompt token predicts
        the first response token. Image tokens predict nothing, their own rows are covered
        (LLaVA-KD, arXiv 2410.16236, section 3.2); so are all real tokens' rows in `all`. Rejected
        answers are in no region, nor are records that do not count.
        """
        if region == "vision":
            rows = self.vision
        elif region == "all":
            rows = self.attention
        elif region == "prompt":
            rows = self._before(self.attention & ~self.response & ~self.vision)
        else:
            rows = self._before(self.response)
        rows = rows if self.heard is None else rows & self.heard
        return rows if self.rejected is None else rows & ~self.rejected[:, None]

    def predicts_answers(self) -> Tensor:
        """[B, T] bool: the rows that predict responses, those of rejected answers too."""
        return self._before(self.response)

    def _before(self, tokens: Tensor) -> Tensor:
        if self.starts is not None:
            tokens = tokens & ~self.starts  # the token before belongs to another record
        rows = torch.zeros_like(tokens)
        rows[:, :-1] = tokens[:, 1:]
        return rows & self.attention

    def next_ids(self) -> Tensor:
        """[B, T] int64: the token after each one; the last column is never read."""
        return torch.roll(self.input_ids, -1, dims=1)


@dataclass(frozen=True)
class Outcome:
    """An objective's contribution of one micro-batch.

    Attributes:
        loss: scalar, already divided by the global number of rows; summing it over micro-batches
            and ranks gives the mean.
        metrics: further scalars with the same normalisation.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def share_of(mean: Tensor, rows: Tensor, count: float) -> Tensor:
    """A mean over this micro-batch's rows as its part of the mean over `count` rows."""
    return mean * (rows.sum().double() / count).to(mean.dtype)


class Objective:
    """Base of all objectives; a subclass names its config and what it needs.

    Attributes:
        config_class: of its settings.
        relates_tokens: it compares a row's tokens with each other, so that a row has to be one
            record.
        relates_records: it compares the records of a micro-batch with each other, so that a
            micro-batch has to hold two at least.
        any_vocabulary: the teacher's tokens may be others than the student's, on image tokens or
            where it reads chunks.
        teacher: the name of the teacher that it compares with, where there are several.
        sources: numbers of the data sources whose records it covers; None for all.
    """

    config_class: ClassVar[type[ObjectiveConfig]]
    relates_tokens: ClassVar[bool] = False
    relates_records: ClassVar[bool] = False
    any_vocabulary: ClassVar[bool] = False

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        shared_vocabulary: int | None = None,
        mamba_layers: Sequence[int] = (),
        head_memory: int = CHUNK_BYTES,
        head_backend: str = "auto",
    ):
        """
        Args:
            config: an instance of `config_class`.
            shared_vocabulary: tokens that teacher and student share (None: heads are equal).
            mamba_layers: the student's Mamba layers, which layer-wise objectives cover if not told
                otherwise.
            head_memory: bytes for the logits of a chunk of rows, and what is made of them.
            head_backend: of losses on the head's output that have a kernel, "auto" or "torch".
        """
        self.config = config
        self.shared_vocabulary = shared_vocabulary
        self.mamba_layers = list(mamba_layers)
        self.head_memory = head_memory
        self.head_backend = head_backend
        self.teacher: str | None = None
        self.sources: frozenset[int] | None = None

    def beside(self, teacher: str, weight: float, sources: frozenset[int] | None) -> "Objective":
        """The same objective with one of several teachers.

        Args:
            teacher: its name, which goes into the objective's.
            weight: factor of this objective's own.
            sources: of the data, by number, whose records the teacher is asked about; None for all.
        """
        made = copy.copy(self)
        changes = {"name": f"{self.name}.{teacher}", "weight": weight * self.config.weight}
        made.config = self.config.model_copy(update=changes)
        made.teacher, made.sources = teacher, sources
        return made

    @final
    @property
    def needs(self) -> frozenset[Need]:
        """What has to be there for this objective, as its settings say."""
        return self.config.needs

    @property
    def name(self) -> str:
        return self.config.metric_name

    def rows(self, targets: Targets) -> Tensor:
        """[B, T] bool: the rows that this objective averages over."""
        raise NotImplementedError

    @final
    @property
    def reads_hidden(self) -> tuple[Region, ...]:
        """Regions of the teacher's final hidden states that this objective reads, if it reads
        nothing else of it, as its settings say."""
        return self.config.reads_hidden

    def __call__(
        self, student: Signals, teacher: Signals | None, targets: Targets, count: float
    ) -> Outcome:
        """Loss of one micro-batch; `count` is the number of rows in the global batch."""
        raise NotImplementedError
