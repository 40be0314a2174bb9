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
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from mmkd.errors import AGAIN, EvaluationError, MmkdError, one_line
from mmkd.evaluation.finished import FinishedTasks, facts_of
from mmkd.evaluation.install import INSTALL
from mmkd.evaluation.isolation import isolated, silent_imports
from mmkd.evaluation.pictures import allow
from mmkd.evaluation.refusals import describe, is_of_document
from mmkd.evaluation.scored import Sample, collect_scores, sample_of, simple_evaluate
from mmkd.evaluation.task_files import data_files
from mmkd.modeling.foreign_models import INDEX, indexed_files
from mmkd.recipe import ImageSizeConfig
from mmkd.runtime import interrupt
from mmkd.runtime.files import locked, write_json, write_text
from mmkd.runtime.hashes import weights_hash
from mmkd.runtime.progress import say
from mmkd.runtime.run_folder import EvaluationFolder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from mmkd.evaluation.adapter import MmkdModel
    from mmkd.evaluation.manager import ChosenTasks
    from mmkd.recipe import Quantization

Call = TypeVar("Call", bound=Callable[..., Any])


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model and what they cost.

    Attributes:
        model: folder or name of the model.
        scores: {task: {metric: value}}.
        parameters: number of weights, tied ones counted once.
        weights_bytes: size of the weight files; of the weights in memory if there are no files.
        tokens_per_second: generated tokens per second inside `generate`, over all tasks.
        seconds: wall time of loading data, answering and scoring.
        lmms_eval: version of lmms-eval.
        device, dtype: where and in which type the model ran.
        batch_size, limit: as passed; with a limit the scores are of the first documents only.
        data: {task: files of its documents}, for tasks that were read from `local`.
        unanswered: {task: {documents: count, first: document, reason: text}}, for tasks with
            documents that the model could not be asked about. They count as wrong.
        failed: {task: reason}, for tasks without scores.
        samples: {task: [one record per document]}.
        weights: one hash of the weight files; None for a model without a folder.
    """

    model: str
    scores: dict[str, dict[str, float]]
    parameters: int
    weights_bytes: int
    tokens_per_second: float
    seconds: float
    lmms_eval: str
    device: str
    dtype: str
    batch_size: int
    limit: int | None
    data: dict[str, list[str]]
    samples: dict[str, list[Sample]] = field(repr=False)
    unanswered: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    weights: str | None = None

    def summary(self) -> dict[str, Any]:
        """What `results.json` holds: everything but the samples."""
        found = asdict(self)
        del found["samples"]
        return found


def _alone_in_out(function: Call) -> Call:
    """Keep other evaluations out of the folder that is written."""

    @wraps(function)
    def alone(*words: Any, **settings: Any) -> Any:
        out = settings["out"]
        with nullcontext() if out is None else locked(out):
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
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantize: "Quantization | None" = None,
    image_size: ImageSizeConfig | None = None,
    progress: bool | None = None,
) -> EvaluationResult:
    """Run lmms-eval tasks on a model; the caller's random streams and logging stay untouched.

    Args:
        model: a folder, a Hub name, or a model in memory. The latter keeps its train/eval state and
            its device.
        processor: required for a model in memory; otherwise the name of a processor that is not the
            model's own.
        tasks: names of tasks, groups and tags, from `include_path` or bundled with lmms-eval, or
            short names of `mmkd.evaluation.standard`.
        include_path: folder with task YAML files.
        out: folder for `results.json` and `samples/`; None writes nothing.
        local: folder with the parquet files of tasks whose data is on the Hub, see
            `mmkd.evaluation.local`; None loads them from the Hub.
        batch_size: questions per generate call.
        limit: number of documents of each task, from the first on; None is all.
        device: where a model from a folder runs; `auto` is the GPU if there is one.
        revision: commit, tag or branch of a Hub name.
        trust_remote_code: run the model code that comes with the checkpoint.
        quantize: as in `load_pretrained`, for a model from a folder or the Hub.
        image_size: size of pictures, for a model from a folder; None is the processor's own.
        progress: show progress bars; None shows them on a terminal.

    Raises:
        MmkdError: lmms-eval is missing, or a task is unknown, needs a judge or returned no scores.
        CheckpointError: the model or its processor cannot be used, or another command writes into
            `out`.
        DataError: a task's data file is missing or of another schema, or the model can be asked
            about none of its documents.
        EvaluationError: some of the tasks failed; the scores of the others are written.
    """
    require_lmms_eval()
    _require_positive(batch_size=batch_size, limit=limit)
    with isolated(progress):
        from mmkd.evaluation.adapter import MmkdModel
        from mmkd.evaluation.manager import find_tasks

        manager = find_tasks(tasks, include_path, local, limit)
        allow(*manager.data_folders())
        path = None if isinstance(model, nn.Module) else str(model)
        adapter = MmkdModel(
            path,
            batch_size,
            device,
            trust_remote_code=trust_remote_code,
            revision=revision,
            quantize=quantize,
            model=model if isinstance(model, nn.Module) else None,
            processor=processor,
            image_size=image_size,
            progress=progress,
        )
        request = _request(adapter, path, processor, revision, limit)
        if quantize is not None:
            request["quantize"] = quantize
        if image_size is not None:
            request["image_size"] = image_size.model_dump(exclude_none=True)
        # A model in memory has no files that identify its weights: its tasks are not kept.
        finished = FinishedTasks(None if path is None else out, request)
        given, failed = _run_tasks(adapter, manager, limit, finished)
    tokens = sum(g["tokens"] for g in given)
    answering = sum(g["generation_seconds"] for g in given)
    result = EvaluationResult(
        model=path or adapter.model.config.name_or_path or type(adapter.model).__name__,
        scores=_joined(given, "scores"),
        parameters=adapter.model.num_parameters(),  # of a quantized model too
        weights_bytes=_weights_bytes(path, revision, adapter.model),
        tokens_per_second=tokens / answering if answering else 0.0,
        seconds=sum(g["seconds"] for g in given),
        lmms_eval=request["lmms_eval"],
        device=request["device"],
        dtype=request["dtype"],
        batch_size=batch_size,
        limit=limit,
        data={name: [str(f) for f in found.files] for name, found in manager.local.items()},
        samples=_joined(given, "samples"),
        unanswered=_joined(given, "unanswered"),
        failed={task: one_line(error) for task, error in failed.items()},
        weights=weights_hash(path),
    )
    if out is not None:
        write_result(result, out)
    if failed:
        raise _failure(failed, len(manager.chosen.names), result)
    finished.clear()
    return result


def _request(
    adapter: "MmkdModel", path: str | None, processor: Any, revision: str | None, limit: int | None
) -> dict[str, Any]:
    """What finished tasks depend on, as JSON. A task is run again if anything of it differs."""
    other = processor if isinstance(processor, str) else None
    return {
        "model": path,
        "files": [*_model_facts(path, revision), *_model_facts(other, None)],
        "revision": revision,
        "processor": other,
        "device": str(adapter.device),
        "dtype": str(adapter.model.dtype).removeprefix("torch."),
        "batch_size": adapter.batch_size,
        "limit": limit,
        "lmms_eval": importlib.metadata.version("lmms-eval"),
    }


def _run_tasks(
    adapter: "MmkdModel", manager: "ChosenTasks", limit: int | None, finished: FinishedTasks
) -> tuple[list[dict[str, Any]], dict[str, Exception]]:
    """The results of each task, and the errors of the tasks that failed.

    Raises:
        Exception: all tasks failed, or an error that is not about one document occurred.
    """
    given: list[dict[str, Any]] = []
    failed: dict[str, Exception] = {}
    for name in manager.chosen.names:
        interrupt.stop_here()  # a library may have swallowed the exception
        facts = _task_facts(name, manager)
        known = finished.read(name, facts)
        if known is not None:
            say(f"{name}: already answered")
        else:
            try:
                known = finished.write(name, facts, _run_task(adapter, name, manager, limit))
            except Exception as error:
                interrupt.stop_here()
                if not isinstance(error, MmkdError) and not is_of_document(error):
                    raise
                say(f"{name}: failed ({one_line(error)})")
                failed[name] = error
                continue
            for task, found in known["unanswered"].items():
                say(describe(task, found))
        given.append(known)
    if not given:
        raise next(iter(failed.values()))
    return given, failed


def _run_task(
    adapter: "MmkdModel", name: str, manager: "ChosenTasks", limit: int | None
) -> dict[str, Any]:
    """Scores, samples and costs of one task, or of one group of tasks."""
    started = time.perf_counter()
    tokens, answering = adapter.generated_tokens, adapter.generation_seconds
    raw = simple_evaluate(adapter, [name], manager, limit)
    scores = collect_scores(raw, [name])
    samples, unanswered = {}, {}
    for task in scores:
        adapter.refusals.require_answers(task)
        reasons = adapter.refusals.reasons.get(task, {})
        samples[task] = [sample_of(s, reasons.get(s["doc_id"])) for s in raw["samples"][task]]
        if found := adapter.refusals.of(task):
            unanswered[task] = found
    return {
        "scores": scores,
        "samples": samples,
        "unanswered": unanswered,
        "tokens": adapter.generated_tokens - tokens,
        "generation_seconds": adapter.generation_seconds - answering,
        "seconds": time.perf_counter() - started,
    }


def _joined(given: list[dict[str, Any]], key: str) -> dict[str, Any]:
    return {task: value for g in given for task, value in g[key].items()}


def _failure(failed: dict[str, Exception], asked: int, result: EvaluationResult) -> EvaluationError:
    task, error = next(iter(failed.items()))
    return EvaluationError(
        f"{len(failed)} of {asked} tasks failed, the first: {one_line(error)}",
        where=task,
        mend=f"the other scores are kept; {AGAIN}",
        scores=result.scores,
    )


def _model_facts(path: str | None, revision: str | None) -> list[list[Any]]:
    """Facts of a model's files: weights, configs, chat template and code."""
    folder = _folder(path, revision) if path else None
    if folder is None:
        return []
    kinds = ("*.safetensors", "*.json", "*.jinja", "*.py")
    return facts_of([file for kind in kinds for file in folder.glob(kind)])


def _task_facts(name: str, manager: "ChosenTasks") -> list[list[Any]]:
    """Facts of a task's own file, its functions and its documents."""
    files: list[Path] = []
    every = manager.chosen.tasks
    for task in [t for t in every if t.name == name] or every:  # a group's name is no task's
        if task.path is not None:
            files += [task.path, *task.path.parent.glob("*.py")]  # its scoring functions
            files += data_files(dict(task.config), task.path.parent)
        if found := manager.local.get(task.name):
            files += [*found.files, *found.pictures]
    return facts_of(files)


def _require_positive(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise MmkdError(f"{name} is {value}", mend="give a whole number of at least 1")


def require_lmms_eval() -> None:
    """Raise an error that says how to install lmms-eval if it is missing."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise MmkdError("lmms-eval is not installed", mend=INSTALL)


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


def _weights_bytes(path: str | None, revision: str | None, model: nn.Module) -> int:
    folder = _folder(path, revision) if path else None
    if folder is not None and (files := weight_files(folder)):
        return sum(file.stat().st_size for file in files)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model loads. Some folders hold the same weights twice."""
    index = folder / INDEX
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if index.is_file():
        names = indexed_files(index)
        return [folder / name for name in names if (folder / name).is_file()]
    return sorted(folder.glob("*.safetensors"))


def _folder(path: str, revision: str | None) -> Path | None:
    """A model's folder, or the folder in the Hub's cache that holds its files."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def write_result(result: EvaluationResult, out: Path) -> None:
    """Write the samples, then `results.json`. An older `results.json` is deleted first, so that it
    never stands beside samples of another evaluation."""
    folder = EvaluationFolder(out)
    folder.results.unlink(missing_ok=True)
    for task, samples in result.samples.items():
        lines = [json.dumps(s, ensure_ascii=False, default=str) + "\n" for s in samples]
        write_text(folder.samples(task), "".join(lines))
    write_json(folder.results, result.summary())
