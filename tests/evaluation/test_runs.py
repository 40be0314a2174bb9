"""Whole evaluations through lmms-eval."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import ImageFile
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmkd.data.scenes.build import POPE_CATEGORIES
from mmkd.data.scenes.questions import ASKERS
from mmkd.errors import DataError, MmkdError
from mmkd.evaluation import scenes
from mmkd.evaluation.isolation import isolated, silent_imports
from mmkd.evaluation.manager import find_tasks
from mmkd.evaluation.run import evaluate, require_lmms_eval
from mmkd.evaluation.scored import collect_scores, simple_evaluate
from tests.support.verdicts import POPE_NAMES, judged

TASKS = ["scenes_pope", "scenes_vqa", "scenes_vqa_attributes", "scenes_vqa_assets"]
TASKS += ["scenes_caption"]


class Oracle(lmms):
    """Answers with the truth."""

    is_simple = False
    batch_size = 1

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        found = []
        for _, _, _, doc_id, task, split in (r.args for r in requests):
            found.append(GenerationResult(self.task_dict[task][split][doc_id]["answer"]))
        return found

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError


def test_parameters_are_counted_as_transformers_counts_them(
    scenes_dir: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4-bit weights are packed, two in a byte, and `numel` counts the bytes."""
    settings: dict[str, Any] = {"include_path": scenes_dir / "tasks", "out": None, "limit": 1}
    whole = evaluate(tiny_model_dir, tasks=["scenes_pope"], **settings).parameters
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    assert whole == sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(type(model), "num_parameters", lambda self: 12)
    assert evaluate(tiny_model_dir, tasks=["scenes_pope"], **settings).parameters == 12


def test_true_answers_get_full_scores_through_lmms_eval(scenes_dir: Path) -> None:
    manager = find_tasks(["scenes"], scenes_dir / "tasks", None)
    assert sorted(manager.chosen.names) == sorted(TASKS)
    raw = simple_evaluate(Oracle(), TASKS, manager, None)
    scores = collect_scores(raw, TASKS)
    assert list(scores) == TASKS
    assert scores["scenes_caption"] == pytest.approx(
        {
            "caption_chair_s": 0,
            "caption_chair_i": 0,
            "caption_object_recall": 1,
            "caption_bleu": 1,
        }
    )
    assert set(scores["scenes_pope"]) == POPE_NAMES
    for name, value in scores["scenes_pope"].items():
        assert value == (0.5 if name.endswith("yes_rate") else 1.0), name
    for task in TASKS[1:4]:
        kinds = {s["doc"]["kind"] for s in raw["samples"][task]}
        measures = ("accuracy", "majority_accuracy")
        prefixes = ("vqa", *(f"vqa_{k}" for k in kinds))
        assert set(scores[task]) == {f"{p}_{m}" for p in prefixes for m in measures}
        for name, value in scores[task].items():
            assert value <= 1 if "majority" in name else value == 1, name
        assert 0 < scores[task]["vqa_majority_accuracy"] < 1


def test_every_score_a_task_can_yield_is_in_its_yaml(scenes_dir: Path) -> None:
    """lmms-eval drops a metric that the YAML does not list, without a word."""
    from lmms_eval.utils import load_yaml_config

    def listed(task: str) -> dict[str, Any]:
        config = load_yaml_config(str(scenes_dir / "tasks" / f"{task}.yaml"), mode="full")
        return {m["metric"]: m["aggregation"].__name__ for m in config["metric_list"]}

    doc = {"answer": "a", "objects": []}
    pope = [({**doc, "category": c}, "no") for c in POPE_CATEGORIES]
    vqa = [({**doc, "kind": k}, "no") for k in ASKERS]
    assert set(listed("scenes_pope")) == set(judged(scenes.process_pope, pope)) == POPE_NAMES
    for task in TASKS[1:4]:
        assert set(listed(task)) == set(judged(scenes.process_vqa, vqa))
    assert set(listed("scenes_caption")) == set(judged(scenes.process_caption, [(doc, "no")]))
    for task in TASKS:
        for metric, aggregation in listed(task).items():
            assert metric.endswith(f"_{aggregation}"), metric


def test_evaluation_of_a_folder_writes_everything(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "evaluation"
    result = evaluate(
        tiny_model_dir,
        tasks=["scenes_pope", "scenes_caption"],
        include_path=scenes_dir / "tasks",
        out=out,
        batch_size=16,
        limit=5,
    )
    written = json.loads((out / "results.json").read_text())
    assert written == result.summary()
    assert list(written["scores"]) == ["scenes_pope", "scenes_caption"]
    assert set(written["scores"]["scenes_pope"]) == {
        n for n in POPE_NAMES if "popular" not in n and "adversarial" not in n
    }
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    assert written["model"] == str(tiny_model_dir)
    assert written["parameters"] == sum(p.numel() for p in model.parameters())
    assert written["weights_bytes"] == (tiny_model_dir / "model.safetensors").stat().st_size
    assert written["tokens_per_second"] > 0
    assert written["seconds"] > 0
    assert written["lmms_eval"] == "0.7.3"
    assert (written["device"], written["dtype"]) == ("cpu", "float32")
    assert (written["batch_size"], written["limit"]) == (16, 5)

    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert files == ["results.json", "samples/scenes_caption.jsonl", "samples/scenes_pope.jsonl"]
    lines = (out / "samples" / "scenes_pope.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["doc_id"] for s in samples] == [0, 1, 2, 3, 4]
    assert {"question", "answer", "prediction", "correct", "category"} <= set(samples[0])
    shown = sum(s["correct"] for s in samples) / 5
    assert shown == written["scores"]["scenes_pope"]["pope_accuracy"]


def test_evaluation_in_memory_leaves_no_trace(scenes_dir: Path, tiny_model_dir: Path) -> None:
    from loguru import logger

    model = AutoModelForImageTextToText.from_pretrained(tiny_model_dir).train()
    processor = AutoProcessor.from_pretrained(tiny_model_dir)
    log = io.StringIO()
    handler = logger.add(log, level="INFO", format="{message}")
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    filters = list(warnings.filters)

    def run() -> Any:
        return evaluate(
            model,
            processor=processor,
            tasks=["scenes_vqa"],
            include_path=scenes_dir / "tasks",
            out=None,
            batch_size=8,
            limit=9,
        )

    first = run()
    assert random.getstate() == expected[0]
    assert np.random.get_state()[1].tolist() == expected[1]
    assert torch.equal(torch.get_rng_state(), expected[2])
    assert model.training
    assert list(warnings.filters) == filters
    logger.info("still here")
    logger.remove(handler)
    assert log.getvalue() == "still here\n"  # neither lost nor flooded
    second = run()  # the model is still there
    assert first.scores == second.scores
    assert first.samples == second.samples
    assert first.weights_bytes == 4 * first.parameters


def test_isolation_undoes_what_lmms_eval_does_at_import() -> None:
    import datasets
    from loguru import logger

    log = io.StringIO()
    handler = logger.add(log, format="{message}")
    filters, bars = list(warnings.filters), datasets.are_progress_bars_disabled()
    filled = ImageFile.LOAD_TRUNCATED_IMAGES
    with silent_imports():
        assert ImageFile.LOAD_TRUNCATED_IMAGES
    assert filled == ImageFile.LOAD_TRUNCATED_IMAGES

    def fail_inside() -> None:
        with isolated(progress=False):
            assert ImageFile.LOAD_TRUNCATED_IMAGES
            warnings.filterwarnings("ignore")
            logger.remove()
            logger.info("inside")
            assert datasets.are_progress_bars_disabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert list(warnings.filters) == filters
    assert filled == ImageFile.LOAD_TRUNCATED_IMAGES
    assert datasets.are_progress_bars_disabled() == bars
    logger.info("outside")
    logger.remove(handler)
    assert log.getvalue() == "outside\n"


def test_unknown_task_names_the_nearest(scenes_dir: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(MmkdError) as caught:
        evaluate(
            tiny_model_dir,
            tasks=["scenes_pop"],
            include_path=scenes_dir / "tasks",
            out=None,
        )
    text = str(caught.value)
    assert "unknown task 'scenes_pop'" in text
    assert "did you mean scenes_pope?" in text
    assert all(task in text for task in TASKS)
    assert "\n" not in text


def test_requests_that_make_no_sense(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    def run(tasks: list[str], include_path: Path, **more: Any) -> None:
        evaluate(tiny_model_dir, tasks=tasks, include_path=include_path, out=tmp_path / "o", **more)

    tasks = scenes_dir / "tasks"
    with pytest.raises(DataError, match="no such folder of tasks"):
        run(["scenes_pope"], tmp_path / "absent")
    with pytest.raises(MmkdError, match="no tasks to evaluate"):
        run([], tasks)
    with pytest.raises(MmkdError, match="limit is 0"):
        run(["scenes_pope"], tasks, limit=0)
    with pytest.raises(MmkdError, match="batch_size is 0"):
        run(["scenes_pope"], tasks, batch_size=0)
    shutil.copytree(tasks, tmp_path / "alone" / "tasks")
    with pytest.raises(DataError, match=r"data of task scenes_pope is missing.*mmkd data build"):
        run(["scenes_pope"], tmp_path / "alone" / "tasks")
    assert not (tmp_path / "o").exists()


def test_silent_failures_of_lmms_eval_are_errors() -> None:
    raw = {
        "results": {
            "a": {"alias": "a", "x,none": 0.5, "x_stderr,none": "N/A"},
            "b": {"alias": "b"},
        },
        "group_subtasks": {"a": [], "b": [], "both": ["a", "b"]},
        "samples": {"a": [{}, {}], "b": [{}]},
        "n-samples": {"a": {"effective": 2}, "b": {"effective": 1}},
    }
    assert collect_scores(raw, ["a"]) == {"a": {"x": 0.5}}
    for asked in ("b", "both", "c"):
        with pytest.raises(MmkdError, match="returned no scores"):
            collect_scores(raw, [asked])
    raw["n-samples"]["a"]["effective"] = 3
    with pytest.raises(MmkdError, match="2 of 3 documents"):
        collect_scores(raw, ["a"])


def test_missing_lmms_eval_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require_lmms_eval()
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(
        MmkdError, match=r"pip install .*mmkd\[eval\].* --no-deps lmms-eval==0\.7\.3"
    ):
        require_lmms_eval()


def test_command_line_of_lmms_eval(scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "mmkd"),
        *("--model_args", f"pretrained={tiny_model_dir},device=cpu", "--tasks", "scenes_pope"),
        *("--include_path", str(scenes_dir / "tasks"), "--batch_size", "16"),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ), timeout=300
    )
    # it exits with 0 on failure too, so only the file counts
    written = list((tmp_path / "out").rglob("*_results.json"))
    assert len(written) == 1, done.stdout + done.stderr
    found = json.loads(written[0].read_text())
    scores = {k.split(",")[0] for k in found["results"]["scenes_pope"] if "stderr" not in k}
    assert scores - {"alias"} == POPE_NAMES
    own = evaluate(
        tiny_model_dir,
        tasks=["scenes_pope"],
        include_path=scenes_dir / "tasks",
        out=None,
        batch_size=16,
    )
    for name, value in own.scores["scenes_pope"].items():
        assert found["results"]["scenes_pope"][f"{name},none"] == pytest.approx(value), name
    assert found["efficiency"]["overall"]["total_output_tokens"] > 0
