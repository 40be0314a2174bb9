"""The training loop of a stage.

    for each step:
        rows_o <- number of rows of objective o, summed over micro-batches and ranks  (all-reduce)
        features of objectives that compare all records of the step   (`mmkd.training.gathered`)
        for each micro-batch:
            s <- student(batch);  t <- teacher(batch)
            loss <- sum_o weight_o * (1/rows_o) * sum over this micro-batch's rows of o(s, t)
            backward(loss)
        metrics, requests to stop, summed over ranks  (all-reduce)
        sum gradients over ranks, clip, update

So each objective is a mean per covered token of the global batch.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.data.image_tokens import ImageTokenDropout
from mmkd.data.stream import BatchStream
from mmkd.engines import Engine
from mmkd.errors import AGAIN, DataError, NonFiniteLossError, StoppedError
from mmkd.modeling.capture_request import CaptureRequest, LayerPlan
from mmkd.objectives import (
    Objective,
    Signals,
    expert_counts,
    score,
)
from mmkd.objectives.gradient_norms import GradientNorms
from mmkd.recipe import StageConfig
from mmkd.runtime import distributed
from mmkd.runtime.interrupt import asked, deferred, requested
from mmkd.runtime.progress import Bar
from mmkd.runtime.run_folder import StageFolder
from mmkd.runtime.steplog import StepLog
from mmkd.teachers import Reference, TeacherSet, reference_name
from mmkd.training.callbacks import Callback
from mmkd.training.checkpoint import load_checkpoint, save_checkpoint, saved_mixture
from mmkd.training.domains import CE, Domains
from mmkd.training.gathered import MicroBatch, first_pass, gathered_objectives
from mmkd.training.on_policy import AnswerCounts, OnPolicy
from mmkd.training.shared_vision import SharedVision
from mmkd.training.step_metrics import Metrics, count_batches, sum_losses
from mmkd.training.trackers import Tracked, Trackers
from mmkd.training.validation import Validation

Scored = tuple[dict[str, Tensor], dict[int, Tensor]]
"""The loss, its parts by name, and by layer the number of tokens of each expert."""

Result = TypeVar("Result")

Forward = Callable[[dict[str, Tensor], Callable[[Signals], Any], CaptureRequest], Any]
"""A forward pass of the student, with or without gradients; see `mmkd.engines.Engine`."""

BARREN_STEPS = 50
"""A stage stops after this many steps in a row in which no objective covers a token."""


@dataclass
class Stage:
    """The parts of a stage, made by `build_stage`.

    Attributes:
        domains: sets the shares of the sources; None for fixed shares.
        norms: weigh the objectives by their gradients; None for the weights of the recipe.
        image_tokens: leaves out image tokens in training; None keeps all.
        callbacks: are called during the stage, in order.
        barren: number of last steps in a row in which no objective covered a token.
        stop: a rank was asked to stop before the update of the last step.
    """

    config: StageConfig
    engine: Engine
    teachers: TeacherSet
    vision: SharedVision | None
    reference: Reference | None
    on_policy: OnPolicy | None
    objectives: list[Objective]
    stream: BatchStream
    steps: int
    folder: Path
    tracked: Tracked | None = None
    validation: Validation | None = None
    domains: Domains | None = None
    norms: GradientNorms | None = None
    image_tokens: ImageTokenDropout | None = None
    callbacks: Sequence[Callback] = ()
    barren: int = 0
    stop: bool = False

    def train(self) -> Metrics:
        """Train to the last step, from the newest checkpoint if there is one."""
        files = StageFolder(self.folder)
        saved = files.checkpoints
        records = self.stream.records_per_step
        first = load_checkpoint(saved, self.engine, records_per_step=records)
        active = self.engine.rank == 0
        if self.validation is not None:
            self.validation.begin(first, active=active)
        if self.domains is not None:
            mixture = saved_mixture(saved, first) if first else None
            self.domains.begin(first, mixture, self._answer_ce)
        log = StepLog(files.metrics, first, active=active, key="loss")
        skipped = StepLog(files.skipped, first, active=active)
        metrics: Metrics = log.last
        log.say_missing(first)
        self.barren = len(list(takewhile(_is_barren, reversed(log.found))))
        quiet = self.engine.rank > 0
        charts = Trackers(self.tracked, step=first, written=log.written, active=active)
        bar = Bar(self.config.name, self.steps, done=first, quiet=quiet, part=True)
        for callback in self.callbacks:
            callback.on_stage_begin(self)
        with deferred(), charts, bar:
            for step, batches in enumerate(self.stream.steps(first, self.steps), first + 1):
                started = time.monotonic()
                metrics = self.step(step, batches)
                seconds = time.monotonic() - started
                line = {**metrics, "seconds": round(seconds, 4)}
                self._set_shares(step)
                measured = self._validate(step)
                log.write(line)
                charts.log(line, measured)
                for callback in self.callbacks:
                    callback.on_step_end(step, line)
                    if measured is not None:
                        callback.on_validation_end(step, measured)
                if metrics["skipped"]:
                    for reason in distributed.gather([r for b in batches for r in b.skipped]):
                        skipped.write({"step": step, "reason": reason})
                speed = metrics["supervised_tokens"] / seconds
                bar.advance(f"loss {metrics['loss']:.4f}, {speed:,.0f} supervised tokens/s")
                if self.validation is not None and self.validation.exhausted:
                    break
                stop = self._must_stop(validated=measured is not None)
                if step < self.steps and (stop or step % self.config.checkpoint.interval == 0):
                    log.sync()
                    skipped.sync()
                    self._save(step)
                if stop and step < self.steps:
                    raise StoppedError(f"{self.config.name} stopped at step {step}", hint=AGAIN)
            log.sync()
            skipped.sync()
        for callback in self.callbacks:
            callback.on_stage_end(self, metrics)
        return metrics

    def _save(self, step: int) -> None:
        """Write a checkpoint."""
        save_checkpoint(
            StageFolder(self.folder).checkpoints,
            step,
            self.engine,
            records_per_step=self.stream.records_per_step,
            keep=self.config.checkpoint.keep_last,
            mixture=None if self.domains is None else self.domains.state(),
        )
        if self.validation is not None and self.engine.rank == 0:
            self.validation.prune()

    def _set_shares(self, step: int) -> None:
        """Set the shares of the sources in the next interval, if one begins. The stream reads
        nothing of it before."""
        if self.domains is not None and self.domains.due(step, self.steps):
            self.domains.update(step, self._answer_ce)

    def _answer_ce(self, batch: Batch) -> Tensor:
        """Sum of the student's cross-entropies on the answers of a batch."""
        assert self.domains is not None
        micro = MicroBatch(batch, [self.domains.objective])
        return self._losses(micro, {CE: 1.0}, self.engine.evaluate)[0]["loss"]

    def _validate(self, step: int) -> Metrics | None:
        """Validate if it is due at this step; returns the line of `validation.jsonl`."""
        validation = self.validation
        if validation is None or not validation.due(step, self.steps):
            return None
        started = time.monotonic()
        each = {o.name: 1.0 for o in validation.objectives}

        def losses(batch: Batch, objectives: Sequence[Objective]) -> dict[str, Tensor]:
            micro = self._prepare(batch, objectives)
            sums = self._losses(micro, each, self.engine.evaluate)[0]
            return {name: value for name, value in sums.items() if name != "loss"}

        means = validation.measure(losses, self.engine)
        line = {"step": step, **means, "seconds": round(time.monotonic() - started, 4)}
        return validation.note(line, self.engine, self.steps)

    def step(self, step: int, batches: list[Batch]) -> Metrics:
        """One optimizer step over the global batch."""
        batches = [b.to(self.engine.device) for b in batches]
        batches, answers = self._sampled(step, batches)
        batches = self.shortened(step, batches)
        records = self.stream.encoder.records
        corrects = self.on_policy is not None and self.on_policy.corrector is not None
        counts = count_batches(
            batches, self.objectives, records, self.engine, answers=answers, corrects=corrects
        )
        self._require_rows(counts.rows)
        sums: dict[str, Tensor] = {}
        load: dict[int, Tensor] = {}
        norms = self.norms
        if norms is not None:
            norms.begin(self.engine.device)
        for number, micro in enumerate(self._prepared(batches, counts.rows), 1):
            losses, chosen = self._losses(micro, counts.rows, self.engine.forward, norms)
            self.engine.backward(losses["loss"], last=number == len(batches))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
            load = {layer: load.get(layer, 0) + count for layer, count in chosen.items()}
        squares = None if norms is None else norms.sums()
        totals = sum_losses(sums, load, self.engine, stop=requested(), squares=squares)
        self._check_finite(step, totals.losses, batches)
        self.stop = totals.stop
        result = self.engine.step()
        if not math.isfinite(result.grad_norm):
            self._check_finite(step, {"grad_norm": result.grad_norm}, batches)
        return {
            "step": step,
            **_covered(totals.losses, counts.rows),
            **({} if norms is None else norms.end(totals.squares, self.engine.gradient_scale)),
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            **counts.metrics,
            **({} if self.domains is None else {"mixture": self.domains.shares(step)}),
            **totals.metrics,
        }

    def _sampled(self, step: int, batches: list[Batch]) -> tuple[list[Batch], AnswerCounts | None]:
        """The batches, with answers of the student if the stage is on-policy, and their numbers."""
        if self.on_policy is None:
            return batches, None
        made = [self.on_policy.batch(b, step, i) for i, b in enumerate(batches)]
        return [batch for batch, _ in made], sum((n for _, n in made), AnswerCounts())

    def shortened(self, step: int, batches: list[Batch]) -> list[Batch]:
        """The batches of a step without the image tokens that are left out."""
        if self.image_tokens is None:
            return batches
        return [self.image_tokens(batch, step) for batch in batches]

    def _must_stop(self, *, validated: bool) -> bool:
        """Whether to stop after this step; equal on all ranks.

        A rank's request to stop is summed together with the step's losses, without a further
        all-reduce, so a request during the update ends the next step. Ranks exchange requests
        again after a validation, which may take long. A single process needs no exchange.
        """
        if self.engine.world_size == 1:
            return requested()
        return asked(self.engine.device) if validated else self.stop

    def _require_rows(self, rows: dict[str, float]) -> None:
        """Stop if no objective has covered a token for many steps, or in all steps.

        Raises:
            DataError: on all ranks.
        """
        covered = any(rows[o.name] > (1 if o.gathers else 0) for o in self.objectives)
        self.barren = 0 if covered else self.barren + 1
        if self.barren >= min(BARREN_STEPS, self.steps):
            raise DataError(
                f"no objective covers a token in {self.barren} steps in a row",
                where=f"stage {self.config.name}",
                hint="look at the records with `mmkd data check`, and at data.max_length and the "
                "objectives' regions",
            )

    def _prepared(self, batches: list[Batch], rows: dict[str, float]) -> Iterator[MicroBatch]:
        """The micro-batches of a step with the teachers' signals, each made when it is needed."""
        if len(batches) > 1 and (gathered := gathered_objectives(self.objectives, rows)):
            evaluate = partial(self.engine.evaluate, training=True)
            yield from first_pass(
                batches,
                self.objectives,
                {o.name: rows[o.name] for o in gathered},
                prepare=self._prepare,
                read=lambda micro, read: self._read(micro, read, evaluate),
            )
        else:
            for batch in batches:
                yield self._prepare(batch, self.objectives)

    def _prepare(self, batch: Batch, objectives: Sequence[Objective]) -> MicroBatch:
        """Run the teachers and the reference on a batch, which is on the engine's device."""
        with self.engine.autocast(), self.vision.recording() if self.vision else nullcontext():
            request = LayerPlan.of(objectives).teacher_request()
            asked = self.teachers.ask(batch, objectives, request, reference_name(self.reference))
            if self.reference is not None:
                logps = self.reference.logps(batch, asked)
                batch = replace(batch, targets=replace(batch.targets, reference_logps=logps))
        return MicroBatch(batch, objectives, asked)

    def _losses(
        self,
        micro: MicroBatch,
        rows: dict[str, float],
        forward: Forward,
        norms: GradientNorms | None = None,
    ) -> Scored:
        """The loss, each objective's part of it and its metrics, and how often each expert was
        chosen, by layer.

        Args:
            micro: with the stage's objectives, or those of its validation.
            rows: what each objective's sum is divided by.
            forward: of the engine, with or without gradients.
            norms: weigh the objectives; None for the weights of the recipe.
        """
        counts = {name: max(count, 1.0) for name, count in rows.items()}
        targets, theirs = micro.batch.targets, micro.compared

        def compare(student: Signals) -> Scored:
            if not torch.is_grad_enabled():
                student = student.detached()
            total, said = score(micro.objectives, student, theirs, targets, counts, norms)
            return {"loss": total, **said}, expert_counts(student, targets)

        return self._read(micro, compare, forward)

    def _read(
        self, micro: MicroBatch, read: Callable[[Signals], Result], forward: Forward
    ) -> Result:
        """Run the student on a micro-batch; returns what `read` makes of its signals."""
        primary = micro.teachers.get(self.teachers.primary)
        layers = primary.layers if isinstance(primary, Signals) else {}
        request = LayerPlan.of(micro.objectives).student_request(layers)
        request = replace(request, kept=micro.batch.kept)
        size = len(micro.batch.targets.input_ids)
        with self.vision.replaying() if self.vision else nullcontext():
            micro.restore_random_states()
            return forward(micro.batch.inputs, lambda s: read(s.truncate(size)), request)

    def _check_finite(self, step: int, metrics: Metrics, batches: list[Batch]) -> None:
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            ids = ", ".join(i for b in batches for i in b.ids)
            raise NonFiniteLossError(
                f"{', '.join(broken)} not finite at step {step}, samples: {ids}",
                where=f"stage {self.config.name}",
                hint="lower the learning rate, or look at these samples; "
                "nothing of this step was saved",
            )


def _covered(losses: dict[str, float], rows: dict[str, float]) -> dict[str, float]:
    """The loss, and the values of the objectives that cover a row of the step: the mean over none
    is not 0."""
    return {n: v for n, v in losses.items() if n == "loss" or rows[n.partition("/")[0]]}


def _is_barren(line: Metrics) -> bool:
    """Whether a line of metrics.jsonl is of a step in which no objective covered a token."""
    return line.get("loss") == 0 and line.get("supervised_tokens") == 0
