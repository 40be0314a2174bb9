"""The result of an evaluation, and its files."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmkd.evaluation.scored import Sample
from mmkd.runtime.files import write_json, write_text
from mmkd.runtime.run_folder import EvaluationFolder


@dataclass(frozen=True)
class EvaluationResult:
    """Scores of one model and what they cost.

    Attributes:
        model: folder or name of the model.
        scores: {task: {metric: value}}.
        parameters: number of weights, tied ones counted once.
        weights_bytes: size of the weight files; of the weights in memory if there are no files.
        tokens_per_second: generated tokens per second inside `generate`, over all tasks.
        seconds: wall time of loading data, answering, scoring and calibration.
        lmms_eval: version of lmms-eval.
        device, dtype: where and in which type the model ran.
        batch_size, limit: as passed; with a limit the scores are of the first documents only.
        data: {task: files of its documents}, for tasks that were read from `local`.
        unanswered: {task: {documents: count, first: document, reason: text}}, for tasks with
            documents that the model could not be asked about. They count as wrong.
        failed: {task: reason}, for tasks without scores.
        calibration: {task: facts of `mmkd.evaluation.calibration`}, for tasks whose calibration was
            computed. Its errors are also in `scores`, as `answer_ece` and `token_ece`.
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
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: str | None = None

    def summary(self) -> dict[str, Any]:
        """What `results.json` holds: everything but the samples."""
        found = asdict(self)
        del found["samples"]
        if not self.calibration:
            del found["calibration"]
        return found


def write_result(result: EvaluationResult, out: Path) -> None:
    """Write the samples, then `results.json`. An older `results.json` is deleted first, so that it
    is never combined with samples of another evaluation."""
    folder = EvaluationFolder(out)
    folder.results.unlink(missing_ok=True)
    for task, samples in result.samples.items():
        lines = [json.dumps(s, ensure_ascii=False, default=str) + "\n" for s in samples]
        write_text(folder.samples(task), "".join(lines))
    write_json(folder.results, result.summary())
