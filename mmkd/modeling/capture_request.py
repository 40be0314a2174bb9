"""Which tensors of decoder layers are captured in a forward pass.

`LayerPlan` collects the needs of a stage's objectives. It makes the `CaptureRequest` of the
teacher's forward pass, and then, with the teacher's tensors, that of the student's forward pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mmkd.errors import RecipeError
from mmkd.objectives import Exit, LayerSignals, Layerwise, Objective
from mmkd.ops import KeptTokens

Run = Literal["free", "mixer", "block"]
"""Kind of a run of a decoder layer, see `mmkd.modeling.capture_layers`."""


@dataclass(frozen=True)
class CaptureRequest:
    """Which tensors of a model's decoder layers a forward pass records, and which layers run on the
    tensors of another model.

    Attributes:
        layers: layers whose free run is recorded.
        matrices: layers whose mixing matrix is recorded too, in each of their runs.
        projections: also record queries, keys and values.
        forced_mixers: by layer, signals whose `mixer_input` is the input of the layer's mixer.
        forced_blocks: by layer, signals whose `block_input` is the input of the whole layer.
        free: the free run is needed, so a forced run is an additional run.
        exits: places where the output head is read after a decoder layer, each once. Their modules
            run in this order, which must be the same in all processes.
        outputs: final hidden states are needed. If not, the forward pass stops after the last of
            `layers`.
        kept: the tokens of the inputs on which the decoder runs; None for all. All signals are
            those of the kept tokens.
    """

    layers: frozenset[int] = frozenset()
    matrices: frozenset[int] = frozenset()
    projections: bool = False
    forced_mixers: Mapping[int, LayerSignals] = field(default_factory=dict)
    forced_blocks: Mapping[int, LayerSignals] = field(default_factory=dict)
    free: bool = True
    exits: tuple[Exit, ...] = ()
    outputs: bool = True
    kept: KeptTokens | None = None

    @property
    def stops_early(self) -> bool:
        """Whether the forward pass may stop after the last recorded layer."""
        return bool(self.layers) and not (self.outputs or self.forced_mixers or self.forced_blocks)


OUTPUTS_ONLY = CaptureRequest()
"""Records no decoder layers."""


@dataclass(frozen=True)
class LayerPlan:
    """Which layers the objectives of a stage read, and how the student's layers run.

    Attributes:
        pairs: student layer -> teacher layer.
        recorded: student layers whose free run is recorded.
        free: the student's free run is needed.
        forced_mixers: student layers whose mixer runs on the input of the teacher's mixer.
        forced_blocks: student layers that run on the input of the teacher's layer.
        matrices: student layers whose mixing matrix is read.
        projections: queries, keys and values are needed.
        exits: places where the student's output head is read, each once, in the order of the
            objectives.
    """

    pairs: dict[int, int] = field(default_factory=dict)
    recorded: frozenset[int] = frozenset()
    free: bool = True
    forced_mixers: frozenset[int] = frozenset()
    forced_blocks: frozenset[int] = frozenset()
    matrices: frozenset[int] = frozenset()
    projections: bool = False
    exits: tuple[Exit, ...] = ()

    @property
    def forced(self) -> frozenset[int]:
        """Student layers that run on tensors of the teacher."""
        return self.forced_mixers | self.forced_blocks

    @classmethod
    def of(cls, objectives: Sequence[Objective]) -> "LayerPlan":
        """Collect the needs of a stage's objectives.

        Raises:
            RecipeError: two objectives pair one student layer with different teacher layers.
        """
        layerwise = [o for o in objectives if isinstance(o, Layerwise) or o.pairs]
        pairs: dict[int, int] = {}
        for objective in layerwise:
            for mine, theirs in objective.pairs:
                if pairs.setdefault(mine, theirs) != theirs:
                    raise RecipeError(
                        f"student layer {mine} is paired with teacher layers {pairs[mine]} and "
                        f"{theirs}",
                        where=f"objective {objective.name}",
                        hint="pair it with one of them",
                    )

        def layers(run: Run) -> frozenset[int]:
            return frozenset(
                mine for o in layerwise if (o.forced or "free") == run for mine, _ in o.pairs
            )

        forced = [o for o in layerwise if o.forced]
        return cls(
            pairs,
            recorded=layers("free"),
            free=len(forced) < len(layerwise) or any("distribution" in o.needs for o in objectives),
            forced_mixers=layers("mixer"),
            forced_blocks=layers("block"),
            matrices=frozenset(
                mine for o in layerwise if "matrices" in o.needs for mine, _ in o.pairs
            ),
            projections=any("projections" in o.needs for o in objectives),
            exits=tuple(dict.fromkeys(place for o in objectives for place in o.exits)),
        )

    def teacher_request(self) -> CaptureRequest:
        """The request for the teacher's forward pass."""
        return CaptureRequest(
            frozenset(self.pairs.values()),
            matrices=frozenset(self.pairs[mine] for mine in self.matrices),
            projections=self.projections,
        )

    def student_request(self, teacher: Mapping[int, LayerSignals]) -> CaptureRequest:
        """The request for the student's forward pass.

        Args:
            teacher: signals of the teacher's layers, by teacher layer. If it is empty because the
                teacher did not run, no layer is forced.
        """

        def forced(layers: frozenset[int]) -> dict[int, LayerSignals]:
            return {mine: teacher[self.pairs[mine]] for mine in layers} if teacher else {}

        return CaptureRequest(
            self.recorded,
            matrices=self.matrices,
            projections=self.projections,
            forced_mixers=forced(self.forced_mixers),
            forced_blocks=forced(self.forced_blocks),
            free=self.free,
            exits=self.exits,
        )
