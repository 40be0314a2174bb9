"""On-policy distillation: the loss is computed on answers that the student has sampled.

This is generalized knowledge distillation (GKD, Agarwal et al. 2024, arXiv 2306.13649, algorithm
1): a share lambda of the responses is sampled from the student, the others are those of the data
set. Gradients do not flow through the sampling. With `correct`, the teacher corrects the sampled
responses: `mmkd.training.correction`.
"""

import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from mmkd.data.answers import answered, answers_of, asked, sample_answers
from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.schema import Record
from mmkd.engines import Engine
from mmkd.errors import DataError, RecipeError
from mmkd.recipe import OnPolicyConfig
from mmkd.recipe.context import StageContext
from mmkd.training.correction import Answers, Corrector, check_correction


@dataclass(frozen=True)
class AnswerCounts:
    """Counts of sampled answers.

    Attributes:
        sampled: answers of the student.
        corrected: answers of these in which the teacher has replaced a token.
        replaced: tokens that it has replaced.
        positions: sum of their positions in the answers, from 0.
    """

    sampled: int = 0
    corrected: int = 0
    replaced: int = 0
    positions: int = 0

    def __add__(self, other: "AnswerCounts") -> "AnswerCounts":
        return AnswerCounts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class OnPolicy:
    """Replaces some of a batch's answers with the student's own.

    Attributes:
        config: share of sampled answers, and sampling parameters.
        encoder: of the stage.
        engine: runs the student.
        seed: of the stage.
        ends: `eos_token_id` of the student's generation settings.
        corrector: replaces tokens of the answers; None without `correct`.
    """

    config: OnPolicyConfig
    encoder: Encoder
    engine: Engine
    seed: int
    ends: int | list[int] | None = None
    corrector: Corrector | None = None

    def batch(self, batch: Batch, step: int, micro: int) -> tuple[Batch, AnswerCounts]:
        """The batch with answers of the student, and the numbers of these answers.

        In a conversation with several answers, one is chosen at random, and the conversation ends
        with it. An answer of the data set is not replaced if `max_length` leaves no space for
        another one, or if the chat template or a processor refuses the student's answer (some
        templates interpret `</think>` in an answer). The choice is a function of seed, step,
        micro-batch and rank.
        """
        place = (step * 4096 + micro) * self.engine.world_size + self.engine.rank
        draw = random.Random(self.seed * 2**32 + place)
        records = [self.encoder.records[i] for i in batch.indices]
        chosen = [i for i in range(len(records)) if draw.random() < self.config.lmbda]
        asking = {i: draw.choice(found) for i in chosen if (found := self._answers(records[i]))}
        chosen = [*asking]
        prompts = [asked(records[i], answer) for i, answer in asking.items()]
        seed = draw.getrandbits(31)
        seeds = [draw.getrandbits(31) for _ in range(self.config.correct)]
        if not chosen:
            if self.corrector is not None:
                self.corrector.idle(batch, len(seeds))
            return batch, AnswerCounts()
        sampled = self._sampled([batch.indices[i] for i in chosen], prompts, seed)
        if self.corrector is not None:
            sampled = self.corrector.correct(sampled, seeds)
        own = dict(enumerate(records))
        for i, prompt, answer in zip(chosen, prompts, sampled.answers, strict=True):
            # A response needs at least one token: for an empty answer, the end of turn.
            ended = answer.finished or not answer.text
            own[i] = answered(prompt, answer.text, finished=ended)
        bad: set[int] = set()
        try:
            made = self.encoder.encode_records(batch.indices, [*own.values()], batch.skipped)
        except DataError:
            bad = {i for i in chosen if not self._can_be_read(batch.indices[i], own[i])}
            read = [records[i] if i in bad else own[i] for i in own]
            made = self.encoder.encode_records(batch.indices, read, batch.skipped)
        used = [r for i, r in zip(chosen, sampled.replaced, strict=True) if i not in bad]
        return made.to(self.engine.device), _count(used)

    def _sampled(self, indices: list[int], prompts: list[Record], seed: int) -> Answers:
        inputs = self.encoder.prompts(prompts, filler=self.corrector is not None)
        with self.engine.autocast():
            answers = sample_answers(
                self.engine.generate,
                self.encoder,
                prompts,
                self.config,
                seed=seed,
                device=self.engine.device,
                ends=self.ends,
                inputs=inputs,
            )
        return Answers(indices, prompts, inputs, answers, [()] * len(answers))

    def _can_be_read(self, index: int, record: Record) -> bool:
        try:
            self.encoder.encode_records([index], [record])
        except DataError:
            return False
        return True

    def _answers(self, record: Record) -> list[int]:
        """Indices of the answers that may be replaced, because `max_length` leaves space."""
        found = answers_of(record)
        return [i for i in found if self.encoder.has_room(asked(record, i))]


def _count(replaced: Sequence[Sequence[int]]) -> AnswerCounts:
    """Count answers from the positions of their replaced tokens."""
    places = [at for row in replaced for at in row]
    return AnswerCounts(len(replaced), sum(map(bool, replaced)), len(places), sum(places))


def check_on_policy(context: StageContext) -> None:
    """Check that no objective needs the answers of the data set, and that the teacher can correct
    the student's.

    Raises:
        RecipeError: an objective needs them, or the teacher cannot.
    """
    if context.stage.on_policy is None:
        return
    for objective in context.objectives:
        if objective.config.learns_answers:
            raise RecipeError(
                "with 'on_policy' responses are sampled from the student, not from the data set",
                where=context.at(objective),
                hint="distil with kl, reverse_kl or jsd, or put it in a stage of its own",
            )
    check_correction(context)
