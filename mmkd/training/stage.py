"""The training loop of a stage.

    for each step:
        rows_o <- number of rows of objective o, summed over micro-batches and ranks
        for each micro-batch:
            s <- student(batch);  t <- teacher(batch)
            loss <- sum_o weight_o * (1/rows_o) * sum over this micro-batch's rows of o(s, t)
            backward(loss)
        clip, update

So each objective is a mean per covered token of the global batch.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.data.stream import BatchStream
from mmkd.engines import Engine, StepResult
from mmkd.errors import AGAIN, DataError, NonFiniteLossError, StoppedError
from mmkd.modeling.capture_request import CaptureRequest, LayerPlan
from mmkd.objectives import (
    Objective,
    Signals,
    expert_counts,
    score,
)
from mmkd.recipe import StageConfig
from mmkd.runtime import distributed
from mmkd.runtime.interrupt import asked, deferred
from mmkd.runtime.progress import Bar
from mmkd.runtime.run_folder import StageFolder
from mmkd.runtime.steplog import StepLog
from mmkd.teachers import Reference, TeacherSet
from mmkd.training.callbacks import Callback
from mmkd.training.checkpoint import load_checkpoint, save_checkpoint
from mmkd.training.on_policy import OnPolicy
from mmkd.training.shared_vision import SharedVision
from mmkd.training.trackers import Tracked, Trackers
from mmkd.training.validation import Validation

Metrics = dict[str, Any]
"""Numbers by name. The experts' shares of tokens are lists by layer."""

Scored = tuple[dict[str, Tensor], dict[int, Tensor]]
"""The loss, its parts by name, and by layer the number of tokens of each expert."""

Forward = Callable[[dict[str, Tensor], Callable[[Signals], Scored], CaptureRequest], Scored]
"""A forward pass of the student, with or without gradients; see `mmkd.engines.Engine`."""

BARREN_STEPS = 50
"""A stage stops after this many steps in a row in which no objective covers a token."""


@dataclass
class Stage:
    """The parts of a stage, made by `build_stage`.

    Attributes:
        callbacks: are called during the stage, in order.
        barren: number of last steps in a row in which no objective covered a token.
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
    callbacks: Sequence[Callback] = ()
    barren: int = 0

    def train(self) -> Metrics:
        """Train to the last step, from the newest checkpoint if there is one."""
        files = StageFolder(self.folder)
        saved = files.checkpoints
        records = self.stream.records_per_step
        first = load_checkpoint(saved, self.engine, records_per_step=records)
        active = self.engine.rank == 0
        if self.validation is not None:
            self.validation.begin(first, active=active)
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
                stop = asked(self.engine.device)
                if step < self.steps and (stop or step % self.config.checkpoint.interval == 0):
                    keep = self.config.checkpoint.keep_last
                    log.sync()
                    skipped.sync()
                    save_checkpoint(saved, step, self.engine, records_per_step=records, keep=keep)
                    if self.validation is not None and active:
                        self.validation.prune()
                if stop and step < self.steps:
                    raise StoppedError(f"{self.config.name} stopped at step {step}", hint=AGAIN)
            log.sync()
            skipped.sync()
        for callback in self.callbacks:
            callback.on_stage_end(self, metrics)
        return metrics

    def _validate(self, step: int) -> Metrics | None:
        """Validate if it is due at this step; returns the line of `validation.jsonl`."""
        validation = self.validation
        if validation is None or not validation.due(step, self.steps):
            return None
        started = time.monotonic()
        each = {o.name: 1.0 for o in validation.objectives}

        def losses(batch: Batch) -> dict[str, Tensor]:
            sums = self._losses(batch, each, validation.objectives, self.engine.evaluate)[0]
            return {name: value for name, value in sums.items() if name != "loss"}

        means = validation.measure(losses, self.engine)
        line = {"step": step, **means, "seconds": round(time.monotonic() - started, 4)}
        return validation.note(line, self.engine, self.steps)

    def step(self, step: int, batches: list[Batch]) -> Metrics:
        """One optimizer step over the global batch."""
        batches = [b.to(self.engine.device) for b in batches]
        batches, sampled = self._sampled(step, batches)
        rows = self._rows(batches)
        self._require_rows(rows)
        sums: dict[str, Tensor] = {}
        load: dict[int, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            losses, counts = self._losses(batch, rows, self.objectives, self.engine.forward)
            self.engine.backward(losses["loss"], last=number == len(batches))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach().double()
            load = {layer: load.get(layer, 0) + count for layer, count in counts.items()}
        means = self.engine.total(torch.stack(list(sums.values()))).tolist()
        metrics = dict(zip(sums, means, strict=True))
        self._check_finite(step, metrics, batches)
        result = self.engine.step()
        if not math.isfinite(result.grad_norm):
            self._check_finite(step, {"grad_norm": result.grad_norm}, batches)
        described = self._describe(step, metrics, result, batches)
        return {**described, **sampled, **self._sources(batches), **self._shares(load)}

    def _sampled(self, step: int, batches: list[Batch]) -> tuple[list[Batch], Metrics]:
        """The batches, with answers of the student if the stage is on-policy."""
        if self.on_policy is None:
            return batches, {}
        made = [self.on_policy.batch(b, step, i) for i, b in enumerate(batches)]
        count = torch.tensor(float(sum(n for _, n in made)), device=self.engine.device)
        return [batch for batch, _ in made], {"sampled": float(self.engine.total(count))}

    def _rows(self, batches: list[Batch]) -> dict[str, float]:
        counts = torch.tensor(
            [
                sum(int(o.rows(b.targets.of(o.sources)).sum()) for b in batches)
                for o in self.objectives
            ],
            dtype=torch.float64,
            device=self.engine.device,
        )
        names = [o.name for o in self.objectives]
        return dict(zip(names, self.engine.total(counts).tolist(), strict=True))

    def _require_rows(self, rows: dict[str, float]) -> None:
        """Stop if no objective has covered a token for many steps, or in all steps.

        Raises:
            DataError: on all ranks.
        """
        self.barren = 0 if any(rows.values()) else self.barren + 1
        if self.barren >= min(BARREN_STEPS, self.steps):
            raise DataError(
                f"no objective covers a token in {self.barren} steps in a row",
                where=f"stage {self.config.name}",
                hint="look at the records with `mmkd data check`, and at data.max_length and the "
                "objectives' regions",
            )

    def _losses(
        self,
        batch: Batch,
        rows: dict[str, float],
        objectives: list[Objective],
        forward: Forward,
    ) -> Scored:
        """The loss, each objective's part of it and its metrics, and how often each expert was
        chosen, by layer.

        Args:
            batch: on the engine's device.
            rows: what each objective's sum is divided by.
            objectives: the stage's, or those of its validation.
            forward: of the engine, with or without gradients.
        """
        targets = batch.targets
        counts = {name: max(count, 1.0) for name, count in rows.items()}
        plan = LayerPlan.of(objectives)
        with self.engine.autocast(), self.vision.recording() if self.vision else nullcontext():
            asked = self.teachers.ask(batch, objectives, plan.teacher_request())
            if self.reference is not None:
                targets = replace(targets, reference_logps=self.reference.logps(batch, asked))

        def compare(student: Signals) -> Scored:
            student = student.truncate(len(targets.input_ids))
            theirs = {name: s.truncate(len(targets.input_ids)) for name, s in asked.items()}
            if not torch.is_grad_enabled():
                student = student.detached()
            total, said = score(objectives, student, theirs, targets, counts)
            return {"loss": total, **said}, expert_counts(student, targets)

        with self.vision.replaying() if self.vision else nullcontext():
            primary = asked.get(self.teachers.primary)
            layers = primary.layers if isinstance(primary, Signals) else {}
            return forward(batch.inputs, compare, plan.student_request(layers))

    def _sources(self, batches: list[Batch]) -> Metrics:
        """Number of records of each source of a mixture in the global batch."""
        records = self.stream.encoder.records
        if len(records.sources) == 1:
            return {}
        counts = torch.zeros(len(records.sources), dtype=torch.float64, device=self.engine.device)
        for index in (i for batch in batches for i in batch.indices):
            counts[records.source_of(index)] += 1
        names = [s.config.label for s in records.sources]
        return {"sources": dict(zip(names, self.engine.total(counts).tolist(), strict=True))}

    def _shares(self, load: dict[int, Tensor]) -> Metrics:
        """Share of the global batch's tokens of each expert, by sparse layer."""
        if not load:
            return {}
        counts = self.engine.total(torch.stack(list(load.values())))  # [layers, E]
        shares = (counts / counts.sum(1, keepdim=True)).tolist()
        rounded = [[round(share, 4) for share in layer] for layer in shares]
        return {"expert_load": dict(zip(map(str, load), rounded, strict=True))}

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

    def _describe(
        self, step: int, losses: Metrics, result: StepResult, batches: list[Batch]
    ) -> Metrics:
        tokens = torch.tensor(
            [
                [b.targets.attention.sum() for b in batches],
                [b.targets.response.sum() for b in batches],
                [len(b.skipped) for b in batches],
                [b.targets.attention.numel() for b in batches],
            ],
            dtype=torch.float64,
            device=self.engine.device,
        )
        real, supervised, skipped, places = self.engine.total(tokens.sum(1)).tolist()
        return {
            "step": step,
            **losses,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens": real,
            "supervised_tokens": supervised,
            "skipped": skipped,
            "padding": round(1 - real / places, 4),
        }


def _is_barren(line: Metrics) -> bool:
    """Whether a line of metrics.jsonl is of a step in which no objective covered a token."""
    return line.get("loss") == 0 and line.get("supervised_tokens") == 0
