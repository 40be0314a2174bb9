"""Read, and for teacher forcing replace, what goes through a decoder's layers.

Three ways to run a student, all in one forward through its root module:

    record    layers run freely; what goes through them is kept
    replace   each layer gets the teacher's input and passes on the teacher's output, so that the
              stream stays the teacher's (mmMamba, arXiv 2502.13145, stages 1 and 2)
    beside    layers run freely, and each runs once more on the teacher's input (MaTVLM,
              arXiv 2503.13440), where other objectives need the free run too
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.objectives import LayerSignals, Layerwise
from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.parts import find_parts

Level = Literal["mixer", "block"]
PROJECTIONS = {"queries": "q_proj", "keys": "k_proj", "values": "v_proj"}


@dataclass(frozen=True)
class LayerPlan:
    """Which layers a stage's objectives read, and how the student runs.

    Attributes:
        pairs: student layer -> teacher layer.
        recorded: student layers of the free run.
        free: the student's free run is needed.
        forced: some objective is teacher-forced, at mixers, or at blocks where one of them compares
            blocks.
        matrices: mixing matrices are needed.
        projections: queries, keys and values are needed.
    """

    pairs: dict[int, int] = field(default_factory=dict)
    recorded: frozenset[int] = frozenset()
    free: bool = True
    forced: Level | None = None
    matrices: bool = False
    projections: bool = False

    @classmethod
    def of(cls, objectives: Sequence[Any]) -> "LayerPlan":
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
                        mend="pair it with one of them",
                    )
        forced = [o for o in layerwise if o.config.teacher_forced]
        blocks = any(o.compares_blocks for o in forced)
        return cls(
            pairs,
            recorded=frozenset(
                mine for o in layerwise if not o.config.teacher_forced for mine, _ in o.pairs
            ),
            free=len(forced) < len(layerwise) or any("distribution" in o.needs for o in objectives),
            forced=("block" if blocks else "mixer") if forced else None,
            matrices=any("matrices" in o.needs for o in objectives),
            projections=any("projections" in o.needs for o in objectives),
        )


@dataclass
class Recorder:
    """What one run through a model's layers left behind."""

    matrices: bool
    projections: bool = False
    found: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def keep(self, layer: int, **tensors: Tensor | None) -> None:
        self.found.setdefault(layer, {}).update({k: v for k, v in tensors.items() if v is not None})

    def signals(self) -> dict[int, LayerSignals]:
        return {layer: LayerSignals(**tensors) for layer, tensors in self.found.items()}


@contextmanager
def record_layers(
    model: PreTrainedModel,
    layers: Sequence[int],
    *,
    matrices: bool = False,
    projections: bool = False,
) -> Iterator[Recorder]:
    """Keep what goes through the given decoder layers of the forwards inside."""
    recorder = Recorder(matrices, projections)
    with ExitStack() as stack:
        for index in layers:
            for handle in _record(find_parts(model).decoder_layers[index], index, recorder):
                stack.callback(handle.remove)
        yield recorder


@contextmanager
def force_layers(
    model: PreTrainedModel, teacher: dict[int, LayerSignals], plan: LayerPlan
) -> Iterator[Recorder]:
    """Feed the student's layers with the teacher's, and keep what they make of it.

    Args:
        model: the student.
        teacher: the teacher's signals, by student layer.
        plan: `free` decides between beside and replace.
    """
    recorder = Recorder(plan.matrices)
    layers = find_parts(model).decoder_layers
    with ExitStack() as stack:
        for index, theirs in teacher.items():
            layer = layers[index]
            if plan.free:
                handles = [_run_beside(layer, index, theirs, plan, recorder)]
            else:
                handles = _record(layer, index, recorder) + _replace(layer, theirs, plan)
            for handle in handles:
                stack.callback(handle.remove)
        yield recorder


def _record(layer: Any, index: int, recorder: Recorder) -> list[Any]:
    """Hooks that keep a layer's tensors."""

    def block_in(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.keep(index, block_input=_hidden(args, kwargs))

    def block_out(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder.keep(index, block_output=_first(output))

    def mixer_out(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entering = _hidden(args, kwargs)
        recorder.keep(index, mixer_input=entering, mixer_output=_first(output))
        if recorder.matrices:
            recorder.keep(index, matrix=_matrix(module, entering, kwargs, output))

    def heads(module: nn.Module, args: Any) -> None:
        recorder.keep(index, mixer_heads=args[0])

    def projected(name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            recorder.keep(index, **{name: output})

        return keep

    handles = [
        layer.register_forward_pre_hook(block_in, with_kwargs=True),
        layer.register_forward_hook(block_out, with_kwargs=True),
        layer.self_attn.register_forward_hook(mixer_out, with_kwargs=True),
        layer.self_attn.o_proj.register_forward_pre_hook(heads),
    ]
    if recorder.projections:
        handles += [
            getattr(layer.self_attn, projection).register_forward_hook(projected(name))
            for name, projection in PROJECTIONS.items()
        ]
    return handles


def _replace(layer: Any, theirs: LayerSignals, plan: LayerPlan) -> list[Any]:
    """Hooks that put the teacher's tensors in; recording hooks, which are there already, see the
    teacher's input and the student's output."""
    block = plan.forced == "block"
    module = layer if block else layer.self_attn
    entering = theirs.block_input if block else theirs.mixer_input
    leaving = theirs.block_output if block else theirs.mixer_output

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _with_hidden(args, kwargs, entering)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return (leaving, *output[1:]) if isinstance(output, tuple) else leaving

    return [
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def _run_beside(
    layer: nn.Module, index: int, theirs: LayerSignals, plan: LayerPlan, recorder: Recorder
) -> Any:
    """A hook that runs the layer once more, on the teacher's input."""
    running = False

    def again(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal running
        if running:
            return
        running = True
        handles = _record(module, index, recorder) + _replace(module, theirs, plan)
        try:
            module(*args, **kwargs)
        finally:
            running = False
            for handle in handles:
                handle.remove()

    return layer.register_forward_hook(again, with_kwargs=True)


def _matrix(module: Any, entering: Tensor, kwargs: Any, output: Any) -> Tensor:
    if isinstance(module, Mamba2Mixer):
        return module.matrix(entering, kwargs.get("position_embeddings"))
    if output[1] is None:
        raise RecipeError(
            "the teacher's attention keeps no probabilities",
            where="objective matrix",
            mend="set teacher.attn_implementation to eager",
        )
    return output[1]


def _hidden(args: Any, kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _with_hidden(args: Any, kwargs: Any, hidden: Tensor) -> tuple[Any, Any]:
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
