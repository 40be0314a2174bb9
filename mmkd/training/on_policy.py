"""On-policy distillation: the loss is computed on answers that the student has sampled.

This is generalized knowledge distillation (GKD, Agarwal et al. 2024, arXiv 2306.13649, algorithm
1): a share lambda of the responses is sampled from the student, the others are those of the data
set. Gradients do not flow through the sampling.
"""

import random
from dataclasses import dataclass

from mmkd.data.answers import answered, answers_of, asked, sample_answers
from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.schema import Record
from mmkd.engines import Engine
from mmkd.errors import DataError, RecipeError
from mmkd.objectives import CrossEntropy, Preference
from mmkd.recipe import OnPolicyConfig
from mmkd.recipe.context import StageContext


@dataclass(frozen=True)
class OnPolicy:
    """Replaces some of a batch's answers with the student's own.

    Attributes:
        config: share of sampled answers, and sampling parameters.
        encoder: of the stage.
        engine: runs the student.
        seed: of the stage.
        ends: `eos_token_id` of the student's generation settings.
    """

    config: OnPolicyConfig
    encoder: Encoder
    engine: Engine
    seed: int
    ends: int | list[int] | None = None

    def batch(self, batch: Batch, step: int, micro: int) -> tuple[Batch, int]:
        """The batch with answers of the student, and the number of these answers.

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
        if not chosen:
            return batch, 0
        with self.engine.autocast():
            answers = sample_answers(
                self.engine.generate,
                self.encoder,
                prompts,
                self.config,
                seed=seed,
                device=self.engine.device,
                ends=self.ends,
            )
        own = dict(enumerate(records))
        for i, prompt, answer in zip(chosen, prompts, answers, strict=True):
            # A response needs at least one token: for an empty answer, the end of turn.
            ended = answer.finished or not answer.text
            own[i] = answered(prompt, answer.text, finished=ended)
        try:
            made = self.encoder.encode_records(batch.indices, [*own.values()], batch.skipped)
        except DataError:
            chosen = [i for i in chosen if self._can_be_read(batch.indices[i], own[i])]
            read = [own[i] if i in chosen else record for i, record in enumerate(records)]
            made = self.encoder.encode_records(batch.indices, read, batch.skipped)
        return made.to(self.engine.device), len(chosen)

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


def check_on_policy(context: StageContext) -> None:
    """Check that no objective needs the answers of the data set.

    Raises:
        RecipeError: an objective needs them.
    """
    if context.stage.on_policy is None:
        return
    for objective in context.objectives:
        if isinstance(objective, CrossEntropy | Preference):
            raise RecipeError(
                "with 'on_policy' responses are sampled from the student, not from the data set",
                where=context.at(objective),
                hint="distil with kl, reverse_kl or jsd, or put it in a stage of its own",
            )
