"""Log a stage's metrics to TensorBoard, Weights & Biases or Trackio.

`metrics.jsonl` is always written too. A tracker that fails is not used any more, and training
continues.

The trackers of `accelerate` call the same three constructors and pass arguments on. What this
module adds would stay: a run id that belongs to the stage's folder, no step logged twice after a
resume, secrets left out of the recipe, and training that goes on without a tracker that fails.
"""

import importlib
import io
import os
import uuid
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mmkd.errors import RecipeError, StoppedError
from mmkd.recipe import Recipe, TrackerName, to_yaml
from mmkd.redact import redact, redact_all
from mmkd.runtime.files import write_json
from mmkd.runtime.progress import live, say
from mmkd.runtime.run_folder import RunFolder
from mmkd.runtime.shapes import Shape, read_if

MODULES: dict[TrackerName, str] = {
    "tensorboard": "torch.utils.tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
}
INSTALL = "pip install 'mmkd[trackers]'"
PROJECT = "mmkd"
PREFIX, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Tracked:
    """A stage that is tracked.

    Attributes:
        recipe: of the student.
        run: folder of the run.
        stage: folder of the stage, inside of the run's.
    """

    recipe: Recipe
    run: Path
    stage: Path

    @property
    def path(self) -> Path:
        """Path of the stage inside of the run, such as `kd-seed0/01-mimic`."""
        return self.stage.relative_to(self.run)

    @property
    def name(self) -> str:
        return f"{self.recipe.name}/{self.path.as_posix()}"


@dataclass(frozen=True)
class Place:
    """Where the chart of a stage continues.

    Attributes:
        id: of the stage; it stays the same when the stage resumes.
        new: the stage was not tracked before.
        step: at which the stage resumes.
    """

    id: str
    new: bool
    step: int


class Tracker(Protocol):
    """A tracker. It starts when it is constructed."""

    replaces: bool
    """Whether a step that is logged again replaces its earlier values."""

    def __init__(self, tracked: Tracked, place: Place): ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files in the run's folder, under `tensorboard/` and the stage's path."""

    replaces = True

    def __init__(self, tracked: Tracked, place: Place):
        from torch.utils.tensorboard import SummaryWriter

        folder = RunFolder(tracked.run).tensorboard / tracked.path
        # Steps that a killed process logged after its checkpoint are logged again.
        self._writer = SummaryWriter(str(folder), purge_step=place.step + 1)
        if place.new:
            indented = redact(to_yaml(tracked.recipe)).replace("\n", "\n    ")
            self._writer.add_text("recipe", f"    {indented}", 0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a kill loses nothing

    def finish(self, failed: bool) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in the project that WANDB_PROJECT names, or mmkd."""

    replaces = False

    def __init__(self, tracked: Tracked, place: Place):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=tracked.name,
            group=tracked.recipe.name,
            id=place.id,
            resume="allow",
            dir=str(tracked.run),
            config=redact_all(tracked.recipe.model_dump(mode="json")),
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step, commit=True)

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run of Trackio: in its own folder, TRACKIO_DIR, or in the Space TRACKIO_SPACE_ID."""

    replaces = False

    def __init__(self, tracked: Tracked, place: Place):
        import trackio

        # It prints the address of its dashboard in colours, even without a terminal.
        with nullcontext() if live() else redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=PROJECT,
                name=tracked.name,
                group=tracked.recipe.name,
                config=redact_all(tracked.recipe.model_dump(mode="json")),
                resume="never" if place.new else "allow",
                embed=False,
            )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def finish(self, failed: bool) -> None:
        self._run.finish()


KINDS: dict[TrackerName, Callable[[Tracked, Place], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}


class Trackers:
    """All trackers of a recipe, for one stage; a context manager."""

    def __init__(self, tracked: Tracked | None, *, step: int, written: int, active: bool = True):
        """
        Args:
            tracked: the stage; None for no tracking.
            step: at which the stage resumes.
            written: last step that was logged before the stage resumed.
            active: whether this rank logs.
        """
        self._tracked = tracked if active else None
        self._step, self._written = step, written
        self._running: dict[TrackerName, Tracker] = {}

    def __enter__(self) -> "Trackers":
        if self._tracked is None or not self._tracked.recipe.report_to:
            return self
        place = _place(self._tracked.stage / "tracking.json", self._step)
        for name in self._tracked.recipe.report_to:
            try:
                self._running[name] = KINDS[name](self._tracked, place)
            except Exception as error:
                self._leave_out(name, error)
        return self

    def log(self, metrics: dict[str, Any], validation: dict[str, Any] | None = None) -> None:
        """Log a line of `metrics.jsonl` together with the line of `validation.jsonl` of the same
        step, because some trackers accept a step only once."""
        step, flat = metrics["step"], flattened(metrics)
        if validation is not None:
            flat |= flattened(validation, VALIDATION)
        for name, tracker in list(self._running.items()):
            if step <= self._written and not tracker.replaces:
                continue
            try:
                tracker.log(step, flat)
            except Exception as error:
                self._leave_out(name, error)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        failed = kind is not None and not issubclass(kind, StoppedError)
        for name, tracker in list(self._running.items()):
            try:
                tracker.finish(failed)
            except Exception as error:
                self._leave_out(name, error)

    def _leave_out(self, name: TrackerName, error: Exception) -> None:
        self._running.pop(name, None)
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"{name} failed ({reason}): training goes on without it, metrics.jsonl has all steps")


def check_trackers(names: list[TrackerName]) -> None:
    """Check that the trackers can be imported.

    Raises:
        RecipeError: a tracker cannot be imported.
    """
    for name in names:
        try:
            importlib.import_module(MODULES[name])
        except Exception as error:  # broken installations raise many different types
            reason = " ".join(str(error).split())
            raise RecipeError(
                f"{name} cannot be imported ({reason})", where="report_to", hint=INSTALL
            ) from error


def flattened(metrics: dict[str, Any], path: str = PREFIX) -> dict[str, float]:
    """Numbers by path, without `step`. For a list, such as the shares of a layer's experts, the
    smallest and the largest number."""
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        below = f"{path}/{name}"
        if isinstance(value, dict):
            flat |= flattened(value, below)
        elif isinstance(value, list):
            flat |= {f"{below}/min": min(value), f"{below}/max": max(value)}
        elif name != "step":
            flat[below] = value
    return flat


def _place(path: Path, step: int) -> Place:
    # The id is stored in the folder, so a run that was deleted and started again has a new one.
    known = (read_if(Shape, path) or {}).get("id")
    new = not isinstance(known, str)
    if new:
        known = uuid.uuid4().hex
        write_json(path, {"id": known})
    return Place(str(known), new, step)
