"""From messages to text and response mask, by the processor's own chat template.

The template is rendered up to each assistant turn with its generation prompt, and up to the turn's
end: what lies between is what the model has to say. No template is parsed or special-cased.
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
        said: of the words in each response, without what the template puts around them.
    """

    text: str
    spans: tuple[Span, ...]
    said: tuple[Span, ...]


def render_chat(processor: Any, messages: list[Message]) -> Rendered:
    """Render a conversation and find its responses, end-of-turn tokens included.

    A template that does not close the last turn (LLaVA-1.5's) gets the tokenizer's EOS token
    there: a student has to learn to stop.

    Raises:
        DataError: the template rewrites earlier turns or the responses, so that no mask fits.
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
        if at < 0 and i + 1 < len(messages):  # Qwen3 writes the last answer otherwise
            end = _common_length(text, template(_wordless(messages, i + 1), False))
            at = text.find(said, start, end)
        if start < len(prefix):  # LLaVA-OneVision's generation prompt has other whitespace
            other = (prefix[start:] + text[start : max(at, start)]).strip()
            # Qwen3.5's begins thoughts, which it leaves out of earlier answers.
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
    """Whether the generation prompt ends in a blank (`ASSISTANT: `) that is a token of its own at
    inference, but part of the answer's first token in training."""
    prompt, whole = render(processor, PROBE[:1], prompt=True), render(processor, PROBE)
    if not prompt.endswith((" ", "\t")) or not whole.startswith(prompt):
        return False
    asked, trained = (
        processor.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole)
    )
    return trained[: len(asked)] != asked


def _find_words(text: str, said: str, start: int, end: int, wordless: Callable[[], str]) -> int:
    """Where an answer's words begin in text[start:end], or -1.

    Args:
        text: the rendered conversation.
        said: the words, without blanks around them.
        start, end: where the turn lies in the text.
        wordless: renders the conversation with this answer left empty.
    """
    first = text.find(said, start, end)
    if first < 0 or not said or text.find(said, first + 1, end) < 0:
        return first
    # The template's own words may hold the answer, as "<think>" holds "hi" and "<|im_end|>" "end".
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
    """Where an answer begins: at its words (`at`), or at its own leading blanks if the template
    keeps them."""
    blanks = len(whole) - len(whole.lstrip())
    return at - blanks if at >= blanks and text[at - blanks : at] == whole[:blanks] else at


def _common_length(a: str, b: str) -> int:
    if a.startswith(b):  # as good as always, and faster than looking at each character
        return len(b)
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _wordless(messages: list[Message], number: int) -> list[Message]:
    """The conversation with one message left empty. Its text equals the whole one's up to the words
    of that message."""
    empty = {**messages[number], "content": [{"type": "text", "text": ""}]}
    return [*messages[:number], empty, *messages[number + 1 :]]


def _end_of_turn(text: str, said_end: int, end: int, tokenizer: Any) -> tuple[int, bool]:
    """Where a turn ends: behind its first special token, or with its last word."""
    found = _specials_of(tokenizer).search(text, said_end, end)
    return (found.end(), True) if found else (said_end, False)


@lru_cache(maxsize=32)
def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of tokens that are no text: those that the tokenizer has a name for, and others that
    are marked so, as Gemma's end of turn."""
    marked = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    named = tokenizer.all_special_tokens
    return {**marked, **dict(zip(named, tokenizer.convert_tokens_to_ids(named), strict=True))}


@lru_cache(maxsize=32)
def _specials_of(tokenizer: Any) -> re.Pattern[str]:
    longest_first = sorted(special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def expanded_spans(spans: tuple[Span, ...], replacements: list[dict[str, Any]]) -> list[Span]:
    """Move spans to the text in which image placeholders are written out.

    Args:
        spans: characters of the text before the processor expanded it.
        replacements: the processor's `text_replacement_offsets` of this row.
    """
    ends = [r["span"][1] for r in replacements]
    shifts = [0] + [r["new_span"][1] - r["span"][1] for r in replacements]
    return [
        (start + shifts[bisect_right(ends, start)], stop + shifts[bisect_right(ends, stop)])
        for start, stop in spans
    ]


def mark_tokens(offsets: list[Span], spans: list[Span], words: list[Span]) -> list[bool]:
    """Which tokens are part of a response.

    A token that begins before a response is part of it if it holds some of its words: tokenizers
    join the blank that ends a generation prompt (`ASSISTANT: `) with the word behind it.

    Args:
        offsets: (start, end) characters of each token. A token of blanks alone may be empty: some
            tokenizers trim blanks (`trim_offsets`).
        spans: characters of each response, end of turn included.
        words: characters of the words of each response.
    """

    def is_response(start: int, stop: int) -> bool:
        if stop == start:
            return any(a < start < b for a, b in spans)
        return any(a <= start < b for a, b in spans) or any(
            start < b and stop > a for a, b in words if a < b
        )

    return [is_response(start, stop) for start, stop in offsets]
