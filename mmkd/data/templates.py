"""Render conversations with a processor's chat template.

Most templates expect a message's content as a list of parts. Others expect one string; for these,
the parts are joined, with the processor's placeholder for each image. A short conversation is
rendered once to find out which of the two a template expects.
"""

import re
from functools import lru_cache
from itertools import product
from typing import Any

from mmkd.data.bounded import LONGEST, TemplateBoundError, bounded
from mmkd.data.schema import Message, printable
from mmkd.errors import HINT, CheckpointError, DataError, MmkdError

ASKED, ANSWERED = "seven apples", "twelve pears"
PROBE: list[Message] = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASKED}]},
    {"role": "assistant", "content": [{"type": "text", "text": ANSWERED}]},
]
REPR = re.compile(r"""['"]type['"]\s*:""")
"""Text of a list of parts, if a template prints it like a string."""
MEDIA_TOKENS = ("image_token", "video_token", "audio_token")


def render(processor: Any, messages: list[Message], *, prompt: bool = False) -> str:
    """Render a conversation as text, with a placeholder for each image.

    Args:
        processor: with a chat template.
        messages: content as lists of parts, as in a record.
        prompt: end with the generation prompt.

    Raises:
        DataError: the template refuses the conversation or leaves out a part of it, or a text
            contains a token that stands for an image.
        CheckpointError: see `check_template`.
    """
    _check_texts(processor, messages)
    text = _apply(processor, shaped(processor, messages), prompt=prompt)
    _check_complete(processor, messages, text)
    return text


def check_processor(processor: Any) -> None:
    """Check that a processor can be used for training.

    Raises:
        CheckpointError: see `check_template`; or the tokenizer is not a fast one, which is needed
            for the offsets of tokens.
    """
    if not getattr(processor.tokenizer, "is_fast", False):
        raise CheckpointError(
            "the tokenizer does not give the offsets of its tokens in a text",
            where=_name(processor),
            hint="use a fast tokenizer: save its tokenizer.json into the model's folder",
        )
    check_template(processor)


def check_template(processor: Any) -> None:
    """Check that the chat template can render a question about an image and an answer.

    Raises:
        CheckpointError: there is no template, or it accepts content neither as parts nor as a
            string.
    """
    string_roles(processor)


def string_roles(processor: Any) -> frozenset[str]:
    """The roles whose content the chat template expects as a string."""
    template = getattr(processor, "chat_template", None)
    if not template:
        raise CheckpointError(
            "the processor has no chat template",
            where=_name(processor),
            hint="add chat_template.jinja to its folder",
        )
    return _string_roles(processor, str(template))


def shaped(processor: Any, messages: list[Message]) -> list[Message]:
    """Messages in the form that the chat template expects: content as parts or as a string."""
    roles = string_roles(processor)
    return [_joined(processor, m) if m["role"] in roles else m for m in messages]


@lru_cache(maxsize=32)
def media_tokens(processor: Any) -> tuple[str, ...]:
    """Tokens that stand for features of images, videos or sound in the processor's text."""
    tokenizer = processor.tokenizer
    named = [getattr(p, name, None) for p in (processor, tokenizer) for name in MEDIA_TOKENS]
    ids = [i for i in getattr(processor, "image_token_ids", None) or [] if i is not None]
    found = [str(token) for token in named if token]
    return tuple(dict.fromkeys([*found, *tokenizer.convert_ids_to_tokens(ids)]))


@lru_cache(maxsize=32)
def media_token_ids(processor: Any) -> frozenset[int]:
    """Ids of `media_tokens`."""
    vocabulary = processor.tokenizer.get_vocab()
    return frozenset(vocabulary[t] for t in media_tokens(processor) if t in vocabulary)


def without_media_tokens(processor: Any, text: str) -> str:
    """Remove image tokens from a model's answer. A model can generate them, and the processor would
    treat them as an image."""
    tokens = media_tokens(processor)
    while found := next((t for t in tokens if t in text), None):
        text = text.replace(found, "")
    return text


@lru_cache(maxsize=32)
def _string_roles(processor: Any, template: str) -> frozenset[str]:
    """`template` is part of the cache's key, since a processor's template may be replaced."""
    refused = "takes content neither as a list of parts nor as text"
    for user, assistant in product((False, True), repeat=2):
        roles = {"user": user, "assistant": assistant}
        found = frozenset(role for role, string in roles.items() if string)
        messages = [_joined(processor, m) if m["role"] in found else m for m in PROBE]
        try:
            text = _apply(processor, messages)
        except DataError:
            continue
        if ASKED not in text or ANSWERED not in text or REPR.search(text):
            continue
        if text.count(processor.image_token) == 1:
            return found | _system(processor, found)
        refused = f"writes no {processor.image_token} for an image"
    raise CheckpointError(
        f"the chat template {refused}",
        where=_name(processor),
        hint="use the chat template that the model family is published with",
    )


def _system(processor: Any, roles: frozenset[str]) -> frozenset[str]:
    """The same for a system message. A template without system messages raises an error when it
    renders one."""
    system: Message = {"role": "system", "content": [{"type": "text", "text": "five plums"}]}
    rest = [_joined(processor, m) if m["role"] in roles else m for m in PROBE]
    for found, first in (
        (frozenset(), system),
        (frozenset({"system"}), _joined(processor, system)),
    ):
        try:
            text = _apply(processor, [first, *rest])
        except DataError:
            continue
        if "five plums" in text and not REPR.search(text):
            return found
    return frozenset({"system"} if "user" in roles else ())


def _joined(processor: Any, message: Message) -> Message:
    """A message with its content as one string. Placeholders of images are on lines of their own,
    as in LLaVA's data."""
    parts = message["content"]
    placeholder = _placeholder(processor) + "\n"
    text = "".join(placeholder if p["type"] == "image" else p["text"] for p in parts)
    image_last = bool(parts) and parts[-1]["type"] == "image"
    return {**message, "content": text.removesuffix("\n") if image_last else text}


def _placeholder(processor: Any) -> str:
    """The text that a template with parts writes for an image."""
    token: str = processor.image_token
    around = "<|vision_start|>", "<|vision_end|>"  # Qwen2-VL and later
    known = processor.tokenizer.get_vocab()
    if token == "<|image_pad|>" and all(t in known for t in around):
        return token.join(around)
    return token


def _apply(processor: Any, messages: list[Message], *, prompt: bool = False) -> str:
    """The text of messages that `shaped` has prepared."""
    try:
        with bounded():
            text = str(
                processor.apply_chat_template(
                    messages, add_generation_prompt=prompt, tokenize=False
                )
            )
        if len(text) > LONGEST:
            raise TemplateBoundError(f"it writes {len(text):,} characters")
        return text
    except (TemplateBoundError, MemoryError) as error:
        raise CheckpointError(
            f"the chat template was stopped: {printable(error) or 'it takes too much memory'}",
            where=_name(processor),
            hint="use the chat template that the model family is published with",
        ) from error
    except (MmkdError, OSError, ImportError):
        raise
    except Exception as error:  # a template is a program, and may raise any exception
        reason = printable(error).replace(HINT, "; ").strip() or type(error).__name__
        raise DataError(
            f"the chat template refuses it: {reason}",
            hint="fix the order of its turns or drop the record",
            kind="the chat template refuses it",
        ) from error


def _check_texts(processor: Any, messages: list[Message]) -> None:
    tokens = media_tokens(processor)
    for number, message in enumerate(messages):
        for part in message["content"]:
            found = next((t for t in tokens if t in part.get("text", "")), None)
            if found is not None:
                raise DataError(
                    f"the text of turn {number} contains {found}, which stands for an image",
                    hint="write it in another way, or drop the record",
                    kind="text contains an image token",
                )


def _check_complete(processor: Any, messages: list[Message], text: str) -> None:
    """Check that the rendered text contains all texts except answers, and one placeholder for each
    image."""
    shown = sum(p["type"] == "image" for m in messages for p in m["content"])
    written = text.count(processor.image_token)
    if shown != written:
        raise DataError(
            f"the chat template writes {written} image placeholder(s) for {shown} image(s)",
            hint="use a template that writes one for each image",
            kind="the chat template writes another number of images",
        )
    for number, message in enumerate(messages):
        if message["role"] == "assistant":  # render_chat looks for these
            continue
        if any(p.get("text", "").strip() not in text for p in message["content"]):
            raise DataError(
                f"the chat template leaves out or changes the text of {message['role']!r} in turn "
                f"{number}",
                hint="use a template that keeps it, or drop the turn",
                kind="the chat template leaves out a turn",
            )


def _name(processor: Any) -> str:
    return str(getattr(processor.tokenizer, "name_or_path", "") or "the processor")
