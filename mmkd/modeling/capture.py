"""Capture the tensors that objectives need from a vision-language model of transformers, in one
forward pass.

No logits are computed here: objectives project final hidden states through the head in chunks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import CheckpointError
from mmkd.modeling.adapters import effective_weight
from mmkd.modeling.capture_exits import record_exits
from mmkd.modeling.capture_layers import record_layers
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest
from mmkd.modeling.kept_inputs import hooked, kept_inputs
from mmkd.objectives import RouterSignals, Signals
from mmkd_models.moe import SparseFfn
from mmkd_models.parts import feed_forward, find_parts

# Config keys of operations on the logits after the head. Losses on head(hidden) would ignore them.
AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def check_supported(model: PreTrainedModel, role: str) -> None:
    """Check that a model's logits are head(hidden), and that its parts can be found.

    Args:
        model: teacher or student.
        role: "teacher" or "student", for the message.

    Raises:
        CheckpointError: the model is not supported.
    """
    try:
        if model.base_model is model:
            raise ValueError(f"{type(model).__name__} has no base model separate from its head")
        find_parts(model)
    except ValueError as error:
        raise CheckpointError(
            str(error), where=role, hint="choose a family of docs/families.md"
        ) from error
    text = model.config.get_text_config()
    for name in AFTER_HEAD:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise CheckpointError(
                f"{type(model).__name__} changes its logits after the head ({name})",
                where=role,
                hint="choose a model without it",
            )


def capture(
    model: PreTrainedModel, inputs: dict[str, Tensor], request: CaptureRequest = OUTPUTS_ONLY
) -> Signals:
    """Run a model without its head, and capture its tensors.

    Args:
        model: teacher or student.
        inputs: keyword arguments of the forward pass.
        request: which tensors of decoder layers are recorded, which layers get the tensors of
            another model as their input, and on which tokens the decoder runs.

    Returns:
        The decoder's input and final hidden states, both [B, T, H], the head, the requested tensors
        of decoder layers, and the router logits of sparse layers. If the request has no `outputs`,
        layers after the last recorded one do not run, and final hidden states have width 0.
    """
    entering: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        entering.append(kwargs["inputs_embeds"])

    with ExitStack() as stack:
        if request.kept is not None:
            stack.enter_context(kept_inputs(model, request.kept))
        stack.enter_context(hooked(find_parts(model).decoder, keep))
        routers = stack.enter_context(_record_routers(model))
        recorder = stack.enter_context(record_layers(model, request))
        exits = stack.enter_context(record_exits(model, request.exits, recorder))
        if request.stops_early:
            _run_recorded_layers(model, inputs, request.layers)
            hidden = entering[0][..., :0]
        else:
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return Signals(
        hidden,
        effective_weight(head),
        getattr(head, "bias", None),
        entering[0],
        recorder.signals("free"),
        recorder.signals("mixer"),
        recorder.signals("block"),
        routers,
        exits=exits.signals(),
    )


class _Recorded(Exception):  # noqa: N818, because it is not an error
    """Ends a forward pass when all requested layers are recorded."""


def _run_recorded_layers(
    model: PreTrainedModel, inputs: dict[str, Tensor], layers: frozenset[int]
) -> None:
    """Run a model until all requested layers are recorded, in whatever order it runs its layers."""
    left = set(layers)

    def stop(index: int) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            left.discard(index)
            if not left:
                raise _Recorded

        return after

    modules: Any = find_parts(model).decoder_layers
    with ExitStack() as stack:
        for index in layers:  # after the recorder's hooks, which therefore run first
            stack.callback(modules[index].register_forward_hook(stop(index)).remove)
        with suppress(_Recorded):
            model.base_model(**inputs, use_cache=False)


@contextmanager
def _record_routers(model: PreTrainedModel) -> Iterator[dict[int, RouterSignals]]:
    """Context manager that records the router logits of sparse layers, by index of the layer."""
    found: dict[int, RouterSignals] = {}
    with ExitStack() as stack:
        for index, layer in enumerate(find_parts(model).decoder_layers):
            sparse = feed_forward(layer)[1]
            if not isinstance(sparse, SparseFfn):
                continue

            def keep(module: Any, args: Any, logits: Tensor, index: int = index) -> None:
                # Keep the first run only. An additional forced run of the layer comes second.
                found.setdefault(index, RouterSignals(logits, module.top_k))

            stack.callback(sparse.router.register_forward_hook(keep).remove)
        yield found
