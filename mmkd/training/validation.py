"""Measure a stage's losses on held-out records (`data.validation`) every few steps.

    validation.jsonl            a line for each validation: step, means of objectives, and more
    checkpoints/best/step-N     weights of the best one, with `validation.keep: best`

As in training, each objective is a mean per covered token, here over all held-out records. It does
not depend on the batch layout and the number of processes, unless the objective compares the
records of a micro-batch. Objectives that compare the records of a step compare groups of as many
held-out records. Training is not affected: there are no gradients and no dropout, and the
states of random number generators are restored. Two metrics do not depend on the objectives, so
that stages with different objectives can be compared: `answer_ce`, the cross-entropy of the
    records' answers, and
`teacher_kl`, the KL divergence from the teacher on the answers, if the stage has a teacher with the
same vocabulary.
"""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.lengths import SharedLengths
from mmkd.data.microbatches import by_size, by_tokens
from mmkd.engines import Engine
from mmkd.errors import NonFiniteLossError
from mmkd.objectives import Objective
from mmkd.recipe import ANSWER_CE, TEACHER_KL, StageConfig
from mmkd.runtime import distributed
from mmkd.runtime.progress import say
from mmkd.runtime.run_folder import StageFolder
from mmkd.runtime.seeds import set_seed
from mmkd.runtime.steplog import StepLog
from mmkd.runtime.teacher_hacking import found_in
from mmkd.training.checkpoint import (
    find_checkpoints,
    load_weights,
    random_states,
    restore_random_states,
    save_checkpoint,
    step_of,
)
from mmkd.training.gathered import HeldOutFeatures

BEST = "best"
Losses = Callable[[Batch, Sequence[Objective]], dict[str, torch.Tensor]]
"""The losses of objectives on a batch, by name."""


class Validation:
    """Measures losses on the held-out records of a stage.

    Args:
        config: settings of the stage.
        objectives: of the stage, and additional metrics.
        encoder: of the held-out records.
        folder: of the stage.
        seed: of the stage, for objectives with random numbers.
    """

    def __init__(
        self,
        config: StageConfig,
        objectives: Sequence[Objective],
        encoder: Encoder,
        folder: Path,
        seed: int,
    ):
        self.stage, self.config = config, config.validation
        self.objectives, self.encoder = list(objectives), encoder
        self.folder, self.seed = folder, seed
        self.best: tuple[int, float] | None = None
        self.worse_since = 0
        self._log: StepLog | None = None
        self._lines: list[dict[str, Any]] = []
        self._signs: set[str] = set()  # teachers' metrics that have shown teacher hacking

    @property
    def checkpoints(self) -> Path:
        """Folder of the best weights."""
        return StageFolder(self.folder).checkpoints / BEST

    @cached_property
    def plan(self) -> list[list[int]]:
        """The micro-batches of all processes. Every process must call it."""
        batch, indices = self.stage.batch, chosen(self.encoder, self.config.records)
        found = SharedLengths(
            self.encoder,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            workers=self.encoder.config.workers,
        )
        lengths = dict(zip(indices, found.of(indices), strict=True))
        order = sorted(lengths, key=lengths.__getitem__)  # similar lengths need little padding
        if self.config.size is None and batch.tokens is not None:
            return by_tokens(order, lengths, batch.tokens, 1, packed=batch.pack is not None)
        return by_size(order, self.config.size or batch.size)

    def batches(self) -> Iterator[tuple[Batch, bool]]:
        """This process's micro-batches, each with whether it counts. All processes must take part
        in each forward pass of a sharded model, so a process without further micro-batches repeats
        its last one, which does not count."""
        for share in distributed.equal_shares(self.plan, 1):
            yield self.encoder.encode(share[0] if share else self.plan[-1]), bool(share)

    def begin(self, step: int, *, active: bool) -> None:
        """Read the validations up to the step at which the stage resumes.

        Args:
            step: of the checkpoint.
            active: whether this process writes files.
        """
        path = StageFolder(self.folder).validation
        self._log = StepLog(path, step, active=active, key=self.config.metric)
        if self.config.interval is not None:
            self._log.say_missing(step, self.config.interval)
        for line in self._log.found:
            self._remember(line)
        self._signs |= {*found_in(self._lines, TEACHER_KL, ANSWER_CE)}
        for path in find_checkpoints(self.checkpoints) if active else []:
            if step_of(path) > step:  # these steps are trained again
                shutil.rmtree(path)

    def due(self, step: int, last: int) -> bool:
        """Whether there is a validation after a step."""
        return self.config.interval is not None and (
            step % self.config.interval == 0 or step == last
        )

    def measure(self, losses: Losses, engine: Engine) -> Any:
        """Means over all held-out records, by name. Every process must call it.

        Args:
            losses: returns sums over a batch's rows for each objective, and its metrics.
            engine: of the stage.
        """
        kept = HeldOutFeatures(self.objectives)
        sums: dict[str, torch.Tensor] = {}
        facts = torch.zeros(3 + len(self.objectives), dtype=torch.float64)
        with undisturbed(self.seed):
            for batch, counts in self.batches():
                batch = batch.to(engine.device)
                for name, value in losses(batch, kept.objectives(batch, counts)).items():
                    value = value.detach().double() if counts else torch.zeros_like(value).double()
                    sums[name] = sums.get(name, 0) + value
                if counts:
                    facts += self._facts(batch)
        values = torch.stack(list(sums.values())).double()
        found = engine.total(torch.cat([values, facts.to(values.device)])).tolist()
        totals, (records, supervised, skipped, *rows) = found[: len(sums)], found[len(sums) :]
        names = [o.name for o in self.objectives]
        counts_of = {n: max(c, 1.0) for n, c in zip(names, rows, strict=True)}
        means = {
            name: total / counts_of[name.partition("/")[0]]
            for name, total in zip(sums, totals, strict=True)
        }
        size = self.stage.batch.records_per_step(engine.world_size)
        means |= kept.means(chosen(self.encoder, self.config.records), size, engine.device)
        loss = sum(o.config.weight * means[o.name] for o in self.objectives)
        facts_said = {"records": records, "supervised_tokens": supervised, "skipped": skipped}
        return {"loss": loss, **means, **facts_said}

    def _facts(self, batch: Batch) -> torch.Tensor:
        """Numbers of records, supervised tokens, skipped records, and rows of each objective."""
        targets = batch.targets
        rows = [int(o.counted_rows(targets).sum()) for o in self.objectives]
        facts = [len(batch.ids), int(targets.response.sum()), len(batch.skipped), *rows]
        return torch.tensor(facts, dtype=torch.float64)

    def note(self, line: dict[str, Any], engine: Engine, last: int) -> dict[str, Any]:
        """Write the line of a validation, and save the student's weights if they are the best so
        far and more steps follow. Every process must call it.

        Raises:
            NonFiniteLossError: a value is not finite.
            CheckpointError: the weights cannot be written.
        """
        step = line["step"]
        broken = [n for n, v in line.items() if not math.isfinite(v)]
        if broken:
            raise NonFiniteLossError(
                f"{', '.join(broken)} not finite in the validation at step {step}",
                where=f"stage {self.stage.name}",
                hint="lower the learning rate, or look at the records of data.validation",
            )
        value = line[self.config.metric]
        better = torch.tensor(float(self.best is None or value < self.best[1]))
        # The first process decides, because sums may be rounded differently on others.
        better = better if engine.rank == 0 else torch.zeros_like(better)
        better = engine.total(better.to(engine.device))
        line = {**line, "best": bool(better)}
        self._remember(line)
        if line["best"] and self.config.keep == "best" and step < last:
            save_checkpoint(
                self.checkpoints,
                step,
                engine,
                records_per_step=self.stage.batch.records_per_step(engine.world_size),
                keep=None,
                only_weights=True,
            )
            if engine.rank == 0:
                self.prune()
        assert self._log is not None
        self._log.write(line)
        self._log.sync()
        self._say_hacking()
        return line

    def _say_hacking(self) -> None:
        """Log the first sign of teacher hacking, for each teacher."""
        for name, sign in found_in(self._lines, TEACHER_KL, ANSWER_CE, last=True).items():
            if name not in self._signs and self._log is not None and self._log.active:
                say(f"warning: teacher hacking, by {name}: {sign}")
            self._signs.add(name)

    def _remember(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        if line.get("best"):
            self.best, self.worse_since = (line["step"], line[self.config.metric]), 0
        else:
            self.worse_since += 1

    @property
    def exhausted(self) -> bool:
        """Whether none of the last `patience` validations was better than the best before them."""
        return self.config.patience is not None and self.worse_since >= self.config.patience

    def prune(self) -> None:
        """Delete weights that are not the best any more, except those that are needed to resume
        from one of the stage's checkpoints. Only one process may call it."""
        found = {step_of(path): path for path in find_checkpoints(self.checkpoints)}
        resumed = map(step_of, find_checkpoints(self.checkpoints.parent))
        needed = {max((b for b in found if b <= step), default=0) for step in resumed}
        for step in set(found) - needed - {max(found, default=0)}:
            shutil.rmtree(found[step])

    def finish(self, engine: Engine, step: int) -> dict[str, Any]:
        """Load the weights that the stage keeps into the student, after the last step. Every
        process must call it.

        Returns:
            The entry for `done.json`.

        Raises:
            CheckpointError: the best weights are missing or damaged.
        """
        assert self.best is not None
        best, value = self.best
        if self.config.keep == "best" and best != step:
            load_weights(self.checkpoints, best, engine)
        kept = best if self.config.keep == "best" else step
        return {"metric": self.config.metric, "best_step": best, "best": value, "kept_step": kept}


def chosen(encoder: Encoder, most: int | None) -> list[int]:
    """Indices of at most `most` held-out records, evenly spread."""
    count = len(encoder.records)
    some = count if most is None else min(count, most)
    return [i * count // some for i in range(some)]


@contextmanager
def undisturbed(seed: int) -> Iterator[None]:
    """Context manager that seeds the random number generators, and restores their states."""
    states = random_states()
    set_seed(seed)
    try:
        yield
    finally:
        restore_random_states(states)
