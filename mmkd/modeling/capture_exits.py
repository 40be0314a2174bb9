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
from mmkd.objectives import Exit, ExitSignals
from mmkd.objectives.exits import Exits, following
from mmkd.recipe.context import StageContext
from mmkd_models.parts import Parts, find_parts


@dataclass
class ExitRecorder:
    """Records what exits need in one forward pass.

    Attributes:
        parts: of the student.
        places: the exits.
        streams: by layer, the residual stream after it, [B, T, H].
        calls: by layer, the keyword arguments that the model passed to it.
    """

    parts: Parts
    places: frozenset[Exit]
    streams: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    def signals(self) -> dict[Exit, ExitSignals]:
        """The exits. Call this after the model's forward pass, and inside of the engine's."""
        return {place: self._read(place) for place in self.places}

    def _read(self, place: Exit) -> ExitSignals:
        count = len(self.parts.decoder_layers)
        hidden = self.streams[place.layer]
        if place.block is not None:
            call = self.calls[following(place.layer, count)]
            output = place.block(hidden, **call)
            hidden = output[0] if isinstance(output, tuple) else output
        norm = self.parts.final_norm if place.norm is None else place.norm
        assert norm is not None  # see `check_exits`
        return ExitSignals(norm(hidden), (place.layer + 1) / count)


@contextmanager
def record_exits(model: PreTrainedModel, places: Iterable[Exit]) -> Iterator[ExitRecorder]:
    """Context manager that records the layers that exits read."""
    recorder = ExitRecorder(find_parts(model), frozenset(places))
    layers: Any = recorder.parts.decoder_layers
    with ExitStack() as stack:
        for index in {place.layer for place in recorder.places}:

            def keep(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
                if index in recorder.streams:
                    raise RecipeError(
                        f"the model runs decoder layer {index} more than once in a forward pass",
                        where="exits",
                        hint="read the output head after other layers",
                    )
                recorder.streams[index] = output[0] if isinstance(output, tuple) else output

            stack.callback(layers[index].register_forward_hook(keep).remove)
        with_block = {place.layer for place in recorder.places if place.block is not None}
        for index in {following(layer, len(layers)) for layer in with_block}:

            def note(module: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
                recorder.calls[index] = {k: v for k, v in kwargs.items() if k != "hidden_states"}

            handle = layers[index].register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        yield recorder


def check_exits(context: StageContext) -> None:
    """Check that the student has the layers of exits, and a final norm.

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
