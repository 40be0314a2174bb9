"""`mmkd bench`: where the time of a recipe's steps goes, against what the models alone take.

The floor is what no trainer can leave out, measured bare on the same batches: each teacher's body
and head (its body up to the last layer that is read, if objectives read layers only), the student's
body forward and backward, and the three products of its head, on the rows that the objectives
cover.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.data.batch import Batch
from mmkd.errors import RecipeError
from mmkd.making.used import check_made
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import OUTPUTS_ONLY, CaptureRequest, LayerPlan
from mmkd.objectives import Signals
from mmkd.recipe import Recipe, StageConfig
from mmkd.runs import preflight
from mmkd.runs.members import students
from mmkd.runs.timings import keep_timing
from mmkd.runtime import distributed
from mmkd.runtime.progress import Bar, console
from mmkd.students import converted_processor, student_at
from mmkd.teachers import (
    LiveReference,
    LiveTeacher,
    LoadedTeachers,
    TeacherSet,
    earlier_stage,
    load_teachers,
    place_teacher,
    reference_name,
    with_stage_teachers,
)
from mmkd.training.build import StageInputs, build_stage
from mmkd.training.shared_vision import SharedVision
from mmkd.training.stage import Stage

PARTS = ("data", "teacher", "student forward", "objectives", "backward", "optimizer", "rest")
WARM_UP = 2
COLOURS = ("#c9b8a0", "#8fb4d9", "#b7d3a8", "#f0d58c", "#9cc58b", "#d9a3a3", "#cccccc", "#a9cd9a")


class Clock:
    """Seconds by part of the step that is running; parts inside of others are told apart."""

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str, *, inside: str | None = None) -> Iterator[None]:
        """Time what is inside; `inside` is the part that must not count it too."""
        started = self._time()
        try:
            yield
        finally:
            taken = self._time() - started
            self._now[name] += taken
            if inside is not None:
                self._now[inside] -= taken

    def close_step(self) -> None:
        self.steps.append(dict(self._now))
        self._now.clear()

    def _time(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def medians(self) -> dict[str, float]:
        """Median seconds of each part over the steps after the first ones."""
        kept = self.steps[WARM_UP:] or self.steps
        names = {name for step in kept for name in step}
        return {name: statistics.median(s.get(name, 0.0) for s in kept) for name in names}


class _TimedEngine:
    """An engine whose parts are timed."""

    def __init__(self, engine: Any, clock: Clock):
        self._engine, self._clock = engine, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def evaluate(self, *inputs: Any, **settings: Any) -> Any:
        with self._clock.part("student forward"):
            return self._engine.evaluate(*inputs, **settings)

    def forward(
        self, inputs: Any, score: Callable[[Signals], Any], request: CaptureRequest = OUTPUTS_ONLY
    ) -> Any:
        def timed(signals: Signals) -> Any:
            with self._clock.part("objectives", inside="student forward"):
                return score(signals)

        with self._clock.part("student forward"):
            return self._engine.forward(inputs, timed, request)

    def backward(self, loss: Tensor, **which: Any) -> None:
        with self._clock.part("backward"):
            self._engine.backward(loss, **which)

    def step(self) -> Any:
        with self._clock.part("optimizer"):
            return self._engine.step()


class _TimedTeacher:
    def __init__(self, teacher: Any, clock: Clock):
        self._teacher, self._clock = teacher, clock

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)

    def signals(self, batch: Batch, request: CaptureRequest = OUTPUTS_ONLY) -> Any:
        with self._clock.part("teacher"):
            return self._teacher.signals(batch, request)

    def answer_logps(self, *batch: Any, **settings: Any) -> Any:
        with self._clock.part("teacher"):
            return self._teacher.answer_logps(*batch, **settings)


def bench(recipe: Recipe, stage_name: str | None, steps: int) -> dict[str, Any]:
    """Time some steps of a stage, and its floor after each of them.

    Args:
        recipe: whose first student, teacher and data are taken.
        stage_name: the stage; the first if None.
        steps: to time; two more warm up.

    Raises:
        RecipeError: no such stage, or the shares of its sources change within these steps.
    """
    own = students(recipe)[0].recipe
    names = [s.name for s in own.stages]
    if stage_name is not None and stage_name not in names:
        raise RecipeError(
            f"no stage {stage_name!r}", where="stages", hint=f"there are {', '.join(names)}"
        )
    index = 0 if stage_name is None else names.index(stage_name)
    sampling = own.stage_data(own.stages[index]).sampling
    if sampling is not None and steps + WARM_UP > sampling.every:
        raise RecipeError(
            f"the shares of the sources change after {sampling.every:,} steps, within the "
            f"{steps + WARM_UP:,} that are timed",
            where="data.sampling",
            hint="raise 'every' for the bench, or lower --steps",
        )
    with TemporaryDirectory() as folder:
        made = prepare(own, index, Path(folder))
        return time_stage(*made, recipe.name, steps)


def keep(recipe: Recipe, found: dict[str, Any]) -> Path:
    """Keep what `bench` found in the run's folder, where `mmkd plan` looks for it."""
    first = students(recipe)[0].recipe
    index = [s.name for s in first.stages].index(found["stage"])
    return keep_timing(first, index, found)


def prepare(
    recipe: Recipe, index: int, folder: Path, teachers: LoadedTeachers | None = None
) -> tuple[Stage, PreTrainedModel]:
    """A stage with its student as it is before any training.

    Args:
        recipe: whose models and data are taken.
        index: of the stage.
        folder: for what the stage stores.
        teachers: that are loaded already; the recipe's if None.
    """
    config = recipe.stages[index]
    device = distributed.choose_device(config.engine.device)
    distributed.connect(device, timeout_s=config.engine.timeout_s)
    preflight.check(recipe)
    check_made(recipe, [recipe.stage_data(config)])
    student, processor = student_at(recipe, index), converted_processor(recipe.student)
    inputs = StageInputs(
        config=config,
        student=student,
        processor=processor,
        teachers=_teachers(recipe, config) if teachers is None else teachers,
        data=recipe.stage_data(config),
        folder=folder,
        seed=recipe.seed + index,
    )
    return build_stage(inputs), student


def _teachers(recipe: Recipe, stage: StageConfig) -> LoadedTeachers:
    """The teachers of a stage. The student after an earlier stage is not trained."""
    own, earlier = with_stage_teachers(recipe, stage), earlier_stage(recipe, stage)
    if earlier is None:
        return load_teachers(own, stage)
    assert own.teacher is not None
    device = distributed.choose_device(stage.engine.device)
    teacher = place_teacher(student_at(recipe, earlier), own.teacher.placement, device)
    processor = converted_processor(recipe.student)
    return LoadedTeachers({own.teacher.name: teacher}, own.teachers, processor)


def time_stage(stage: Stage, student: PreTrainedModel, name: str, steps: int) -> dict[str, Any]:
    """Time some steps of what `prepare` made, and its floor after each of them."""
    clock = Clock(stage.engine.device)
    floors: list[dict[str, float]] = []
    teachers = stage.teachers
    stage.engine = cast(Any, _TimedEngine(stage.engine, clock))
    _time_teachers(stage, clock)
    count = steps + WARM_UP
    stream = stage.stream
    tokens, peaks = [], []
    with Bar("bench", count, quiet=distributed.rank() > 0) as bar:
        for number in range(count):
            with clock.part("whole"):
                with clock.part("data"):
                    batches = stream.batches(number)
                _reset_peak(stage.engine.device)
                metrics = stage.step(number + 1, batches)
            clock.close_step()
            peaks.append(_peak(stage.engine.device))
            tokens.append(metrics["supervised_tokens"])
            if stage.config.engine.kind == "torch":  # else the weights are the engine's
                batches = stage.shortened(number + 1, batches)
                floors.append(floor_of(stage, student, teachers, batches))
            bar.advance()
    found = clock.medians()
    whole = found.pop("whole")
    found["rest"] = whole - sum(found.values())
    kept = floors[WARM_UP:] or [{}]
    floor = {k: statistics.median(f[k] for f in kept) for k in kept[0]}
    bare = sum(floor.values())
    return {
        "recipe": name,
        "stage": stage.config.name,
        "processes": distributed.world_size(),
        "device": str(stage.engine.device),
        "steps": steps,
        "seconds": whole,
        "parts": {name: found.get(name, 0.0) for name in PARTS},
        "floor": floor,
        "floor_seconds": bare,
        "without_data_over_floor": (whole - found["data"]) / bare if bare else None,
        "supervised_tokens_per_second": statistics.median(tokens[WARM_UP:]) / whole,
        "peak_bytes": max(peaks),
    }


def _time_teachers(stage: Stage, clock: Clock) -> None:
    """Put timed teachers in the places of a stage's own; one that is in two places stays one."""
    timed: dict[int, Any] = {}

    def wrap(teacher: Any) -> Any:
        return timed.setdefault(id(teacher), _TimedTeacher(teacher, clock))

    members = {name: wrap(teacher) for name, teacher in stage.teachers.members.items()}
    stage.teachers = replace(stage.teachers, members=members)
    if isinstance(stage.reference, LiveReference):
        stage.reference.model = wrap(stage.reference.model)


def floor_of(
    stage: Stage, student: Any, teachers: TeacherSet, batches: list[Batch]
) -> dict[str, float]:
    """Seconds of the models' own work on a step's batches: `teacher`, all of them together, and
    `student`.

    Args:
        stage: of the batches.
        student: its student.
        teachers: its teachers, without clocks.
        batches: of one step.
    """
    device = stage.engine.device
    clock = Clock(device)
    heads = [o for o in stage.objectives if "distribution" in o.needs]
    layers = LayerPlan.of(stage.objectives).teacher_request()
    reference = reference_name(stage.reference)
    for batch in (b.to(device) for b in batches):
        rows = torch.zeros_like(batch.targets.attention)
        compared = {name: torch.zeros_like(rows) for name in teachers.members}
        for objective in heads:
            covered = objective.rows(batch.targets.of(objective.sources))
            rows |= covered
            asked = objective.teacher or teachers.primary
            if "teacher" in objective.needs and asked in compared:
                compared[asked] |= covered
        with stage.engine.autocast():
            for name, teacher in teachers.members.items():
                if not isinstance(teacher, LiveTeacher):
                    continue
                if teachers.is_asked(name, batch, stage.objectives):
                    vision = stage.vision if name == teachers.primary else None
                    request = teachers.request_for(name, stage.objectives, layers, reference)
                    _bare_teacher(clock, teacher, batch, compared[name], vision, request)
            with clock.part("student"):
                seen = stage.vision.replaying() if stage.vision else nullcontext()
                with seen:
                    shorter = CaptureRequest(kept=batch.kept)
                    signals = capture(student, batch.inputs, shorter).truncate(len(rows))
                hidden = signals.hidden[rows]
                weight = signals.head_weight.to(hidden.dtype)
                logits = hidden.detach() @ weight.detach().t()
                gradient = logits @ weight.detach()
                if signals.head_weight.requires_grad:
                    logits.t() @ hidden.detach()
        with clock.part("student"):
            hidden.backward(gradient * 0)
        student.zero_grad(set_to_none=True)
    clock.close_step()
    return clock.steps[0]


@torch.no_grad()
def _bare_teacher(
    clock: Clock,
    teacher: LiveTeacher,
    batch: Batch,
    rows: Tensor,
    vision: SharedVision | None,
    request: CaptureRequest,
) -> None:
    bare = request if request.stops_early else OUTPUTS_ONLY
    with clock.part("teacher"), vision.recording() if vision else nullcontext():
        signals = teacher.signals(batch, bare).truncate(len(rows))
        if not rows.any():
            return
        hidden = signals.hidden[rows]
        hidden @ signals.head_weight.to(hidden.dtype).t()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    """Most memory that a step had in use on a GPU, or this process's resident size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def print_bench(found: dict[str, Any]) -> None:
    table = Table(title=f"{found['recipe']}, stage {found['stage']}: a step")
    for name in ("", "ms", "share"):
        table.add_column(name, justify="right" if name else "left")
    for name, seconds in found["parts"].items():
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / found['seconds']:.0%}")
    table.add_section()
    table.add_row("step", f"{1e3 * found['seconds']:.1f}", "100%")
    for name, seconds in found["floor"].items():
        table.add_row(f"floor: {name}", f"{1e3 * seconds:.1f}", f"{seconds / found['seconds']:.0%}")
    if found["floor"]:
        table.add_row("without data, of the floor", f"{found['without_data_over_floor']:.2f}x", "")
    table.add_row("supervised tokens/s", f"{found['supervised_tokens_per_second']:,.0f}", "")
    table.add_row("peak memory", f"{found['peak_bytes'] / 1e6:,.0f} MB", "")
    console.print(table)


def plot_bench(found: dict[str, Any], path: Path) -> None:
    """Two bars, the step's parts and the floor's, as an image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip((*PARTS, "student"), COLOURS, strict=True))
    for row, parts in enumerate((found["floor"], found["parts"])):
        left = 0.0
        for name, seconds in parts.items():
            width = 1e3 * max(seconds, 0.0)
            axes.barh(row, width, left=left, color=colours[name], edgecolor="white")
            if width > 0.07 * 1e3 * found["seconds"]:
                text = f"{name}\n{width:.0f}"
                axes.text(left + width / 2, row, text, ha="center", va="center", fontsize=7)
            left += width
    axes.set_yticks([0, 1], ["floor", "step"])
    axes.set_xlabel("ms")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{found['recipe']}, stage {found['stage']}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
