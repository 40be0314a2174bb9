"""Correct the student's sampled answers with the teacher.

A student that continues after a wrong token sees texts that its teacher would not write. This is in
the spirit of sequence correction and re-generation (SCRG, arXiv 2407.10068), of which no code was
found:

    y ~ student;    j = argmax KL(p_t || q_t) over the positions t with argmax p_t != y_t
    y_j <- argmax p_j;    y_{j+1}, y_{j+2}, ... ~ student

p and q are the distributions of teacher and student at temperature 1. If no token differs, y stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmkd.data.answers import Sampled, continue_answers
from mmkd.data.batch import Batch
from mmkd.data.continuation import append_tokens
from mmkd.data.encoder import Encoder
from mmkd.data.generation import end_tokens, padding_token
from mmkd.data.schema import Record
from mmkd.data.templates import media_token_ids
from mmkd.data.vocabulary import same_vocabulary
from mmkd.engines import Engine
from mmkd.errors import RecipeError
from mmkd.objectives import Objective, Signals
from mmkd.ops import Head, row_kl
from mmkd.recipe import SamplingConfig
from mmkd.recipe.context import StageContext
from mmkd.teachers import LiveTeacher, TeacherSet

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Answers:
    """Sampled answers of a micro-batch.

    Attributes:
        indices: of the records in the data set.
        prompts: of the answers.
        inputs: of the prompts, as `Encoder.prompts` returns them.
        answers: of the student.
        replaced: for each answer, the positions of its tokens that the teacher has replaced.
    """

    indices: list[int]
    prompts: list[Record]
    inputs: Inputs
    answers: list[Sampled]
    replaced: list[tuple[int, ...]]


def reads_distribution(objective: Objective) -> bool:
    """Whether an objective compares the teacher's output distributions."""
    return objective.needs >= {"teacher", "distribution"}


@dataclass(frozen=True)
class Corrector:
    """Replaces the worst token of each sampled answer, and lets the student continue.

    A record's teacher is the first one in the recipe's order that an objective compares with the
    student's distribution on the record's source. An answer without such a teacher stays.

    Attributes:
        settings: sampling parameters.
        encoder: of the stage.
        engine: runs the student.
        teachers: of the stage.
        objectives: of the stage that compare output distributions, one for each of their teachers.
        ends: `eos_token_id` of the student's generation settings.
    """

    settings: SamplingConfig
    encoder: Encoder
    engine: Engine
    teachers: TeacherSet
    objectives: Sequence[Objective]
    ends: int | list[int] | None = None

    def correct(self, found: Answers, seeds: Sequence[int]) -> Answers:
        """Correct answers as often as there are seeds.

        Args:
            found: the answers.
            seeds: of the student's random numbers, one for each round.
        """
        answers, replaced = [*found.answers], [*found.replaced]
        theirs = found.inputs
        if self.encoder.teacher is not None:  # the primary teacher has another processor
            theirs = self.encoder.teacher.prompts(found.prompts, filler=True)
        for seed in seeds:
            tokens = self._tokens(answers, found.inputs, theirs)
            changes = self._changes(found.indices, tokens, found.inputs, theirs)
            with self.engine.autocast():
                continued = continue_answers(
                    self.engine.generate,
                    self.encoder,
                    found.prompts,
                    found.inputs,
                    {row: [*tokens[row][:at], token] for row, (at, token) in changes.items()},
                    self.settings,
                    seed=seed,
                    device=self.engine.device,
                    ends=self.ends,
                )
            for row, answer in continued.items():
                answers[row] = answer
                replaced[row] = (*replaced[row], changes[row][0])
        return replace(found, answers=answers, replaced=replaced)

    def idle(self, batch: Batch, rounds: int) -> None:
        """Run the models as often as `correct` does, on a batch without sampled answers. Processes
        that share weights must run them equally often.

        Args:
            batch: on the engine's device.
            rounds: number of rounds.
        """
        if self.engine.world_size == 1:
            return
        for _ in range(rounds):
            with torch.no_grad(), self.engine.autocast():
                for name, teacher in self._teachers().items():
                    if teacher.spread:
                        own = batch.teacher if name == self.teachers.primary else None
                        teacher.run((own or batch).inputs)
            self.engine.evaluate(batch.inputs, lambda student: ())

    def _teachers(self) -> dict[str, LiveTeacher]:
        """The teachers that can correct answers, in the recipe's order."""
        names = {o.teacher or self.teachers.primary for o in self.objectives}
        members = self.teachers.members
        return {n: t for n, t in members.items() if n in names and isinstance(t, LiveTeacher)}

    def _teacher_of(self, index: int) -> str | None:
        source = self.encoder.records.source_of(index)
        covering = {
            o.teacher or self.teachers.primary
            for o in self.objectives
            if o.sources is None or source in o.sources
        }
        return next((name for name in self._teachers() if name in covering), None)

    def _tokens(self, answers: list[Sampled], mine: Inputs, theirs: Inputs) -> list[list[int]]:
        """Tokens of the answers that both models can read, up to `max_length`: without those that
        stand for images, which do not get into the answers' texts either."""
        media = self._media()
        lengths = torch.maximum(*(i["attention_mask"].sum(1) for i in (mine, theirs))).tolist()
        limit = self.encoder.config.max_length
        size = self.objectives[0].shared_vocabulary
        readable = [
            [t for t in a.tokens if t not in media and (size is None or t < size)] for a in answers
        ]
        rows = zip(readable, lengths, strict=False)  # the filler has no answer
        return [tokens[: max(limit - length, 0)] for tokens, length in rows]

    def _media(self) -> set[int]:
        return {*media_token_ids(self.encoder.processor), self.encoder.processing.image_token_id}

    def _changes(
        self, indices: list[int], tokens: list[list[int]], mine: Inputs, theirs: Inputs
    ) -> dict[int, tuple[int, int]]:
        """By row of an answer that changes: the position and the new token."""
        named = [self._teacher_of(index) for index in indices]
        rows = {
            name: [i for i, other in enumerate(named) if other == name and tokens[i]]
            for name in self._teachers()
        }
        heads = self._teacher_heads(rows, tokens, mine, theirs)
        inputs, starts = self._answered(mine, tokens, self.encoder)

        def compare(student: Signals) -> list[tuple[Tensor, Tensor]]:
            return [
                row_kl(
                    _head(student, starts, tokens, rows[name]),
                    head,
                    vocab_size=self.objectives[0].shared_vocabulary,
                    memory=self.objectives[0].head_memory,
                )
                for name, head in heads.items()
            ]

        changes: dict[int, tuple[int, int]] = {}
        compared = self.engine.evaluate(inputs, compare)
        for name, (divergences, best) in zip(heads, compared, strict=True):
            said = [torch.tensor(tokens[row]) for row in rows[name]]
            best = best.cpu()
            differs = self._differs(torch.cat(said), best)
            divergences = divergences.cpu().masked_fill(~differs, -torch.inf)
            sizes = [len(t) for t in said]
            parts = (x.split(sizes) for x in (differs, divergences, best))
            for row, changed, divergence, choices in zip(rows[name], *parts, strict=True):
                if changed.any():
                    at = int(divergence.argmax())
                    changes[row] = (at, int(choices[at]))
        return dict(sorted(changes.items()))

    def _differs(self, said: Tensor, best: Tensor) -> Tensor:
        """Where the teacher would say something else, [N] bool: another token that the student's
        answer can have, other than one end token in place of another."""
        ends = torch.tensor(end_tokens(self.encoder.processor, self.ends))
        media = torch.tensor(sorted(self._media()))
        both_end = torch.isin(said, ends) & torch.isin(best, ends)
        return (best != said) & ~both_end & ~torch.isin(best, media)

    def _teacher_heads(
        self, rows: dict[str, list[int]], tokens: list[list[int]], mine: Inputs, theirs: Inputs
    ) -> dict[str, Head]:
        """The hidden states of each teacher at the answers that it corrects, with its head. A
        sharded teacher runs even if it corrects none."""
        heads = {}
        for name, teacher in self._teachers().items():
            if not rows[name] and not teacher.spread:
                continue
            own = name == self.teachers.primary and self.encoder.teacher is not None
            encoder = self.encoder.teacher if own else self.encoder
            assert encoder is not None
            inputs, starts = self._answered(theirs if own else mine, tokens, encoder)
            with torch.no_grad(), self.engine.autocast():
                signals = teacher.run(inputs)
            if rows[name]:
                heads[name] = _head(signals, starts, tokens, rows[name])
        return heads

    def _answered(
        self, inputs: Inputs, tokens: list[list[int]], encoder: Encoder
    ) -> tuple[Inputs, list[int]]:
        """Inputs of prompts and answers, and of each row the position that predicts the first token
        of the answer."""
        padding = padding_token(encoder.processor, []) or 0
        longer = append_tokens(inputs, tokens, side="right", padding=padding)
        starts = (inputs["attention_mask"].sum(1) - 1).tolist()
        return {k: v.to(self.engine.device) for k, v in longer.items()}, starts


def _head(
    signals: Signals, starts: list[int], tokens: list[list[int]], rows: Sequence[int]
) -> Head:
    """The head with the hidden states that predict the tokens of some answers, [N, H]."""
    parts = [signals.hidden[row, starts[row] : starts[row] + len(tokens[row])] for row in rows]
    return Head(torch.cat(parts), signals.head_weight, signals.head_bias)


def check_correction(context: StageContext) -> None:
    """Check that the teacher can correct the student's answers.

    Raises:
        RecipeError: it cannot.
    """
    settings = context.stage.on_policy
    if settings is None or not settings.correct:
        return
    where = f"{context.where}: on_policy.correct"
    if not any(map(reads_distribution, context.objectives)):
        raise RecipeError(
            "no objective reads the teacher's distribution, which chooses the tokens",
            where=where,
            hint="add kl, reverse_kl or jsd, or set it to 0",
        )
    theirs = context.teacher_processor
    if theirs is not None and not same_vocabulary(context.processor.tokenizer, theirs.tokenizer):
        raise RecipeError(
            "the teacher has another tokenizer, so its tokens cannot replace the student's",
            where=where,
            hint="use a teacher of the same tokenizer family, or set it to 0",
        )
