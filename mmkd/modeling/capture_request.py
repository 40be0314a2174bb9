"""What is read off a model's decoder layers in one forward, and what a stage's objectives ask for.

`LayerPlan` says what a stage's objectives need of both models. It makes the `CaptureRequest` of the
teacher's forward, and then, from what the teacher returned, the one of the student's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mmkd.errors import RecipeError
from mmkd.objectives import LayerSignals, Layerwise, Objective

Run = Literal["free", "mixer", "block"]
"""How a decoder layer runs, see `mmkd.modeling.capture_layers`."""


@dataclass(frozen=True)
class CaptureRequest:
    """What one forward records of a model's decoder layers, and which of them it feeds with
    another model's tensors.

    Attributes:
        layers: layers whose free run is recorded.
        matrices: layers whose mixing matrix is recorded too, in each run of them.
        projections: record queries, keys and values too.
        forced_mixers: by layer, signals whose `mixer_input` is fed to the layer's mixer.
        forced_blocks: by layer, signals whose `block_input` is fed to the whole layer.
        free: the free run is needed: a forced run comes beside it, not in its place.
    """

    layers: frozenset[int] = frozenset()
    matrices: frozenset[int] = frozenset()
    projections: bool = False
    forced_mixers: Mapping[int, LayerSignals] = field(default_factory=dict)
    forced_blocks: Mapping[int, LayerSignals] = field(default_factory=dict)
    free: bool = True


OUTPUTS_ONLY = CaptureRequest()
"""Nothing of the decoder's layers."""


@dataclass(frozen=True)
class LayerPlan:
    """Which layers a stage's objectives read, and how the student runs.

    Attributes:
        pairs: student layer -> teacher layer.
        recorded: student layers whose free run is read.
        free: the student's free run is needed.
        forced_mixers: student layers whose mixer is fed with what entered the teacher's.
        forced_blocks: student layers that are fed with what entered the teacher's layer.
        matrices: student layers whose mixing matrix is read.
        projections: queries, keys and values are needed.
    """

    pairs: dict[int, int] = field(default_factory=dict)
    recorded: frozenset[int] = frozenset()
    free: bool = True
    forced_mixers: frozenset[int] = frozenset()
    forced_blocks: frozenset[int] = frozenset()
    matrices: frozenset[int] = frozenset()
    projections: bool = False

    @property
    def forced(self) -> frozenset[int]:
        """Student layers that some objective feeds with the teacher's tensors."""
        return self.forced_mixers | self.forced_blocks

    @classmethod
    def of(cls, objectives: Sequence[Objective]) -> "LayerPlan":
        """
        Raises:
            RecipeError: two objectives pair one student layer with different teacher layers.
        """
        layerwise = [o for o in objectives if isinstance(o, Layerwise)]
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
            return frozenset(mine for o in layerwise if _run_of(o) == run for mine, _ in o.pairs)

        forced = [o for o in layerwise if o.config.teacher_forced]
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
        )

    def teacher_request(self) -> CaptureRequest:
        """What is read off the teacher."""
        return CaptureRequest(
            frozenset(self.pairs.values()),
            matrices=frozenset(self.pairs[mine] for mine in self.matrices),
            projections=self.projections,
        )

    def student_request(self, teacher: Mapping[int, LayerSignals]) -> CaptureRequest:
        """What is read off the student, and which of its layers get the teacher's tensors.

        Args:
            teacher: signals of the teacher's layers, by teacher layer; empty if it did not run, and
                then no layer is forced.
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
        )


def _run_of(objective: Layerwise) -> Run:
    """The run whose signals an objective compares."""
    if not objective.config.teacher_forced:
        return "free"
    return "block" if objective.compares_blocks else "mixer"
