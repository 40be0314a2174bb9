"""Scores of a model on lmms-eval tasks, in process: from a folder, or in the middle of training.

    result = evaluate("runs/mine/02-mimic/student", tasks=["scenes_pope"],
                      include_path=Path("data/scenes/tasks"), out=Path("runs/mine/evaluation"))
    result.scores["scenes_pope"]["pope_adversarial_accuracy"]

Files: `out/results.json` (written last, so it is there only when all is) and
`out/samples/<task>.jsonl`, one line per document.
"""

import importlib.metadata
import importlib.util
import io
import json
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import nn

from mmkd.errors import MmkdError
from mmkd.evaluation.install import INSTALL
from mmkd.evaluation.isolation import isolated, silent_imports
from mmkd.files import write_json, write_text

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager
    from transformers import PreTrainedModel, ProcessorMixin

Sample = dict[str, Any]


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model and what they cost.

    Attributes:
        model: folder or name of the model.
        scores: {task: {metric: value}}.
        parameters: number of weights, tied ones counted once.
        weights_bytes: size of the weight files; of the weights in memory if there are no files.
        tokens_per_second: generated tokens per second inside `generate`, all tasks together.
        seconds: wall time of loading data, answering and scoring.
        lmms_eval: version of lmms-eval.
        device, dtype: where and in which type the model ran.
        batch_size, limit: as asked for; with a limit the scores are of the first documents only.
        data: {task: files of its documents}, for tasks that were read from `local`.
        samples: {task: [one record per document]}.
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

    def summary(self) -> dict[str, Any]:
        """What `results.json` holds: everything but the samples."""
        found = asdict(self)
        del found["samples"]
        return found


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
    progress: bool | None = None,
) -> EvaluationResult:
    """Run lmms-eval tasks on a model; the caller's random streams and logging stay untouched.

    Args:
        model: a folder, a Hub name, or a model in memory, whose train/eval state and device stay.
        processor: needed with a model in memory; else the name of one that is not the model's own.
        tasks: names of tasks, groups and tags, from `include_path` or bundled with lmms-eval, or
            short names of `mmkd.evaluation.standard`.
        include_path: folder with task YAML files.
        out: folder for `results.json` and `samples/`; None writes nothing.
        local: folder with the parquet files of tasks whose data is on the Hub, see
            `mmkd.evaluation.local`; None loads them from the Hub.
        batch_size: questions per generate call.
        limit: only the first so many documents of every task.
        device: where a model from a folder runs; `auto` is the GPU if there is one.
        revision: commit, tag or branch of a Hub name.
        trust_remote_code: run the model code that comes with the checkpoint.
        progress: show progress bars; None shows them on a terminal.

    Raises:
        MmkdError: lmms-eval is missing, a task is unknown, needs a judge or returned no scores.
        CheckpointError: the model or its processor cannot be used.
        DataError: a task's data file is missing or of another schema.
    """
    require_lmms_eval()
    _require_positive(batch_size=batch_size, limit=limit)
    with isolated(progress):
        from mmkd.evaluation.adapter import MmkdModel
        from mmkd.evaluation.manager import find_tasks

        manager = find_tasks(tasks, include_path, local, limit)
        path = None if isinstance(model, nn.Module) else str(model)
        adapter = MmkdModel(
            path,
            batch_size,
            device,
            trust_remote_code=trust_remote_code,
            revision=revision,
            model=model if isinstance(model, nn.Module) else None,
            processor=processor,
            progress=progress,
        )
        started = time.perf_counter()
        raw = _simple_evaluate(adapter, manager.chosen.names, manager, limit)
        seconds = time.perf_counter() - started
    scores = collect_scores(raw, manager.chosen.names)
    result = EvaluationResult(
        model=path or adapter.model.config.name_or_path or type(adapter.model).__name__,
        scores=scores,
        parameters=sum(p.numel() for p in adapter.model.parameters()),
        weights_bytes=_weights_bytes(path, revision, adapter.model),
        tokens_per_second=adapter.tokens_per_second,
        seconds=seconds,
        lmms_eval=importlib.metadata.version("lmms-eval"),
        device=str(adapter.device),
        dtype=str(adapter.model.dtype).removeprefix("torch."),
        batch_size=batch_size,
        limit=limit,
        data={name: [str(f) for f in found.files] for name, found in manager.local.items()},
        samples={task: [_sample(s) for s in raw["samples"][task]] for task in scores},
    )
    if out is not None:
        write_result(result, out)
    return result


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
    """Everything about tasks that can be known to be wrong before there is a model to score.

    Raises:
        MmkdError: lmms-eval or a package that a task imports is missing, a task is unknown, needs
            a judge or a server, or has no score with this limit.
        DataError: a task's local data is missing or of another schema, or the Hub's cannot be
            reached.
    """
    require_lmms_eval()
    with silent_imports():
        from mmkd.evaluation.manager import find_tasks

        find_tasks(tasks, include_path, local, limit)


def _simple_evaluate(
    adapter: Any, tasks: list[str], manager: "TaskManager", limit: int | None
) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    where = ", ".join(tasks)
    # some tasks print their categories' scores, or write them beside the working directory
    with TemporaryDirectory() as scratch, redirect_stdout(io.StringIO()):
        try:
            found: dict[str, Any] | None = simple_evaluate(
                model=adapter,
                tasks=list(tasks),
                task_manager=manager,
                batch_size=adapter.batch_size,
                limit=limit,
                log_samples=True,
                bootstrap_iters=0,
                process_docs_parallel=1,
                verbosity="ERROR",
                cli_args=Namespace(output_path=scratch, process_with_media=True),
            )
        except RetryError as error:  # lmms-eval hides the cause behind five retries
            cause = error.last_attempt.exception() or error
            if isinstance(cause, MmkdError):
                raise cause from None
            first = (str(cause).splitlines() or [""])[0]
            raise MmkdError(
                f"lmms-eval could not use the data ({type(cause).__name__}: {first})",
                where=where,
                mend="check its columns, the network and HF_HUB_OFFLINE, or give it as `local`",
            ) from cause
        except AssertionError as error:
            raise MmkdError(
                f"lmms-eval refuses the documents ({error})",
                where=where,
                mend="check the data; a limit must not part documents that are scored together",
            ) from error
    return found or {}


def collect_scores(raw: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """lmms-eval's {"metric,filter": value} as {task: {metric: value}}, without standard errors.

    Raises:
        MmkdError: an asked task has no scores, or fewer documents were answered than it has.
    """
    subtasks = raw.get("group_subtasks", {})
    scores: dict[str, dict[str, float]] = {}
    for task in [leaf for asked in tasks for leaf in _leaves(asked, subtasks)]:
        numbers = {
            _metric_name(key): float(value)
            for key, value in raw.get("results", {}).get(task, {}).items()
            if "_stderr" not in key and isinstance(value, int | float)
        }
        if not numbers:
            raise MmkdError(
                "lmms-eval returned no scores",
                where=task,
                mend="see its log: python -m lmms_eval --tasks ... --verbosity DEBUG",
            )
        expected = raw["n-samples"][task]["effective"]
        answered = len(raw.get("samples", {}).get(task, ()))
        if answered != expected:
            raise MmkdError(f"lmms-eval scored {answered} of {expected} documents", where=task)
        scores[task] = numbers
    return scores


def _leaves(task: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    below = subtasks.get(task) or []
    return [leaf for name in below for leaf in _leaves(name, subtasks)] if below else [task]


def _metric_name(key: str) -> str:
    metric, _, filter_name = key.partition(",")
    return metric if filter_name in ("", "none") else f"{metric}_{filter_name}"


def _sample(logged: Mapping[str, Any]) -> Sample:
    """One line of `samples/<task>.jsonl`.

    The scene tasks' verdicts say whether an answer is correct; for tasks of others only lmms-eval's
    own fields are known and `correct` is None.
    """
    verdict = next((v for v in logged.values() if isinstance(v, Mapping) and "correct" in v), {})
    doc = logged["doc"]
    responses = logged["filtered_resps"]
    common = {
        "doc_id": logged["doc_id"],
        "question": doc.get("question", (logged.get("arguments") or [""])[0]),
        "answer": logged["target"],
        "prediction": responses[0] if responses else "",
        "correct": None,
    }
    kinds = {key: doc[key] for key in ("category", "kind") if key in doc}
    return {**common, **kinds, **verdict}


def _weights_bytes(path: str | None, revision: str | None, model: nn.Module) -> int:
    folder = _folder(path, revision) if path else None
    if folder is not None and (files := list(folder.glob("*.safetensors"))):
        return sum(file.stat().st_size for file in files)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _folder(path: str, revision: str | None) -> Path | None:
    """A model's folder, or where the Hub's files of it were put."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def write_result(result: EvaluationResult, out: Path) -> None:
    """Write the samples, then `results.json`; an older `results.json` goes first."""
    (out / "results.json").unlink(missing_ok=True)
    for task, samples in result.samples.items():
        lines = [json.dumps(s, ensure_ascii=False, default=str) + "\n" for s in samples]
        write_text(out / "samples" / f"{task}.jsonl", "".join(lines))
    write_json(out / "results.json", result.summary())
