"""Evaluation of a run's models, one after another.

Finished parts are kept. A part that fails is reported at the end and does not stop the others.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

from mmkd.errors import AGAIN, EvaluationError, MmkdError, one_line
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
from mmkd.runtime.progress import say, say_heading
from mmkd.runtime.run_folder import EvaluationFolder
from mmkd.runtime.shapes import Decoding, Results, Shape, read_if

UNSAID = {"revision": None, "processor": None, "quantize": None}
"""Values of keys that older versions did not write to request.json."""


def evaluate_models(
    sources: dict[str, ModelConfig], settings: EvaluateConfig, folder: Path, device: str
) -> None:
    """Evaluate every model; one that fails does not stop the others.

    Args:
        sources: the models by label.
        settings: the recipe's `evaluate`.
        folder: an `EvaluationFolder` for each label is written here.
        device: where they run.

    Raises:
        EvaluationError: some of the models could not be evaluated; everything else is written.
    """
    failed: dict[str, Exception] = {}
    for label, source in sources.items():
        interrupt.stop_here()
        try:
            _evaluate_one(label, source, settings, EvaluationFolder(folder / label), device)
        except Exception as error:
            interrupt.stop_here()
            if disk_error(error) is not None:
                raise
            failed[label] = error
            say(f"{label}: its evaluation failed ({one_line(error)})")
    _raise_failures(failed, len(sources))


def _evaluate_one(
    label: str, source: ModelConfig, settings: EvaluateConfig, out: EvaluationFolder, device: str
) -> None:
    """Scores, sample answers and decoding times of one model. One that fails does not stop the
    others."""
    model: dict[str, Any] = {
        "model": source.model,
        "revision": source.revision,
        "processor": source.processor,
        "weights": weights_hash(source.model),
        "quantize": quantization_of(source),
    }
    running: dict[str, Any] = {
        "device": device,
        "revision": source.revision,
        "quantize": model["quantize"],
    }
    if source.model is not None and (commit := model_commit(source.model, source.revision)):
        model["commit"] = commit
    if source.image_size is not None:
        model["image_size"] = source.image_size.model_dump(exclude_none=True)
        running["image_size"] = source.image_size
    parts = []
    if settings.tasks:
        parts.append(partial(_score, label, model, settings, out, running))
    if settings.samples is not None and "@" not in label:
        parts.append(partial(_answer_samples, label, model, settings, out, running))
    if settings.decode and "@" not in label:
        parts.append(partial(_time_decoding, label, model, settings.decode, out, running))
    failures = []
    for part in parts:
        interrupt.stop_here()
        try:
            part()
        except Exception as error:
            interrupt.stop_here()
            if disk_error(error) is not None:
                raise
            failures.append(error)
    for other in failures[1:]:  # the caller reports the first
        say(f"{label}: its evaluation failed ({one_line(other)})")
    if failures:
        raise failures[0]


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


def _score(
    label: str,
    model: dict[str, Any],
    settings: EvaluateConfig,
    out: EvaluationFolder,
    running: dict[str, Any],
) -> None:
    from mmkd.evaluation.run import evaluate as score

    request = {**model, **settings.model_dump(mode="json", exclude={"decode", "samples"})}
    request["data"] = _data_of(settings)
    if _answered(out, request):
        return
    if twin := _twin(out, request):
        write_folder(out.path, partial(_with_scores_of, twin, out))
        results = read_json(twin.results)
        write_json(out.results, {**results, "model": model["model"]})
        write_json(out.request, request)
        say(f"{label}: scores of the same weights as {twin.path.name}")
        return
    say_heading(f"{label}: evaluation")
    # Tasks that fail leave results of this request: they must not pass for those of an older one.
    out.request.unlink(missing_ok=True)
    score(
        model["model"],
        processor=model["processor"],
        tasks=settings.tasks,
        include_path=Path(settings.include) if settings.include else None,
        local=Path(settings.local) if settings.local else None,
        out=out.path,
        batch_size=settings.batch_size,
        limit=settings.limit,
        calibration=settings.calibration,
        **running,
    )
    write_json(out.request, request)


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


def _answer_samples(
    label: str,
    model: dict[str, Any],
    settings: EvaluateConfig,
    out: EvaluationFolder,
    running: dict[str, Any],
) -> None:
    from mmkd.evaluation.samples import answer_samples

    assert settings.samples is not None
    say_heading(f"{label}: sample answers")
    loading = {k: v for k, v in running.items() if k != "device"}
    answer_samples(
        model["model"],
        settings.samples,
        out.answers,
        model=model,
        batch_size=settings.batch_size,
        device=distributed.choose_device(running["device"]),
        **loading,
    )


def _time_decoding(
    label: str,
    model: dict[str, Any],
    contexts: list[int],
    out: EvaluationFolder,
    running: dict[str, Any],
) -> None:
    from mmkd.evaluation.decode import time_folder

    path = out.decoding
    request = {**model, "contexts": contexts, "device": running["device"]}
    if (found := read_if(Decoding, path)) and UNSAID | found.get("request", {}) == request:
        return
    say_heading(f"{label}: decoding")
    time_folder(model["model"], contexts, path, request=request, **running)
