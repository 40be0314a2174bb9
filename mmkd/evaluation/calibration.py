"""Calibration of a model on records with true answers.

Two kinds of predictions are compared with the truth, see `mmkd.ops.calibration`:

- tokens: the true answer is given token by token (teacher forcing). A prediction is the most likely
  next token, and its confidence is the probability of this token.
- answers: of questions with options, such as yes/no and multiple choice. A prediction is the most
  likely option, and its confidence is its probability among the options. The options are compared
  at the first token in which they differ, so one forward pass gives the probabilities of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.data.chat import Rendered, mark_tokens
from mmkd.data.encoder import Encoder
from mmkd.data.records import GivenRecords
from mmkd.data.schema import Message, Record
from mmkd.data.vocabulary import token_count
from mmkd.modeling.capture import capture, check_supported
from mmkd.objectives import Signals, Targets
from mmkd.ops.calibration import Predictions, Reliability, predictions, token_predictions
from mmkd.recipe import DataConfig

MAX_LENGTH = 10**7
"""Longest sequence. Documents are not truncated: a model may refuse one that is too long for it."""


@dataclass(frozen=True)
class Exercise:
    """A question with its true answer.

    Attributes:
        record: the conversation without the answer.
        truth: the true answer.
        options: the answers that the question allows, the true one included; empty for an open
            question.
    """

    record: Record
    truth: str
    options: tuple[str, ...] = ()

    def answered(self, answer: str) -> Record:
        """The conversation with an answer; only this answer is a response."""
        content = [{"type": "text", "text": answer}]
        last: Message = {"role": "assistant", "content": content}
        messages = [*self.record.messages, last]
        return replace(self.record, messages=messages, last_answer_only=True)


@dataclass(frozen=True)
class Predicted:
    """The predictions of a batch of exercises.

    Attributes:
        tokens: of all answer tokens.
        answers: of each question with options.
        without_options: number of questions whose options do not differ in one token.
        exercises: number of exercises.
    """

    tokens: Predictions
    answers: list[Predictions]
    without_options: int
    exercises: int

    def is_finite(self) -> bool:
        return all(part.is_finite() for part in (self.tokens, *self.answers))


class Calibration:
    """Collects a model's predictions on exercises.

    Args:
        model: in eval mode; it runs where it is.
        processor: of the model.
        name: of the data, for messages.

    Attributes:
        tokens: predictions of next tokens.
        answers: predictions of options.
        without_options: number of questions whose options do not differ in one token.

    Raises:
        CheckpointError: the model's logits are not those of its head.
    """

    def __init__(self, model: Any, processor: Any, name: str):
        check_supported(model, "model")
        self.model, self.processor = model, processor
        self.tokens, self.answers = Reliability(), Reliability()
        self.without_options = 0
        self._vocabulary = token_count(processor.tokenizer)
        config = DataConfig(train=name, max_length=MAX_LENGTH)
        self._encoder = Encoder(GivenRecords(name), processor, config)

    @torch.no_grad()
    def predict(self, exercises: Sequence[Exercise]) -> "Predicted":
        """The predictions of one batch, on the CPU.

        Raises:
            DataError: an exercise cannot be encoded.
        """
        records = [e.answered(e.truth) for e in exercises]
        batch = self._encoder.encode_records([0] * len(records), records).to(self.model.device)
        signals = capture(self.model, inputs_as(batch, self.model.dtype))
        tokens = predict_tokens(signals, batch.targets, self._vocabulary)
        answers = [
            self._predict_option(signals, batch.targets, row, exercise)
            for row, exercise in enumerate(exercises)
            if exercise.options
        ]
        found = [answer.cpu() for answer in answers if answer is not None]
        return Predicted(tokens.cpu(), found, answers.count(None), len(exercises))

    def add(self, found: "Predicted") -> None:
        """Add the predictions of a batch.

        Raises:
            ValueError: a prediction is not finite.
        """
        for kind, parts in ((self.tokens, [found.tokens]), (self.answers, found.answers)):
            for part in parts:
                kind.add(part)
        self.without_options += found.without_options

    def _predict_option(
        self, signals: Signals, targets: Targets, row: int, exercise: Exercise
    ) -> Predictions | None:
        """The prediction of an option; None if the options do not differ in one token."""
        rendered = self._encoder.renderer.render(exercise.answered(exercise.truth))[0]
        words = [self._answer_tokens(rendered, option) for option in exercise.options]
        true = exercise.options.index(exercise.truth)
        place = place_of_difference(words)
        if place is None or words[true] != targets.input_ids[row][targets.response[row]].tolist():
            return None
        position = targets.predicts("response")[row].nonzero()[place, 0]
        hidden = signals.hidden[row, position].double()  # [H]
        tokens = torch.tensor([w[place] for w in words], device=hidden.device)
        logits = signals.head_weight[tokens].double() @ hidden  # [options]
        if signals.head_bias is not None:
            logits = logits + signals.head_bias[tokens].double()
        return predictions(logits[None], torch.tensor([true], device=hidden.device))

    def _answer_tokens(self, rendered: Rendered, answer: str) -> list[int]:
        """Ids of the tokens of an answer, end of turn included, without processing the images.

        Args:
            rendered: the conversation with another answer.
            answer: replaces the words of that one.
        """
        start, stop = rendered.said[-1]
        text = rendered.text[:start] + answer + rendered.text[stop:]
        end = rendered.spans[-1][1] + len(answer) - (stop - start)
        encoded = self.processor.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True
        )
        spans, said = [(rendered.spans[-1][0], end)], [(start, start + len(answer))]
        marks = mark_tokens(encoded["offset_mapping"], spans, said)
        return [i for i, marked in zip(encoded["input_ids"], marks, strict=True) if marked]

    def facts(self) -> dict[str, Any]:
        """Everything as JSON; only kinds of predictions that there are."""
        kinds = {"tokens": self.tokens, "answers": self.answers}
        found: dict[str, Any] = {name: kind.facts() for name, kind in kinds.items() if kind.count}
        return found | ({"without_options": self.without_options} if self.without_options else {})


def place_of_difference(options: Sequence[Sequence[int]]) -> int | None:
    """The first place at which token sequences differ; None if some of them have the same token
    there, or none."""
    shared = 0
    while all(len(o) > shared for o in options) and len({o[shared] for o in options}) == 1:
        shared += 1
    if any(len(o) <= shared for o in options):
        return None
    return shared if len({o[shared] for o in options}) == len(options) else None


def answer_rows(signals: Signals, targets: Targets) -> tuple[Tensor, Tensor]:
    """Final hidden states [N, H] of the rows that predict answers, and the true tokens [N]."""
    rows = targets.predicts("response")
    return signals.hidden[: len(rows)][rows], targets.next_ids()[rows]


def predict_tokens(signals: Signals, targets: Targets, vocabulary: int) -> Predictions:
    """Predictions of all answer tokens of a batch.

    Args:
        signals: of the model.
        targets: of the batch.
        vocabulary: number of the tokenizer's tokens; other rows of the head get probability 0.
    """
    hidden, true = answer_rows(signals, targets)
    return token_predictions(
        hidden, signals.head_weight, true, bias=signals.head_bias, vocab_size=vocabulary
    )


def inputs_as(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs of a batch, floating-point tensors in the model's dtype."""
    return {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in batch.inputs.items()
    }
