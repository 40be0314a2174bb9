"""End tokens of answers, and the settings of `generate`.

transformers reads settings that a call does not give from the checkpoint's
`generation_config.json`. There, a repetition penalty or a list of suppressed tokens could change
the answers unnoticed. mmkd uses only the special tokens of this file (`TAKEN_OVER`).
"""

from collections.abc import Iterable
from typing import Any

from transformers import GenerationConfig

from mmkd.data.chat import render_chat, special_tokens
from mmkd.data.schema import Message
from mmkd.errors import DataError

TAKEN_OVER = ("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id")
"""Generation settings that are taken from the checkpoint."""
# Instead of transformers' defaults, 50 and 20, which would change answers.
_OFF = {"top_k": None, "max_length": None}
SAMPLING = (  # settings without effect on greedy decoding
    *("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
_BEAMS = ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty")


def neutral_settings() -> dict[str, Any]:
    """Values for all settings of `generate` except `TAKEN_OVER`, which override the checkpoint's:
    greedy decoding, one beam, no penalties, no suppressed or forced tokens."""
    defaults = GenerationConfig._get_default_generation_params() | _OFF
    names = [n for n in vars(GenerationConfig()) if not n.startswith("_")]
    kept = (*TAKEN_OVER, "transformers_version")
    return {name: defaults.get(name) for name in names if name not in kept}


def turn_ends(processor: Any) -> set[int]:
    """Ids of the tokens that the chat template writes after an answer.

    Empty if it writes none, or refuses a conversation without images.
    """
    ask: Message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    say: Message = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
    try:
        found = render_chat(processor, [ask, say, ask, say])
    except DataError:
        return set()
    specials = special_tokens(processor.tokenizer)
    ends = set()
    for (_, stop), (_, said_end) in zip(found.spans, found.said, strict=True):
        behind = found.text[said_end:stop].strip()
        tokens = [token for token in specials if token and behind.endswith(token)]
        if tokens:
            ends.add(specials[max(tokens, key=len)])
    return ends


def end_tokens(processor: Any, configured: int | Iterable[int] | None = None) -> list[int]:
    """Ids of all tokens that end an answer, sorted: the chat template's end of turn, the
    tokenizer's end token, and the end tokens of the model.

    Args:
        processor: of the model.
        configured: `eos_token_id` of the model's generation settings. A model that was made from a
            config may have a default that its tokenizer does not use as an end token.
    """
    own = [configured] if isinstance(configured, int) or configured is None else configured
    ends = {*own, processor.tokenizer.eos_token_id, *turn_ends(processor)}
    return sorted(i for i in ends if i is not None)


def padding_token(processor: Any, ends: list[int]) -> int | None:
    """Id of the token that pads finished answers: the pad token, or an end token if there is
    none."""
    own = processor.tokenizer.pad_token_id
    return own if own is not None else next(iter(ends), None)


def set_ends(settings: GenerationConfig, processor: Any, *, from_config: bool = False) -> None:
    """Add the end tokens to a model's generation settings, and make these valid to save; in place.

    Args:
        settings: of the model.
        processor: of the model.
        from_config: the model was made from a config with random weights. Then the architecture's
            default end token is left out if it is an ordinary token of this tokenizer.
    """
    known = settings.eos_token_id
    if from_config and known is not None:
        special = processor.tokenizer.added_tokens_decoder
        known = [i for i in ([known] if isinstance(known, int) else known) if i in special]
    ends = end_tokens(processor, known)
    if ends:
        settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    if settings.pad_token_id is None or settings.pad_token_id < 0:
        settings.pad_token_id = processor.tokenizer.pad_token_id
    _drop_unused(settings)


def _drop_unused(settings: GenerationConfig) -> None:
    """Remove settings that have no effect. transformers loads them with a warning, but refuses to
    save them after another change."""
    unused = [] if settings.do_sample else list(SAMPLING)
    if settings.num_beams in (None, 1):
        unused += _BEAMS if settings.do_sample else [*_BEAMS, "num_return_sequences"]
    for name in unused:
        if getattr(settings, name, None) is not None:
            setattr(settings, name, None)
    try:
        settings.validate(strict=True)
    except ValueError:  # do not lose a trained student because of an invalid setting
        for name in neutral_settings():
            setattr(settings, name, None)
