"""Read a student's output head after a decoder layer, before the last one.

    z = W n(b(h))

h is the residual stream after the layer, W the output head and n the decoder's final norm. b is
nothing, or one further decoder layer. Objectives may have a norm and a layer b of their own.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.modeling.capture_layers import Recorder
from mmkd.modeling.packed_rows import RECURRENT
from mmkd.objectives import Exit, ExitSignals
from mmkd.objectives.exits import Exits, following
from mmkd.recipe.context import StageContext
from mmkd_models.mixer import Mamba2Mixer
from mmkd_models.parts import Parts, find_parts


@dataclass
class ExitRecorder:
    """Records what exits need in one forward pass.

    Attributes:
        parts: of the student.
        places: the exits, in the order in which their modules run.
        streams: by layer, the residual stream after it, [B, T, H].
        calls: by layer, the keyword arguments of the call of the next layer.
    """

    parts: Parts
    places: tuple[Exit, ...]
    streams: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    def keep(self, layer: int, hidden: Tensor) -> None:
        """Record the stream after a layer.

        Raises:
            RecipeError: it was recorded before: the model calls a layer twice.
        """
        if layer in self.streams:
            raise RecipeError(
                "the model runs a decoder layer more than once in a forward pass",
                where=f"exit after layer {layer}",
                hint="read the output head after other layers",
            )
        self.streams[layer] = hidden

    def signals(self) -> dict[Exit, ExitSignals]:
        """The exits. Call this after the model's forward pass, and inside of the engine's."""
        return {place: self._read(place) for place in self.places}

    def _read(self, place: Exit) -> ExitSignals:
        count = len(self.parts.decoder_layers)
        hidden = self.streams[place.layer]
        if place.block is not None:
            output = place.block(hidden, **self.calls[place.layer])
            hidden = output[0] if isinstance(output, tuple) else output
        norm = self.parts.final_norm if place.norm is None else place.norm
        assert norm is not None  # see `check_exits`
        return ExitSignals(norm(hidden), (place.layer + 1) / count)


@contextmanager
def record_exits(
    model: PreTrainedModel, places: Iterable[Exit], layer_runs: Recorder
) -> Iterator[ExitRecorder]:
    """Context manager that records what exits read.

    Additional runs of layers, on the teacher's input, are not recorded. The stream after a layer is
    the input of the next layer: some models add image features between two layers. After the last
    layer, it is that layer's output.

    Args:
        model: the student.
        places: the exits.
        layer_runs: of the same forward pass; says which run of a layer is in progress.
    """
    recorder = ExitRecorder(find_parts(model), tuple(places))
    layers: Any = recorder.parts.decoder_layers
    last = len(layers) - 1
    with ExitStack() as stack:
        for index in {place.layer for place in recorder.places}:

            def before(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                if layer_runs.extra_run is not None:
                    return
                given = {k: v for k, v in kwargs.items() if k != "hidden_states"}
                recorder.calls[index] = given
                if index < last:
                    recorder.keep(index, args[0] if args else kwargs["hidden_states"])

            def after(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
                if layer_runs.extra_run is None:
                    recorder.keep(index, output[0] if isinstance(output, tuple) else output)

            following_layer = layers[following(index, len(layers))]
            handles = [following_layer.register_forward_pre_hook(before, with_kwargs=True)]
            if index == last:
                handles.append(layers[last].register_forward_hook(after))
            for handle in handles:
                stack.callback(handle.remove)
        yield recorder


def check_exits(context: StageContext) -> None:
    """Check that the student has the layers of exits, and a final norm, and that copies of layers
    can run.

    Raises:
        RecipeError: it has not.
    """
    parts = find_parts(context.student)
    count = len(parts.decoder_layers)
    for objective in context.objectives:
        if not isinstance(objective, Exits):
            continue
        where = context.at(objective)
        if parts.final_norm is None:
            raise RecipeError(
                f"{type(parts.decoder).__name__} has no final norm that is known",
                where=where,
                hint="choose a student of docs/families.md",
            )
        for layer in objective.config.layers:
            if layer >= count:
                raise RecipeError(
                    f"the student has no decoder layer {layer}, it has {count}",
                    where=where,
                    hint="set 'layers'; they count from 0",
                )
            if objective.config.block and context.stage.batch.pack is not None:
                _check_packed_block(parts.decoder_layers[following(layer, count)], where)


def _check_packed_block(layer: nn.Module, where: str) -> None:
    """Check that a copy of a layer keeps the records of packed rows apart. Mixers with a state are
    told where records begin by the model, which does not know the copy.

    Raises:
        RecipeError: it does not.
    """
    mamba = any(isinstance(module, Mamba2Mixer) for module in layer.modules())
    if mamba or any(hasattr(layer, name) for name in RECURRENT):
        raise RecipeError(
            "'block' copies a layer whose state would run on from one record of a packed row to "
            "the next",
            where=where,
            hint="set batch.pack to null, or block to false",
        )
