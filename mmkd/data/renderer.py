"""Render records as text, and compute lengths and cut-off answers from the text."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from mmkd.data.bounds import check_text
from mmkd.data.chat import Rendered, render_chat
from mmkd.data.processing import Processing, Size
from mmkd.data.records import Records
from mmkd.data.schema import Message, Record, no_response
from mmkd.data.templates import render
from mmkd.data.truncation import tokens_before_answer
from mmkd.errors import DataError
from mmkd.recipe import DataConfig

RENDERED_KEPT = 50_000

Answers = tuple[Rendered, Rendered | None]
"""A record's conversation; for a preference pair, the chosen and the rejected one."""


class Renderer:
    """Renders records with a processor's chat template.

    Args:
        records: the data set.
        processor: of a model.
        processing: calls the processor.
        config: settings of the data.
        pairs: also render the rejected answers.
        answers: a record without an answer is bad, and so is one whose whole answer would be cut
            off by `max_length`.
    """

    def __init__(
        self,
        records: Records,
        processor: Any,
        processing: Processing,
        config: DataConfig,
        *,
        pairs: bool,
        answers: bool,
    ):
        self.records, self.processor, self.processing = records, processor, processing
        self.config, self.pairs, self.answers = config, pairs, answers
        self._kept = lru_cache(maxsize=RENDERED_KEPT)(self._render)

    def __call__(self, index: int, *, keep: bool = True) -> Answers:
        """Render a record of the data set.

        Args:
            index: of the record.
            keep: store the text for the next call.

        Raises:
            DataError: it is bad.
        """
        return self._kept(index) if keep else self._render(index)

    def _render(self, index: int) -> Answers:
        return self.render(self.records[index])

    def render(self, record: Record) -> Answers:
        """Render a record.

        Raises:
            DataError: it is bad.
        """
        if self.answers and not record.has_answer:
            raise no_response()
        if not self.pairs:
            return self._conversation(record, record.messages), None
        if record.rejected is None:
            raise DataError(
                "the record has no rejected answer", hint="add 'chosen' and 'rejected' to it"
            )
        chosen, rejected = record.messages, record.rejected
        return self._conversation(record, chosen), self._conversation(record, rejected)

    def _conversation(self, record: Record, messages: list[Message]) -> Rendered:
        check_text(messages, self.config.max_length)
        whole = render_chat(self.processor, messages)
        if record.unfinished:
            cut = (whole.spans[-1][0], whole.said[-1][1])
            whole = replace(whole, spans=(*whole.spans[:-1], cut))
        if not record.last_answer_only:
            return whole
        return replace(whole, spans=whole.spans[-1:], said=whole.said[-1:])

    def prompt(self, record: Record) -> str:
        """Render a conversation with the generation prompt at its end.

        Raises:
            DataError: it is bad.
        """
        return render(self.processor, record.messages, prompt=True)

    def length(self, index: int, *, keep: bool = True) -> int:
        """Number of tokens of a record; for a pair, of the longer answer. For a bad record, it is
        the length of its replacement, or 0 if bad records stop the run.

        Args:
            index: of the record.
            keep: store the text, because this process will also encode the record.
        """
        skip = self.config.on_bad_record == "skip"
        for number in self.records.tried(index) if skip else [index]:
            try:
                record = self.records[number]
                sizes = self.records.sizes(record)
                answers = [r for r in self(number, keep=keep) if r is not None]
                longest = max(self.processing.length(r.text, sizes) for r in answers)
                if longest > self.config.max_length and self._cuts_off(answers, sizes):
                    continue
                return min(longest, self.config.max_length)
            except DataError:
                continue
        return 0

    def _cuts_off(self, answers: Sequence[Rendered], sizes: list[Size]) -> bool:
        """Whether `max_length` cuts off a whole answer of a record, and the objectives need it."""
        before = (tokens_before_answer(self.processing, r, sizes) for r in answers)
        limit = self.config.max_length
        return self.answers and any(n is not None and n >= limit for n in before)

    def loses_answer(self, index: int) -> bool:
        """Whether `max_length` cuts off a record's whole answer. False for a record that is bad for
        other reasons."""
        try:
            sizes = self.records.sizes(self.records[index])
            answers = [r for r in self(index) if r is not None]
            return self._cuts_off(answers, sizes)
        except DataError:
            return False

    def has_room(self, prompt: Record) -> bool:
        """Whether `max_length` leaves room for an answer to a prompt."""
        length = self.processing.length(self.prompt(prompt), self.records.sizes(prompt))
        return length < self.config.max_length
