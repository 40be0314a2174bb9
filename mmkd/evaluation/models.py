"""Evaluation of a run's models: the scores of all, then sample answers and decoding times.

Finished parts are kept. A part that fails is reported at the end and does not stop the others.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mmkd.errors import AGAIN, EvaluationError, MmkdError, PeerError, one_line
from mmkd.modeling.loading import quantization_of
from mmkd.recipe import EvaluateConfig, ModelConfig
from mmkd.runtime import distributed, interrupt
from mmkd.runtime.files import (
    disk_error,
    link_file,
    link_folder,
    read_json,
    write_folder,
    write_json,
)
from mmkd.runtime.hashes import file_hash, weights_hash
from mmkd.runtime.hub import model_commit
from mmkd.runtime.processes import ALONE, Processes
from mmkd.runtime.progress import muted, say, say_heading
from mmkd.runtime.run_folder import EvaluationFolder
from mmkd.runtime.shapes import Decoding, Results, Shape, read_if

UNSAID = {"revision": None, "processor": None, "quantize": None}
"""Values of keys that older versions did not write to request.json."""


def evaluate_models(
    sources: dict[str, ModelConfig],
    settings: EvaluateConfig,
    folder: Path,
    device: str,
    processes: Processes = ALONE,
) -> None:
    """Evaluate every model; one that fails does not stop the others.

    Args:
        sources: the models by label.
        settings: the recipe's `evaluate`.
        folder: an `EvaluationFolder` for each label is written here.
        device: where they run.
        processes: that answer the questions of tasks together. Afterwards they part, and only the
            first one answers sample questions, times decoding and raises errors.

    Raises:
        EvaluationError: some of the models could not be evaluated; everything else is written.
    """
    models = [
        _Model(label, source, EvaluationFolder(folder / label), device)
        for label, source in sources.items()
    ]
    failed: dict[str, Exception] = {}
    with muted(not processes.is_first), processes.failing_together():
        for model in models if settings.tasks else []:
            _try(partial(_score, model, settings, processes), model, failed)
    if processes.size > 1:
        distributed.leave()
    if not processes.is_first:
        return
    for model in models:
        if settings.samples is not None and "@" not in model.label:
            _try(partial(_answer_samples, model, settings), model, failed)
        if settings.decode and "@" not in model.label:
            _try(partial(_time_decoding, model, settings.decode), model, failed)
    _raise_failures(failed, len(sources))


@dataclass(frozen=True)
class _Model:
    """A model of a run and the folder of its evaluation."""

    label: str
    source: ModelConfig
    out: EvaluationFolder
    device: str

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What says which model it is, as JSON."""
        source = self.source
        found: dict[str, Any] = {
            "model": source.model,
            "revision": source.revision,
            "processor": source.processor,
            "weights": weights_hash(source.model),
            "quantize": quantization_of(source),
        }
        if source.model is not None and (commit := model_commit(source.model, source.revision)):
            found["commit"] = commit
        if source.image_size is not None:
            found["image_size"] = source.image_size.model_dump(exclude_none=True)
        return found

    @property
    def running(self) -> dict[str, Any]:
        """How it is loaded."""
        source = self.source
        found = {
            "device": self.device,
            "revision": source.revision,
            "quantize": quantization_of(source),
        }
        return found | ({} if source.image_size is None else {"image_size": source.image_size})


def _try(part: Callable[[], None], model: _Model, failed: dict[str, Exception]) -> None:
    """Run a part of a model's evaluation. If it fails, keep the model's first error in `failed`."""
    interrupt.stop_here()
    try:
        part()
    except Exception as error:
        interrupt.stop_here()
        if disk_error(error) is not None or isinstance(error, PeerError):
            raise
        failed.setdefault(model.label, error)
        say(f"{model.label}: its evaluation failed ({one_line(error)})")


def _raise_failures(failed: dict[str, Exception], asked: int) -> None:
    """
    Raises:
        EvaluationError: some of the models could not be evaluated.
    """
    if not failed:
        return
    label, error = next(iter(failed.items()))
    where = f"{label}: {error.where}" if isinstance(error, MmkdError) and error.where else label
    raise EvaluationError(
        f"the evaluation of {len(failed)} of {asked} models failed, the first: {one_line(error)}",
        where=where,
        hint=f"the students and the other scores are kept; {AGAIN}",
    ) from error


def _score(model: _Model, settings: EvaluateConfig, processes: Processes) -> None:
    from mmkd.evaluation.run import evaluate as score

    source, out = model.source, model.out
    with processes.failing_together():
        if processes.from_first(partial(_has_scores, model, settings)):
            return
        score(
            str(source.model),
            processor=source.processor,
            tasks=settings.tasks,
            include_path=Path(settings.include) if settings.include else None,
            local=Path(settings.local) if settings.local else None,
            out=out.path,
            batch_size=settings.batch_size,
            limit=settings.limit,
            calibration=settings.calibration,
            processes=processes,
            **model.running,
        )
        if processes.is_first:
            write_json(out.request, _request(model, settings))


def _request(model: _Model, settings: EvaluateConfig) -> dict[str, Any]:
    """What scores depend on, as JSON."""
    said = settings.model_dump(mode="json", exclude={"decode", "samples"})
    return {**model.facts, **said, "data": _data_of(settings)}


def _has_scores(model: _Model, settings: EvaluateConfig) -> bool:
    """Whether a model's scores are there, or could be taken from another label. If not, its folder
    is made ready for them."""
    request, out = _request(model, settings), model.out
    if _answered(out, request):
        return True
    if twin := _twin(out, request):
        write_folder(out.path, partial(_with_scores_of, twin, out))
        results = read_json(twin.results)
        write_json(out.results, {**results, "model": model.source.model})
        write_json(out.request, request)
        say(f"{model.label}: scores of the same weights as {twin.path.name}")
        return True
    say_heading(f"{model.label}: evaluation")
    # Tasks that fail leave results of this request: they must not pass for those of an older one.
    out.request.unlink(missing_ok=True)
    return False


def _with_scores_of(twin: EvaluationFolder, out: EvaluationFolder, folder: Path) -> None:
    """Fill a folder with a twin's files, and with those of other parts that `out` has already."""
    link_folder(twin.path, folder)
    for part in (out.answers, out.decoding):
        if part.is_file():
            (folder / part.name).unlink(missing_ok=True)
            link_file(part, folder / part.name)


def _answered(out: EvaluationFolder, request: dict[str, Any]) -> bool:
    sound = read_if(Results, out.results) is not None
    return sound and out.request.exists() and _same(_asked(out.request), request)


def _same(found: dict[str, Any], request: dict[str, Any]) -> bool:
    """Whether the results of one request answer another. Data of which one of them knows nothing
    are taken for equal: older versions wrote nothing down, and data that are gone cannot be scored
    again. Results with calibration answer a request without it too. Results of older versions have
    none and are kept: a new version does not evaluate a run again."""
    data = found.get("data"), request["data"]
    calibrated = found["calibration"] or not request["calibration"]
    equal = {key: request[key] for key in ("data", "calibration")}
    return calibrated and (None in data or data[0] == data[1]) and {**found, **equal} == request


def _data_of(settings: EvaluateConfig) -> dict[str, str] | None:
    """{file: sha256} of the local files that the tasks read; None where they are not there."""
    from mmkd.evaluation.catalog import choose
    from mmkd.evaluation.local import find_local
    from mmkd.evaluation.task_files import data_files

    try:
        chosen = choose(settings.tasks, Path(settings.include) if settings.include else None)
        local = find_local(chosen.tasks, Path(settings.local)) if settings.local else {}
        files = [file for found in local.values() for file in (*found.files, *found.pictures)]
        for task in chosen.tasks:
            if task.path is not None and task.name not in local:
                files += data_files(dict(task.config), task.path.parent)
        return {os.path.normpath(f): file_hash(f) for f in files if f.is_file()}
    except (MmkdError, OSError):
        return None


def _asked(path: Path) -> dict[str, Any]:
    """The request of a finished evaluation. Keys that were added since get their defaults."""
    fields = EvaluateConfig.model_fields
    unset = {name: f.default for name, f in fields.items() if not f.is_required()}
    del unset["decode"], unset["samples"]
    return UNSAID | unset | (read_if(Shape, path) or {})


def _twin(out: EvaluationFolder, request: dict[str, Any]) -> EvaluationFolder | None:
    """A finished evaluation of the same weights on the same tasks under another label."""
    if request["weights"] is None:
        return None
    for path in sorted(out.path.parent.glob("*")):
        other = EvaluationFolder(path)
        if other == out or not other.request.exists():
            continue
        sound = read_if(Results, other.results) is not None
        if sound and _same(_asked(other.request) | {"model": request["model"]}, request):
            return other
    return None


def _answer_samples(model: _Model, settings: EvaluateConfig) -> None:
    from mmkd.evaluation.samples import answer_samples

    assert settings.samples is not None
    say_heading(f"{model.label}: sample answers")
    loading = {k: v for k, v in model.running.items() if k != "device"}
    answer_samples(
        str(model.source.model),
        settings.samples,
        model.out.answers,
        model=model.facts,
        batch_size=settings.batch_size,
        device=distributed.choose_device(model.device),
        **loading,
    )


def _time_decoding(model: _Model, contexts: list[int]) -> None:
    from mmkd.evaluation.decode import time_folder

    path = model.out.decoding
    request = {**model.facts, "contexts": contexts, "device": model.device}
    if (found := read_if(Decoding, path)) and UNSAID | found.get("request", {}) == request:
        return
    say_heading(f"{model.label}: decoding")
    time_folder(str(model.source.model), contexts, path, request=request, **model.running)
