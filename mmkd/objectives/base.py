"""Base class of objectives.

An objective does not access a model. Its inputs are the `Signals` of student and teacher, the
`Targets` of the batch, and the number of rows (positions) that it covers in the global batch. With
that number, the loss of a stage is a mean per covered token over all ranks and accumulation steps,
and does not depend on the batch layout.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, final

from torch import Tensor, nn

from mmkd.objectives.base_settings import Need, ObjectiveConfig, Region
from mmkd.objectives.signals import Exit, Signals
from mmkd.objectives.targets import Targets
from mmkd.ops import CHUNK_BYTES

if TYPE_CHECKING:
    from mmkd.objectives.ensemble import Ensemble


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

    def for_sources(self, sources: frozenset[int]) -> "Objective":
        """A copy of the objective that covers the records of some data sources.

        Args:
            sources: indices of the data sources.
        """
        made = copy.copy(self)
        made.sources = sources
        return made

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
            sources: indices of the data sources whose records it covers; None for all.
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
        batch has no rows, because processes gather sharded weights together. Parameters have at
        least one dimension.

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
