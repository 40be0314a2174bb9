"""Read what objectives need off any Hugging Face vision-language model, in one forward.

Logits are never built here: objectives project final hidden states through the head in chunks.
"""

from torch import Tensor
from transformers import PreTrainedModel

from mmkd.errors import CheckpointError
from mmkd.objectives import Signals

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
    """Run the body once: final hidden states [B, T, H], and the head they go through."""
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    return Signals(hidden, head.weight, getattr(head, "bias", None))
