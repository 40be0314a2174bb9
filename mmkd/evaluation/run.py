"""Scores of a model on lmms-eval tasks, in process: from a folder, or in the middle of training.

    result = evaluate("runs/mine/02-mimic/student", tasks=["scenes_pope"],
                      include_path=Path("data/scenes/tasks"), out=Path("runs/mine/evaluation"))
    result.scores["scenes_pope"]["pope_adversarial_accuracy"]

Files: `out/results.json`, written last, and `out/samples/<task>.jsonl`, one line per document.
The results of each finished task are kept in `out/unfinished/` until all tasks are finished, so
that the same call continues with the remaining tasks. A task that fails does not stop the others;
`results.json` names it.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from mmkd.errors import AGAIN, EvaluationError, MmkdError, one_line
from mmkd.evaluation.finished import FinishedTasks
from mmkd.evaluation.install import INSTALL
from mmkd.evaluation.isolation import isolated, silent_imports
from mmkd.evaluation.model_files import model_facts, weights_bytes
from mmkd.evaluation.pictures import allow
from mmkd.evaluation.result import EvaluationResult, write_result
from mmkd.evaluation.run_tasks import run_tasks
from mmkd.recipe import ImageSizeConfig
from mmkd.runtime import distributed
from mmkd.runtime.files import locked
from mmkd.runtime.hashes import weights_hash
from mmkd.runtime.processes import ALONE, Processes
from mmkd.runtime.progress import muted

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from mmkd.evaluation.adapter import MmkdModel
    from mmkd.evaluation.manager import ChosenTasks
    from mmkd.recipe import Quantization

Call = TypeVar("Call", bound=Callable[..., Any])


def _alone_in_out(function: Call) -> Call:
    """Keep other evaluations out of the folder that is written. The first process writes it."""

    @wraps(function)
    def alone(*words: Any, **settings: Any) -> Any:
        out, processes = settings["out"], settings.get("processes", ALONE)
        alone_in = locked if processes.size == 1 else distributed.alone_in
        with (
            nullcontext() if out is None else alone_in(out),
            distributed.unknown_to_libraries(),
            muted(not processes.is_first),
            processes.failing_together(),
        ):
            return function(*words, **settings)

    return cast(Call, alone)


@_alone_in_out
def evaluate(
    model: "str | Path | PreTrainedModel",
    *,
    processor: "ProcessorMixin | str | None" = None,
    tasks: list[str],
    include_path: Path | None,
    out: Path | None,
    local: Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    calibration: bool = False,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: "Quantization | None" = None,
    image_size: ImageSizeConfig | None = None,
    progress: bool | None = None,
    processes: Processes = ALONE,
) -> EvaluationResult:
    """Run lmms-eval tasks on a model; the caller's random streams and logging stay untouched.

    Args:
        model: a folder, a Hub name, or a model in memory. The latter keeps its train/eval state and
            its device.
        processor: of a model in memory; else the name of one that is not the model's own.
        tasks: names of tasks, groups and tags, from `include_path` or bundled with lmms-eval, or
            short names of `mmkd.evaluation.standard`.
        include_path: folder with task YAML files.
        out: folder for `results.json` and `samples/`; None writes nothing.
        local: folder with the parquet files of tasks whose data is on the Hub, or None.
        batch_size: questions per generate call.
        limit: number of documents of each task, from the first on; None is all.
        calibration: also compute the expected calibration error on each task's true answers, with
            one further forward pass per document.
        device: where a model from a folder runs; `auto` is the GPU if there is one.
        revision: commit, tag or branch of a Hub name.
        trust_remote_code: run the model code that comes with the checkpoint.
        quantize: as in `load_pretrained`, for a model from a folder or the Hub.
        image_size: size of images, for a model from a folder; None is the processor's own.
        progress: show progress bars; None shows them on a terminal.
        processes: that answer the questions together. All of them call this function and get the
            result; the first one writes it. Scores do not depend on their number.

    Raises:
        MmkdError: lmms-eval is missing, or a task is unknown, needs a judge or returned no scores.
        CheckpointError: the model or its processor cannot be used, or `out` is being written.
        DataError: a task's data file is missing or of another schema, or the model can be asked
            about none of its documents.
        EvaluationError: some of the tasks failed; the scores of the others are written.
    """
    require_lmms_eval()
    _require_positive(batch_size=batch_size, limit=limit)
    loading = {"device": device, "trust_remote_code": trust_remote_code, "revision": revision}
    loading |= {"quantize": quantize, "image_size": image_size}
    progress = progress if processes.is_first else False
    with isolated(progress):
        manager = _manager(tasks, include_path, local, limit)
        adapter = _adapter(model, processor, batch_size, progress, loading, processes)
        request = _request(adapter, model, processor, limit, loading)
        request |= {"calibration": True} if calibration else {}
        finished = _finished(out if processes.is_first else None, request)
        given, failed = run_tasks(adapter, manager, limit, finished, calibration=calibration)
    result = _result(adapter, manager, request, given, failed)
    if out is not None and processes.is_first:
        write_result(result, out)
    _raise_failures(failed, len(manager.chosen.names), result)
    finished.clear()
    return result


def _manager(
    tasks: list[str], include_path: Path | None, local: Path | None, limit: int | None
) -> "ChosenTasks":
    """The tasks, whose images may be read from the folders of their data."""
    from mmkd.evaluation.manager import find_tasks

    manager = find_tasks(tasks, include_path, local, limit)
    allow(*manager.data_folders())
    return manager


def _adapter(
    model: Any,
    processor: Any,
    batch_size: int,
    progress: bool | None,
    loading: dict[str, Any],
    processes: Processes,
) -> "MmkdModel":
    """The model as lmms-eval asks it; loaded if it is not in memory."""
    from mmkd.evaluation.adapter import MmkdModel

    in_memory = isinstance(model, nn.Module)
    return MmkdModel(
        None if in_memory else str(model),
        batch_size,
        model=cast(Any, model) if in_memory else None,
        processor=processor,
        progress=progress,
        processes=processes,
        **loading,
    )


def _request(
    adapter: "MmkdModel", model: Any, processor: Any, limit: int | None, loading: dict[str, Any]
) -> dict[str, Any]:
    """What finished tasks depend on, as JSON. A task is run again if anything of it differs."""
    path = None if isinstance(model, nn.Module) else str(model)
    other = processor if isinstance(processor, str) else None
    found = {
        "model": path,
        "files": [*model_facts(path, loading["revision"]), *model_facts(other, None)],
        "revision": loading["revision"],
        "processor": other,
        "device": str(adapter.device),
        "dtype": str(adapter.model.dtype).removeprefix("torch."),
        "batch_size": adapter.batch_size,
        "limit": limit,
        "lmms_eval": importlib.metadata.version("lmms-eval"),
    }
    if loading["quantize"] is not None:
        found["quantize"] = loading["quantize"]
    if loading["image_size"] is not None:
        found["image_size"] = loading["image_size"].model_dump(exclude_none=True)
    return found


def _finished(out: Path | None, request: dict[str, Any]) -> FinishedTasks:
    # A model in memory has no files that identify its weights: its tasks are not kept.
    return FinishedTasks(None if request["model"] is None else out, request)


def _result(
    adapter: "MmkdModel",
    manager: "ChosenTasks",
    request: dict[str, Any],
    given: list[dict[str, Any]],
    failed: dict[str, Exception],
) -> EvaluationResult:
    path = request["model"]
    tokens = sum(g["tokens"] for g in given)
    answering = sum(g["generation_seconds"] for g in given)
    return EvaluationResult(
        model=path or adapter.model.config.name_or_path or type(adapter.model).__name__,
        scores=_joined(given, "scores"),
        parameters=adapter.model.num_parameters(),  # of a quantized model too
        weights_bytes=weights_bytes(path, request["revision"], adapter.model),
        tokens_per_second=tokens / answering if answering else 0.0,
        seconds=sum(g["seconds"] for g in given),
        **{key: request[key] for key in ("lmms_eval", "device", "dtype", "batch_size", "limit")},
        data={name: [str(f) for f in found.files] for name, found in manager.local.items()},
        samples=_joined(given, "samples"),
        unanswered=_joined(given, "unanswered"),
        failed={task: one_line(error) for task, error in failed.items()},
        calibration={t: facts for g in given for t, facts in g.get("calibration", {}).items()},
        weights=weights_hash(path),
    )


def _joined(given: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return {task: value for g in given for task, value in g[key].items()}


def _raise_failures(failed: dict[str, Exception], asked: int, result: EvaluationResult) -> None:
    """
    Raises:
        EvaluationError: some of the tasks failed.
    """
    if not failed:
        return
    task, error = next(iter(failed.items()))
    raise EvaluationError(
        f"{len(failed)} of {asked} tasks failed, the first: {one_line(error)}",
        where=task,
        hint=f"the other scores are kept; {AGAIN}",
        scores=result.scores,
    )


def _require_positive(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise MmkdError(f"{name} is {value}", hint="give a whole number of at least 1")


def require_lmms_eval() -> None:
    """Raise an error that says how to install lmms-eval if it is missing."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise MmkdError("lmms-eval is not installed", hint=INSTALL)


def check(
    tasks: Sequence[str], include_path: Path | None, local: Path | None, limit: int | None = None
) -> None:
    """Check tasks before there is a model to score.

    Raises:
        MmkdError: lmms-eval or a package that a task imports is missing, or a task is unknown,
            needs a judge or a server, or has no score with this limit.
        DataError: a task's local data is missing or of another schema, or its data on the Hub
            cannot be reached.
    """
    require_lmms_eval()
    with silent_imports():
        from mmkd.evaluation.manager import find_tasks

        find_tasks(tasks, include_path, local, limit)
