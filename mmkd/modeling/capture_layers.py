"""Record the tensors of decoder layers, and replace their inputs for teacher forcing.

In one forward pass of the student, a layer runs up to three times:

    free      on its own input
    mixer     its mixer runs on the input of the teacher's mixer
    block     the whole layer runs on the input of the teacher's layer

Tensors are recorded separately for each run. If no objective needs the free run, a forced run
replaces it, and each layer receives the teacher's hidden states (mmMamba, arXiv 2502.13145, stages
1 and 2). Otherwise the forced run is an additional run after the free one (MaTVLM, arXiv
2503.13440).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.modeling.capture_request import CaptureRequest, Run
from mmkd.modeling.layer_projections import PROJECTIONS, as_compared, heads_of
from mmkd.objectives import LayerSignals
from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.parts import find_parts


@dataclass
class Recorder:
    """Records tensors of a model's layers in one forward pass, by run.

    Attributes:
        matrices: layers whose mixing matrix is recorded too.
        projections: also record the outputs of the query, key and value projections.
        first: by layer, the kind of its run when the model calls it. Other layers are not recorded.
        extra_run: kind of the additional run in progress, if any.
        off: recording is paused.
        found: the recorded tensors by run, layer and name.
        mixers: the attention or mixer of each layer, for `signals`.
    """

    matrices: frozenset[int] = frozenset()
    projections: bool = False
    first: dict[int, Run] = field(default_factory=dict)
    extra_run: Run | None = None
    off: bool = False
    found: dict[Run, dict[int, dict[str, Tensor]]] = field(default_factory=dict)
    mixers: dict[int, nn.Module] = field(default_factory=dict)

    def keep(self, layer: int, **tensors: Tensor | None) -> None:
        """Record tensors of the layer's current run.

        Raises:
            RecipeError: one of them was recorded before: the model calls the layer twice.
        """
        run = self.extra_run or self.first.get(layer)
        if run is None or self.off:
            return
        kept = self.found.setdefault(run, {}).setdefault(layer, {})
        for name, tensor in tensors.items():
            if tensor is None:
                continue
            if name in kept:
                raise RecipeError(
                    f"the model runs decoder layer {layer} more than once in a forward pass",
                    where="layer-wise objectives",
                    hint="compare other layers, or the models' outputs",
                )
            kept[name] = tensor

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager that pauses recording."""
        self.off = True
        try:
            yield
        finally:
            self.off = False

    def signals(self, run: Run) -> dict[int, LayerSignals]:
        """The signals of a run, by layer.

        Call this after the forward pass. Norms of queries and keys are applied here, so that
        activation checkpointing does not compute them again.
        """
        made = {}
        for layer, tensors in self.found.get(run, {}).items():
            compared = {
                kind: as_compared(self.mixers[layer], kind, tensors[kind])
                for kind in PROJECTIONS
                if kind in tensors
            }
            heads = heads_of(self.mixers[layer]) if "queries" in compared else None
            made[layer] = LayerSignals(**{**tensors, **compared}, heads=heads)
        return made


@contextmanager
def record_layers(model: PreTrainedModel, request: CaptureRequest) -> Iterator[Recorder]:
    """Context manager that records decoder layers in a forward pass, and forces some of them.

    Args:
        model: teacher or student.
        request: which tensors are recorded, and which layers are forced.
    """
    forced_runs: list[tuple[Run, Mapping[int, LayerSignals]]] = [
        ("mixer", request.forced_mixers),
        ("block", request.forced_blocks),
    ]
    recorder = Recorder(request.matrices, request.projections)
    recorder.first = dict.fromkeys(request.layers, "free")
    if not request.free:
        for run, forced in forced_runs:
            recorder.first |= dict.fromkeys(forced, run)
    modules: Any = find_parts(model).decoder_layers
    with ExitStack() as stack:
        for index in sorted({*request.layers, *request.forced_mixers, *request.forced_blocks}):
            layer, first = modules[index], recorder.first.get(index)
            handles = _record(layer, index, recorder)
            for run, forced in forced_runs:
                if index in forced:
                    handles += _force(layer, forced[index], run, first == run, recorder)
            for handle in handles:
                stack.callback(handle.remove)
        yield recorder


def _record(layer: Any, index: int, recorder: Recorder) -> list[Any]:
    """Register hooks that record a layer's tensors; returns their handles."""

    def block_in(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.keep(index, block_input=_hidden(args, kwargs))

    def block_out(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder.keep(index, block_output=_first(output))

    def mixer_out(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entering = _hidden(args, kwargs)
        recorder.keep(index, mixer_input=entering, mixer_output=_first(output))
        if index in recorder.matrices:
            with recorder.paused():  # computing the matrix calls the mixer's projections again
                matrix = _matrix(module, entering, kwargs, output)
            recorder.keep(index, matrix=matrix)

    def heads(module: nn.Module, args: Any) -> None:
        recorder.keep(index, mixer_heads=args[0])

    def projected(kind: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            recorder.keep(index, **{kind: output})

        return keep

    handles = [
        layer.register_forward_pre_hook(block_in, with_kwargs=True),
        layer.register_forward_hook(block_out, with_kwargs=True),
        layer.self_attn.register_forward_hook(mixer_out, with_kwargs=True),
        layer.self_attn.o_proj.register_forward_pre_hook(heads),
    ]
    if recorder.projections:
        recorder.mixers[index] = layer.self_attn
        handles += [
            getattr(layer.self_attn, name).register_forward_hook(projected(kind))
            for kind, name in PROJECTIONS.items()
            if isinstance(getattr(layer.self_attn, name, None), nn.Module)
        ]
    return handles


def _force(
    layer: Any, theirs: LayerSignals, run: Run, in_place: bool, recorder: Recorder
) -> list[Any]:
    """Register hooks that run a layer, or its mixer, on the teacher's tensors: in place of the run
    on its own input (`in_place`), or in an additional run after it."""
    if run == "block":
        module, entering, leaving = layer, theirs.block_input, theirs.block_output
    else:
        module, entering, leaving = layer.self_attn, theirs.mixer_input, theirs.mixer_output
    if not in_place:
        return [_run_again(module, entering, run, recorder)]

    assert entering is not None

    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _with_hidden(args, kwargs, entering)

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return (leaving, *output[1:]) if isinstance(output, tuple) else leaving

    # The recording hooks were registered before: they see the teacher's input and the student's
    # output.
    return [
        module.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def _run_again(module: nn.Module, entering: Any, run: Run, recorder: Recorder) -> Any:
    """Register a hook that runs a module again, on the teacher's input."""

    def again(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if recorder.extra_run is not None:
            return  # this call is itself an additional run, of the module or of its layer
        recorder.extra_run = run
        try:
            args, kwargs = _with_hidden(args, kwargs, entering)
            module(*args, **kwargs)
        finally:
            recorder.extra_run = None

    return module.register_forward_hook(again, with_kwargs=True)


def _matrix(module: Any, entering: Tensor, kwargs: Any, output: Any) -> Tensor:
    if isinstance(module, Mamba2Mixer):
        return module.matrix(entering, kwargs.get("position_embeddings"))
    if output[1] is None:
        raise RecipeError(
            "an attention does not return probabilities",
            where="objective matrix",
            hint="set attn_implementation of teacher and student to eager",
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
