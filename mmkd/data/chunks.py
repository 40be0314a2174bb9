"""Chunks of answers: the shortest pieces that begin and end at token boundaries of two tokenizers.

Positions are characters of the answer's words. A boundary is a position at which one token ends and
the next begins, so there is none inside of a character whose bytes several tokens share. Text that
the template adds to the words belongs to no chunk, except the end-of-turn token, which is a chunk
of its own.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mmkd.data.chat import Rendered, Span, expanded_spans
from mmkd.errors import RecipeError
from mmkd.objectives import Boundaries, Chunks, ChunkTokens
from mmkd.recipe.context import StageContext

Piece = tuple[range, range]
"""The tokens of a chunk, as ranges in the student's and the teacher's row."""


@dataclass(frozen=True)
class Answer:
    """Token boundaries of one model in an answer.

    Attributes:
        words: text of the answer.
        cuts: position in the words -> index of the first token after it, in the row.
        end: index of the end-of-turn token; None if there is none.
    """

    words: str
    cuts: dict[int, int]
    end: int | None


def cut_answers(
    rendered: Rendered,
    replacements: list[dict[str, Any]],
    offsets: Sequence[Span],
    ids: Sequence[int],
    specials: Collection[int],
) -> list[Answer]:
    """Find the token boundaries in the answers of a conversation.

    Args:
        rendered: the conversation.
        replacements: the processor's `text_replacement_offsets` of it.
        offsets: (start, end) characters of its tokens.
        ids: its tokens.
        specials: ids of special tokens.
    """
    found = []
    said = expanded_spans(rendered.said, replacements)
    whole = expanded_spans(rendered.spans, replacements)
    for (first, last), (start, stop), (_, closed) in zip(rendered.said, said, whole, strict=True):
        words = rendered.text[first:last]
        tokens = {
            number: (max(a - start, 0), min(b - start, len(words)))
            for number, (a, b) in enumerate(offsets)
            if a < stop and b > start
        }
        ends = (
            number
            for number, (a, b) in enumerate(offsets)
            if stop <= a < min(b, closed) and ids[number] in specials
        )
        found.append(Answer(words, _cuts(words, tokens), next(ends, None)))
    return found


def _cuts(words: str, tokens: dict[int, Span]) -> dict[int, int]:
    """Position -> index of the first token after it.

    A tokenizer may leave out whitespace at the ends of a token from its offsets. Then line breaks
    are assigned to the token before them and other whitespace to the token after it, as in
    byte-level BPE.
    """
    cuts: dict[int, int] = {}
    end = 0
    for number, (start, stop) in tokens.items():
        if end < start < stop:
            end += words[end:start].rfind("\n") + 1
        if start > end:
            start = end
        if start == end:
            cuts.setdefault(start, number)
        end = max(end, stop)
    if tokens:
        cuts.setdefault(len(words), max(tokens) + 1)
    return cuts


def pair_chunks(
    student: Tensor,
    teacher: Tensor,
    mine: list[list[Answer]],
    theirs: list[list[Answer]],
    names: list[str],
    boundary_tokens: tuple[Tensor, Tensor] | None = None,
) -> Chunks:
    """Find the chunks of a batch.

    Args:
        student: [B, T] int64, tokens of the student, which may be truncated.
        teacher: [B, T'] int64, tokens of the teacher.
        mine, theirs: token boundaries in the answers of each row, for student and teacher.
        names: of the rows, for messages.
        boundary_tokens: [V] and [V'] bool, the tokens of student and teacher that begin with white
            space or are special; None for chunks without boundaries.

    Raises:
        ValueError: the words of an answer differ between student and teacher.
    """
    widths = student.shape[1], teacher.shape[1]
    pieces: list[tuple[int, Piece]] = []
    answers: list[int] = []
    closing: list[bool] = []
    count = 0
    for row, (name, ours, others) in enumerate(zip(names, mine, theirs, strict=True)):
        if [a.words for a in ours] != [a.words for a in others]:
            raise ValueError(f"the answers of {name} are not those of the teacher's row")
        for pair in zip(ours, others, strict=True):
            for piece, ends in _pieces(*pair):
                if all(t.stop <= width for t, width in zip(piece, widths, strict=True)):
                    pieces.append((row, piece))
                    answers.append(count)
                    closing.append(ends)
            count += 1
    bounds = None
    if boundary_tokens is not None:
        numbers = torch.tensor(answers, dtype=torch.long)
        bounds = Boundaries(numbers, torch.tensor(closing, dtype=torch.bool), *boundary_tokens)
    return Chunks(
        _tokens(student, [(row, piece[0]) for row, piece in pieces]),
        _tokens(teacher, [(row, piece[1]) for row, piece in pieces]),
        bounds,
    )


def _pieces(mine: Answer, theirs: Answer) -> Iterator[tuple[Piece, bool]]:
    """The chunks of an answer, and whether each is the end of the turn."""
    shared = sorted(mine.cuts.keys() & theirs.cuts.keys())
    for start, stop in pairwise(shared):
        words = (
            range(mine.cuts[start], mine.cuts[stop]),
            range(theirs.cuts[start], theirs.cuts[stop]),
        )
        yield words, False
    if mine.end is not None and theirs.end is not None:
        yield (range(mine.end, mine.end + 1), range(theirs.end, theirs.end + 1)), True


def _tokens(ids: Tensor, pieces: list[tuple[int, range]]) -> ChunkTokens:
    places = [row * ids.shape[1] + token for row, tokens in pieces for token in tokens]
    chunk = [number for number, (_, tokens) in enumerate(pieces) for _ in tokens]
    at = torch.tensor(places, dtype=torch.long)
    # each token is predicted at the position before it
    return ChunkTokens(at - 1, ids.flatten()[at], torch.tensor(chunk, dtype=torch.long))


def check_chunks(context: StageContext) -> None:
    """Check that objectives on chunks have one teacher, which is used for all records.

    Raises:
        RecipeError: there are several teachers, or the teacher has `sources`.
    """
    teachers = context.recipe.teachers
    if len(teachers) < 2 and not any(t.sources for t in teachers):
        return
    for objective in context.needing("chunks"):
        raise RecipeError(
            "it needs one teacher that is used for all records",
            where=context.at(objective),
            hint="name one teacher without 'sources', or use kl",
        )
