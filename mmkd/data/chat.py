"""Render messages with the processor's chat template, and find the responses in the text.

The template is rendered up to the generation prompt of each assistant turn, and up to the end of
the turn. The text in between is the response. No template is parsed or treated specially.
"""

import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from mmkd.data.schema import Message
from mmkd.data.templates import PROBE, render
from mmkd.errors import DataError

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: by the chat template.
        spans: (start, end) characters of each response, end of turn included.
        said: (start, end) characters of the words of each response, without text that the template
            adds.
    """

    text: str
    spans: tuple[Span, ...]
    said: tuple[Span, ...]


def render_chat(processor: Any, messages: list[Message]) -> Rendered:
    """Render a conversation and find its responses, end-of-turn tokens included.

    If a template does not close the last turn (LLaVA-1.5's), the tokenizer's EOS token is appended,
    so that a student learns to stop.

    Raises:
        DataError: the template changes earlier turns or the responses, so they cannot be found.
    """

    def template(part: list[Message], prompt: bool) -> str:
        return render(processor, part, prompt=prompt)

    text = template(messages, False)
    tokenizer = processor.tokenizer
    spans: list[Span] = []
    words: list[Span] = []
    closed = False
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prefix = template(messages[:i], True)
        start = _common_length(text, prefix)
        end = _common_length(text, template(messages[: i + 1], False))
        whole = "".join(p["text"] for p in message["content"] if p["type"] == "text")
        said = whole.strip()
        empty = partial(template, _wordless(messages, i), False)
        at = _find_words(text, said, start, end, empty)
        if at < 0 and i + 1 < len(messages):  # Qwen3 renders the last answer differently
            end = _common_length(text, template(_wordless(messages, i + 1), False))
            at = text.find(said, start, end)
        if start < len(prefix):  # LLaVA-OneVision's generation prompt has different whitespace
            other = (prefix[start:] + text[start : max(at, start)]).strip()
            # Qwen3.5's prompt begins a thinking block, which is left out of earlier answers.
            if other and not text.startswith(template(messages[:i], False)):
                raise DataError(
                    f"the chat template rewrites the conversation before turn {i}",
                    hint="use a template that only appends",
                )
            start = max(_first_blank(text, whole, at), start)
        if at < 0:
            raise DataError(
                f"the chat template changes the response of turn {i}",
                hint="use a template that keeps responses as they are",
            )
        stop, closed = _end_of_turn(text, at + len(said), end, tokenizer)
        spans.append((start, stop))
        words.append((at, at + len(said)))
    if not closed and spans and tokenizer.eos_token and messages[-1]["role"] == "assistant":
        start, stop = spans[-1]
        text = text[:stop] + tokenizer.eos_token
        spans[-1] = (start, len(text))
    return Rendered(text, tuple(spans), tuple(words))


def prompt_ends_in_blank(processor: Any) -> bool:
    """Whether the generation prompt ends in a space (`ASSISTANT: `), which is a token of its own at
    inference but part of the answer's first token in training."""
    prompt, whole = render(processor, PROBE[:1], prompt=True), render(processor, PROBE)
    if not prompt.endswith((" ", "\t")) or not whole.startswith(prompt):
        return False
    asked, trained = (
        processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole)
    )
    return trained[: len(asked)] != asked


def _find_words(text: str, said: str, start: int, end: int, wordless: Callable[[], str]) -> int:
    """Find the first character of an answer's words in text[start:end]; -1 if they are not there.

    Args:
        text: the rendered conversation.
        said: the words, without surrounding whitespace.
        start, end: of the turn in the text.
        wordless: renders the conversation with this answer empty.
    """
    first = text.find(said, start, end)
    if first < 0 or not said or text.find(said, first + 1, end) < 0:
        return first
    # The template's own text may contain the answer, as "<think>" contains "hi".
    try:
        empty = wordless()
    except DataError:  # it refuses empty answers
        return first
    found = first
    while first >= 0:
        if empty.startswith(text[:first].rstrip()):
            found = first
        first = text.find(said, first + 1, end)
    return found


def _first_blank(text: str, whole: str, at: int) -> int:
    """The first character of an answer: of its words (`at`), or of its leading whitespace if the
    template keeps it."""
    blanks = len(whole) - len(whole.lstrip())
    return at - blanks if at >= blanks and text[at - blanks : at] == whole[:blanks] else at


def _common_length(a: str, b: str) -> int:
    if a.startswith(b):  # nearly always, and faster than comparing characters
        return len(b)
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _wordless(messages: list[Message], number: int) -> list[Message]:
    """The conversation with one message empty. Its text is equal up to the words of the message."""
    empty = {**messages[number], "content": [{"type": "text", "text": ""}]}
    return [*messages[:number], empty, *messages[number + 1 :]]


def _end_of_turn(text: str, said_end: int, end: int, tokenizer: Any) -> tuple[int, bool]:
    """The end of a turn: after its first special token, or after its last word; and whether there
    is a special token."""
    found = _specials_of(tokenizer).search(text, said_end, end)
    return (found.end(), True) if found else (said_end, False)


@lru_cache(maxsize=32)
def special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of special tokens: those with a name in the tokenizer, and added tokens that are marked
    as special, such as Gemma's end of turn."""
    marked = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = tokenizer.all_special_tokens
    return {**marked, **dict(zip(named, tokenizer.convert_tokens_to_ids(named), strict=True))}


@lru_cache(maxsize=32)
def _specials_of(tokenizer: Any) -> re.Pattern[str]:
    longest_first = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def expanded_spans(spans: tuple[Span, ...], replacements: list[dict[str, Any]]) -> list[Span]:
    """Convert spans to the text with expanded image placeholders.

    Args:
        spans: (start, end) characters in the text before the processor expanded it.
        replacements: the processor's `text_replacement_offsets` of this row.
    """
    ends = [r["span"][1] for r in replacements]
    shifts = [0] + [r["new_span"][1] - r["span"][1] for r in replacements]
    return [
        (start + shifts[bisect_right(ends, start)], stop + shifts[bisect_right(ends, stop)])
        for start, stop in spans
    ]


def mark_tokens(offsets: list[Span], spans: list[Span], words: list[Span]) -> list[bool]:
    """Mark the tokens that are part of a response.

    A token that begins before a response is part of it if it contains some of its words, because
    tokenizers join the space at the end of a generation prompt (`ASSISTANT: `) with the next word.

    Args:
        offsets: (start, end) characters of each token. A token of whitespace may be empty, because
            some tokenizers trim whitespace (`trim_offsets`).
        spans: characters of each response, including the end of turn.
        words: characters of the words of each response.
    """

    def is_response(start: int, stop: int) -> bool:
        if stop == start:
            return any(a < start < b for a, b in spans)
        return any(a <= start < b for a, b in spans) or any(
            start < b and stop > a for a, b in words if a < b
        )

    return [is_response(start, stop) for start, stop in offsets]
