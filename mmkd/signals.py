"""Read what objectives need off any Hugging Face vision-language model, in one forward.

Logits are never built here: objectives project final hidden states through the head in chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import CheckpointError
from mmkd.objectives import Signals
from mmkd_models.parts import find_parts

# Settings that change logits behind the head: projecting hidden states alone would miss them.
AFTER_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def check_supported(model: PreTrainedModel, role: str) -> None:
    """Refuse models whose logits are not head(hidden)."""
    text = model.config.get_text_config()
    for name in AFTER_HEAD:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise CheckpointError(
                f"{type(model).__name__} changes its logits behind the head ({name})",
                where=role,
                mend="choose a model without it",
            )


def capture(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Signals:
    """Run the body once: what enters the decoder and its final hidden states, [B, T, H] both, and
    the head they go through."""
    entering: list[Tensor] = []

    def keep(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        entering.append(kwargs["inputs_embeds"])

    with _hooked(find_parts(model).decoder, keep):
        hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return Signals(hidden, head.weight, getattr(head, "bias", None), entering[0])


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
