"""Documents that cannot be asked about, tasks that fail, and evaluations that were killed."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from mmkd.errors import DataError, EvaluationError, MmkdError, StoppedError
from mmkd.evaluation import models, run_tasks
from mmkd.evaluation.adapter import MmkdModel
from mmkd.evaluation.models import evaluate_models
from mmkd.evaluation.pictures import UnreadablePicture
from mmkd.evaluation.refusals import HOPELESS, Refusals, Unanswered, describe, is_of_document
from mmkd.evaluation.run import evaluate
from mmkd.recipe import EvaluateConfig, StudentConfig
from mmkd.runtime.files import read_json, write_json
from tests.evaluation.test_adapter import adapter_of, picture, requests, tiny_qwen, tiny_smolvlm
from tests.runs.test_pipeline import finish, start
from tests.support.recipes import tiny_recipe

GOOD = {"question": "Is there a cat?", "images": [picture("red")]}
BROKEN = [
    {"question": "Is <image> a cat?", "images": [picture("red")]},
    {"question": "Is there a dog?", "images": [UnreadablePicture("it is broken")]},
]


def test_refused_documents_are_named_and_the_rest_of_the_batch_is_answered(
    tiny_model_dir: Path,
) -> None:
    docs = [GOOD, BROKEN[0], {**GOOD, "question": "And a dog?"}, BROKEN[1]]
    whole = adapter_of(tiny_model_dir, docs, batch_size=4)
    found = whole.generate_until(requests(docs))
    alone = adapter_of(tiny_model_dir, [docs[0], docs[2]])
    expected = alone.generate_until(requests([docs[0], docs[2]]))
    assert [found[0].text, found[2].text] == [r.text for r in expected]
    assert all(r.text for r in expected)
    assert [found[1].text, found[3].text] == ["", ""]
    assert isinstance(found[1].text, Unanswered)
    assert set(whole.refusals.reasons["task"]) == {1, 3}
    assert whole.refusals.reasons["task"][3] == "it is broken"
    assert whole.generated_tokens == alone.generated_tokens


@pytest.mark.parametrize("build", [tiny_qwen, tiny_smolvlm])
def test_other_families_name_what_they_refuse(build: Any) -> None:
    """A placeholder in the question, and an image too thin for the processor."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = build()
    spelled = {"question": f"no {processor.image_token} cat?", "images": [picture("red")]}
    thin = {"question": "cat?", "images": [Image.new("RGB", (3000, 1))]}
    docs = [{**GOOD, "question": "cat?"}, spelled, thin, BROKEN[1]]
    adapter = MmkdModel(model=model, processor=processor, batch_size=4)
    adapter.task_dict = {"task": {"test": docs}}
    found = adapter.generate_until(requests(docs, max_new_tokens=4))
    assert found[0].text
    reasons = adapter.refusals.reasons["task"]
    assert {1, 3} <= set(reasons)
    assert [bool(r.text) for r in found] == [i not in reasons for i in range(4)]


def test_a_model_that_refuses_one_document_answers_the_others(tiny_model_dir: Path) -> None:
    """What only the model notices, such as placeholders that do not fit the features."""
    docs = [GOOD, {**GOOD, "question": "Read the number."}, {**GOOD, "question": "What?"}]
    adapter = adapter_of(tiny_model_dir, docs, batch_size=3)
    generate = adapter.model.generate
    read = adapter.tokenizer("Read", add_special_tokens=False)["input_ids"][0]

    def picky(**inputs: Any) -> Any:
        if (inputs["input_ids"] == read).any():
            raise ValueError("Image features and image tokens do not match")
        return generate(**inputs)

    adapter.model.generate = picky
    found = adapter.generate_until(requests(docs))
    assert [bool(r.text) for r in found] == [True, False, True]
    assert "do not match" in adapter.refusals.reasons["task"][1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no"),
        RuntimeError("CUDA error: device-side assert triggered"),
        ImportError("no module"),
        MmkdError("not the document's"),
        OSError(28, "No space left on device"),
    ],
)
def test_what_the_machine_says_stops(
    error: Exception, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_of_document(error)
    adapter = adapter_of(tiny_model_dir, [GOOD, GOOD], batch_size=2)

    def fail(**inputs: Any) -> None:
        raise error

    monkeypatch.setattr(adapter.model, "generate", fail)
    with pytest.raises(type(error)) as caught:
        adapter.generate_until(requests([GOOD, GOOD]))
    assert caught.value is error


def test_a_broken_set_up_is_no_row_of_refusals() -> None:
    refusals = Refusals()
    for document in range(HOPELESS - 1):
        refusals.add("task", document, ValueError("never fits"))
    with pytest.raises(DataError, match=r"task document 0: none of 32 documents .*never fits"):
        refusals.add("task", HOPELESS, ValueError("never fits"))
    refusals = Refusals()
    refusals.answered("task")
    for document in range(2 * HOPELESS):
        refusals.add("task", document, ValueError("does not fit"))
    found = refusals.of("task")
    assert found == {"documents": 64, "first": 0, "reason": "ValueError: does not fit"}
    assert describe("task", found) == (
        "task: 64 documents could not be asked about and count as wrong; the first is document 0 "
        "(ValueError: does not fit)"
    )


def spoil(tasks: Path, file: str, rows: dict[int, dict[str, Any]]) -> None:
    """Replace columns of some rows of a task's file."""
    path = tasks.parent / "eval" / f"{file}.parquet"
    table = pq.read_table(path)
    values = table.to_pylist()
    for number, changed in rows.items():
        values[number] |= changed
    pq.write_table(pa.Table.from_pylist(values, schema=table.schema), path)


@pytest.fixture
def own_scenes(scenes_dir: Path, tmp_path: Path, datasets_cache: None) -> Path:
    """A copy of the scenes' tasks and documents."""
    for name in ("tasks", "eval"):
        shutil.copytree(scenes_dir / name, tmp_path / "scenes" / name)
    return tmp_path / "scenes" / "tasks"


def png(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "PNG")
    return out.getvalue()


def test_spoilt_documents_count_as_wrong_in_every_score(
    own_scenes: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    garbage = {"image": {"bytes": b"this is no image", "path": None}}
    spoil(own_scenes, "pope", {1: {"question": "Is there <image> a cat?"}, 2: garbage})
    spoil(own_scenes, "pope", {3: {"image": {"bytes": png((3000, 3000)), "path": None}}})
    spoil(own_scenes, "caption", {0: garbage})
    out = tmp_path / "out"
    evaluate(
        tiny_model_dir,
        tasks=["scenes_pope", "scenes_caption"],
        include_path=own_scenes,
        out=out,
        batch_size=4,
        limit=6,
    )
    written = json.loads((out / "results.json").read_text())
    assert written["unanswered"]["scenes_pope"]["documents"] == 2
    assert written["unanswered"]["scenes_pope"]["first"] == 1
    assert written["unanswered"]["scenes_caption"]["documents"] == 1
    assert written["failed"] == {}
    lines = (out / "samples" / "scenes_pope.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [("unanswered" in s) for s in samples] == [False, True, True, False, False, False]
    assert "cannot be read" in samples[2]["unanswered"]
    assert not any(s["correct"] for s in samples[1:3])
    assert written["scores"]["scenes_pope"]["pope_accuracy"] == pytest.approx(
        sum(s["correct"] for s in samples) / 6
    )
    captions = [
        json.loads(line)
        for line in (out / "samples" / "scenes_caption.jsonl").read_text().splitlines()
    ]
    assert captions[0]["unanswered"]
    wrong = sum(bool(c["hallucinated"]) for c in captions) + 1
    assert written["scores"]["scenes_caption"]["caption_chair_s"] == pytest.approx(wrong / 6)
    said = capsys.readouterr().out
    assert "scenes_pope: 2 documents could not be asked about and count as wrong" in said


def test_a_task_without_a_usable_document_fails_by_itself(
    own_scenes: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows = pq.read_table(own_scenes.parent / "eval" / "pope.parquet").num_rows
    kept = (own_scenes.parent / "eval" / "pope.parquet").read_bytes()
    spoil(own_scenes, "pope", {i: {"question": "Is <image>?"} for i in range(rows)})

    def scores(out: Path, *tasks: str) -> Any:
        return evaluate(
            tiny_model_dir, tasks=list(tasks), include_path=own_scenes, out=out, limit=4
        )

    with pytest.raises(DataError, match=r"scenes_pope document 0: none of 4 documents can be"):
        scores(tmp_path / "alone", "scenes_pope")
    assert not (tmp_path / "alone" / "results.json").exists()
    out = tmp_path / "out"
    with pytest.raises(EvaluationError, match=r"scenes_pope: 1 of 2 tasks failed.*none of 4"):
        scores(out, "scenes_pope", "scenes_vqa")
    written = json.loads((out / "results.json").read_text())
    assert list(written["scores"]) == ["scenes_vqa"]
    assert "none of 4 documents" in written["failed"]["scenes_pope"]
    (own_scenes.parent / "eval" / "pope.parquet").write_bytes(kept)
    assert list(scores(out, "scenes_pope", "scenes_vqa").scores) == ["scenes_pope", "scenes_vqa"]
    assert json.loads((out / "results.json").read_text())["failed"] == {}
    assert not (out / "unfinished").exists()


def test_a_killed_evaluation_asks_only_for_what_is_missing(
    own_scenes: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["scenes_pope", "scenes_vqa"]
    settings: dict[str, Any] = {"tasks": tasks, "include_path": own_scenes, "limit": 2}
    whole = evaluate(tiny_model_dir, out=tmp_path / "whole", **settings)
    asked: list[str] = []
    inner = run_tasks.simple_evaluate
    kill_at = "scenes_vqa"

    def watched(adapter: Any, names: list[str], *more: Any) -> Any:
        if names == [kill_at]:
            raise StoppedError("stopped")
        asked.extend(names)
        return inner(adapter, names, *more)

    monkeypatch.setattr(run_tasks, "simple_evaluate", watched)
    out = tmp_path / "killed"
    with pytest.raises(StoppedError):
        evaluate(tiny_model_dir, out=out, **settings)
    assert not (out / "results.json").exists()
    kill_at = ""
    again = evaluate(tiny_model_dir, out=out, **settings)
    assert asked == tasks  # each once
    assert again.scores == whole.scores
    for task in tasks:
        first, second = (tmp_path / n / "samples" / f"{task}.jsonl" for n in ("whole", "killed"))
        assert first.read_bytes() == second.read_bytes()

    # Another batch size, and documents that have changed, are asked again.
    for batch_size in (1, 2):
        kill_at = tasks[1]
        with pytest.raises(StoppedError):
            evaluate(tiny_model_dir, out=out, batch_size=2, **settings)
        if batch_size == 2:
            spoil(own_scenes, "pope", {0: {"question": "Is there a dog?"}})
        kill_at, asked[:] = "", []
        evaluate(tiny_model_dir, out=out, batch_size=batch_size, **settings)
        assert asked == tasks


@pytest.mark.parametrize("changed", ["quantize", "template"])
def test_kept_tasks_are_those_of_one_model(
    changed: str,
    own_scenes: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Quantized weights and another chat template give other answers."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    tasks = ["scenes_pope", "scenes_vqa"]
    settings: dict[str, Any] = {"tasks": tasks, "include_path": own_scenes, "limit": 1}
    asked: list[str] = []
    inner = run_tasks.simple_evaluate

    def watched(adapter: Any, names: list[str], *more: Any) -> Any:
        asked.extend(names)
        if len(asked) == 2:
            raise StoppedError("stopped")
        return inner(adapter, names, *more)

    monkeypatch.setattr(run_tasks, "simple_evaluate", watched)
    with pytest.raises(StoppedError):
        evaluate(model, out=tmp_path / "out", **settings)
    if changed == "quantize":
        monkeypatch.setattr("mmkd.modeling.loading.check_quantization", lambda *a: None)
        monkeypatch.setattr("mmkd.modeling.loading._quantized", lambda *a: {})
        settings["quantize"] = "4bit"
    else:
        template = model / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
    evaluate(model, out=tmp_path / "out", **settings)
    assert asked == [*tasks, *tasks]


def test_every_part_that_fails_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(reason: str) -> Any:
        def fail(*arguments: Any) -> None:
            raise DataError(reason)

        return fail

    monkeypatch.setattr(models, "_score", failing("no scores"))
    monkeypatch.setattr(models, "_time_decoding", failing("no times"))
    settings = EvaluateConfig(tasks=["a"], decode=[1])
    with pytest.raises(EvaluationError, match="no scores"):
        evaluate_models({"kd": StudentConfig(model="x/y")}, settings, tmp_path, "cpu")
    out = capsys.readouterr().out
    assert "kd: its evaluation failed (no scores)" in out
    assert "kd: its evaluation failed (no times)" in out


def test_results_of_another_request_are_not_taken_for_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe asks for all documents, one task fails, and the recipe asks for three again."""
    limits: list[int | None] = []

    def score(model: Any, *, limit: int | None, out: Path, **more: Any) -> None:
        limits.append(limit)
        write_json(out / "results.json", {"scores": {}, "limit": limit})
        if limit is None:
            raise EvaluationError("1 of 2 tasks failed")

    monkeypatch.setattr("mmkd.evaluation.run.evaluate", score)

    def run_with(limit: int | None) -> None:
        settings = EvaluateConfig(tasks=["a", "b"], limit=limit)
        evaluate_models({"kd": StudentConfig(model="x/y")}, settings, tmp_path, "cpu")

    run_with(3)
    run_with(3)
    assert limits == [3]
    with pytest.raises(EvaluationError):
        run_with(None)
    run_with(3)
    assert limits == [3, None, 3]
    assert read_json(tmp_path / "kd" / "results.json")["limit"] == 3


def test_a_run_keeps_its_students_scores_and_report_when_a_task_fails(
    own_scenes: Path, scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    file = own_scenes.parent / "eval" / "pope.parquet"
    kept, rows = file.read_bytes(), pq.read_table(file).num_rows
    spoil(own_scenes, "pope", {i: {"question": "Is <image>?"} for i in range(rows)})
    spoil(own_scenes, "vqa", {1: {"question": "What is <image>?"}})
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        teacher={"model": str(tiny_model_dir)},
        stage={"steps": 1, "batch": {"size": 2}},
        evaluate={"tasks": ["scenes_pope", "scenes_vqa"], "include": str(own_scenes), "limit": 3},
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    code, output = finish(start(path))
    assert code == 2, output
    assert (
        output.strip()
        .splitlines()[-1]
        .startswith("mmkd: teacher: scenes_pope: the evaluation of 2 of 2 models failed")
    )
    folder = tmp_path / "tiny"
    for label in ("teacher", "student"):
        found = json.loads((folder / "evaluation" / label / "results.json").read_text())
        assert list(found["scores"]) == ["scenes_vqa"]
    page = (folder / "report.html").read_text()
    assert "student: task scenes_pope has no scores" in page
    assert (
        "teacher: 1 document of task scenes_vqa could not be asked about and counts as wrong"
        in page
    )
    assert (folder / "01-mimic" / "student" / "model.safetensors").exists()

    file.write_bytes(kept)
    code, output = finish(start(path))
    assert code == 0, output
    assert output.count("scenes_vqa: already answered") == 2
    found = json.loads((folder / "evaluation" / "student" / "results.json").read_text())
    assert list(found["scores"]) == ["scenes_pope", "scenes_vqa"]
    assert "has no scores" not in (folder / "report.html").read_text()
