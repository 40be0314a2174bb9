"""On-policy distillation: the student answers, the teacher says how it would go on at every token.

Generalized knowledge distillation (GKD, Agarwal et al. 2024, arXiv 2306.13649, algorithm 1): a
share lambda of the responses is sampled from the student, the rest is the data set's; gradients do
not go through the sampling.
"""

import random
from dataclasses import dataclass

from mmkd.data.answers import answered, answers_of, asked, sample_answers
from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.schema import Record
from mmkd.engines import Engine
from mmkd.recipe import OnPolicyConfig


@dataclass(frozen=True)
class OnPolicy:
    """Replaces some of a batch's answers by the student's.

    Attributes:
        config: how many, and how they are sampled.
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
        """The batch with the student's answers, and how many there are.

        Of a conversation with several answers one is drawn, and the conversation ends with it;
        where `max_length` has no room for an answer, the data set's stay. The draw is a function of
        seed, step, micro-batch and rank alone.
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
        for i, prompt, answer in zip(chosen, prompts, answers, strict=True):
            # A response needs a token: of an empty one that is its end.
            ended = answer.finished or not answer.text
            records[i] = answered(prompt, answer.text, finished=ended)
        made = self.encoder.encode_records(batch.indices, records, batch.skipped)
        return made.to(self.engine.device), len(chosen)

    def _answers(self, record: Record) -> list[int]:
        """The messages that the student may answer instead: `max_length` has room behind what
        they answer."""
        found = answers_of(record)
        return [i for i in found if self.encoder.has_room(asked(record, i))]
