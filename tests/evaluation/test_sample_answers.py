"""`evaluate.samples`: answers about held-out images, without lmms-eval, on the report's page."""

import json
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmkd.data.images import load_image
from mmkd.errors import DataError, EvaluationError, RecipeError
from mmkd.evaluation import samples
from mmkd.evaluation.models import _asked
from mmkd.evaluation.samples import answer_samples, find_questions
from mmkd.modeling import conversation
from mmkd.recipe import EvaluateConfig, SamplesConfig, load_recipe, to_yaml
from mmkd.report import write_report
from mmkd.runs import pipeline
from mmkd.runtime.files import read_json, write_json
from tests.support.recipes import tiny_recipe

MODEL = {"model": "x", "revision": None, "processor": None, "weights": None}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "trip/c.png", "trip/d.webp")):
        Image.new("RGB", (300 + 9 * i, 400), (60 * i, 90, 200)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def ask(config: SamplesConfig, model: Path, out: Path, batch_size: int = 4) -> list[Any]:
    answer_samples(
        str(model), config, out, model=MODEL, batch_size=batch_size, device=torch.device("cpu")
    )
    return read_json(out)["answers"]


def greedy(folder: Path, question: str, picture: Image.Image, tokens: int) -> str:
    """What transformers alone says, one question at a time."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = f"<|user|><image>{question}<|assistant|>"
    inputs = processor(text=text, images=[picture], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=[1, 2])
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_pictures_of_a_folder_are_asked_every_prompt(
    photos: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    prompts = ["Is there a cat?", "What do you see?"]
    config = SamplesConfig(images=str(photos), prompts=prompts, count=3, max_new_tokens=6)
    found = ask(config, tiny_model_dir, tmp_path / "out.json")
    names = [photos / name for name in ("a.png", "b.jpg", "trip/c.png")]
    assert [(a["id"], a["question"]) for a in found] == [
        (str(n), p) for n in names for p in prompts
    ]
    for answer in found:
        picture = load_image(Path(answer["id"]).name, Path(answer["id"]).parent)
        assert answer["answer"] == greedy(tiny_model_dir, answer["question"], picture, 6)
        assert answer["picture"].startswith("data:image/jpeg;base64,")
        assert answer["truth"] == ""
    assert ask(config, tiny_model_dir, tmp_path / "other.json", batch_size=1) == found


def test_a_folder_may_hold_links_to_pictures_elsewhere(
    photos: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "one.png").symlink_to(photos / "a.png")
    config = SamplesConfig(images=str(tmp_path / "links"), max_new_tokens=2)
    (answer,) = ask(config, tiny_model_dir, tmp_path / "out.json")
    assert answer["id"] == str(tmp_path / "links" / "one.png")
    assert answer["picture"].startswith("data:image/jpeg;base64,")


def test_records_are_asked_their_first_question(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = SamplesConfig(records=str(scenes_dir / "validation.parquet"), count=3)
    questions = find_questions(config)
    assert len({q.record.id for q in questions}) == 3
    assert all(q.truth and q.text and q.record.images for q in questions)
    assert all(q.record.messages[-1]["role"] == "user" for q in questions)
    found = ask(
        config.model_copy(update={"max_new_tokens": 3}), tiny_model_dir, tmp_path / "o.json"
    )
    assert [a["truth"] for a in found] == [q.truth for q in questions]


def test_a_killed_call_asks_only_for_the_rest(
    photos: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SamplesConfig(images=str(photos), max_new_tokens=3)
    whole = ask(config, tiny_model_dir, tmp_path / "whole.json", batch_size=2)
    asked: list[str] = []
    inner = samples._Asking.answers

    def watched(self: Any, questions: list[Any]) -> Any:
        if len(asked) == 2 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        asked.extend(q.record.id for q in questions)
        return inner(self, questions)

    monkeypatch.setattr(samples._Asking, "answers", watched)
    out = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        ask(config, tiny_model_dir, out, batch_size=2)
    assert len(read_json(out)["answers"]) == 2
    (tmp_path / "again").touch()
    assert ask(config, tiny_model_dir, out, batch_size=2) == whole
    assert len(asked) == len(set(asked)) == 4
    ask(config, tiny_model_dir, out, batch_size=2)
    assert len(asked) == 4  # finished
    Image.new("RGB", (90, 90), "green").save(photos / "b.jpg")
    ask(config, tiny_model_dir, out, batch_size=2)
    assert len(asked) == 8  # other images


def test_a_question_that_a_processor_refuses_is_named(
    photos: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = SamplesConfig(
        images=str(photos), prompts=["What?", "Is <image> a cat?"], count=2, max_new_tokens=3
    )
    found = ask(config, tiny_model_dir, tmp_path / "out.json")
    assert ["unanswered" in a for a in found] == [False, True] * 2
    refused = config.model_copy(update={"prompts": ["Is <image> a cat?"]})
    for _ in range(2):  # the failure is not taken for a finished evaluation
        with pytest.raises(DataError, match="none of 2 questions can be asked"):
            ask(refused, tiny_model_dir, tmp_path / "o.json")


def test_a_revision_is_one_of_the_model_and_not_of_another_processor(
    photos: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SamplesConfig(images=str(photos), count=1, max_new_tokens=1)
    asked: list[tuple[str, Any]] = []
    load = conversation.load_pretrained_processor

    def watched(name: str, **settings: Any) -> Any:
        asked.append((name, settings["revision"]))
        return load(name, **settings)

    monkeypatch.setattr(conversation, "load_pretrained_processor", watched)
    for number, own in enumerate((None, str(tiny_model_dir))):
        answer_samples(
            str(tiny_model_dir),
            config,
            tmp_path / f"{number}.json",
            model={**MODEL, "processor": own},
            batch_size=1,
            device=torch.device("cpu"),
            revision="v2",
        )
    assert asked == [(str(tiny_model_dir), "v2"), (str(tiny_model_dir), None)]


def test_records_in_a_folder_that_have_changed_are_asked_again(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "records"
    config = SamplesConfig(records=str(folder), max_new_tokens=1)
    for truth in ("yes", "no"):
        turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": truth}]
        write_json(folder / "part.json", [{"id": "r", "conversations": turns}])
        (answer,) = ask(config, tiny_model_dir, tmp_path / "out.json")
        assert answer["truth"] == truth


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "nothing to show"),
        (
            {"records": "a.json", "images": ["b.png"]},
            "'images' must be one folder",
        ),
        ({"records": "a.json", "prompts": ["What?"]}, "'prompts' are asked about 'images'"),
        ({"images": "photos", "prompts": []}, "prompts"),
    ],
)
def test_samples_that_make_no_sense(
    raw: dict[str, Any], message: str, scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, evaluate={"samples": raw})
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe)
    with pytest.raises(RecipeError, match="nothing to evaluate -- name 'tasks'"):
        load_recipe(recipe | {"evaluate": {"teacher": False}})


@pytest.mark.parametrize("gone", ["folder", "picture", "records", "empty", "broken"])
def test_missing_pictures_are_refused_before_training(
    gone: str, photos: Path, scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "none").mkdir()
    (photos / "torn.png").write_bytes(b"no image")
    raw, message = {
        "folder": ({"images": str(tmp_path / "absent")}, "absent: no such folder of images"),
        "picture": ({"images": [str(photos / "absent.png")]}, "absent.png: no such image"),
        "records": (
            {"records": str(tmp_path / "absent.json")},
            r"absent\.json: no such data file -- check evaluate\.samples\.records",
        ),
        "empty": ({"images": str(tmp_path / "none")}, "none: no images in it"),
        "broken": ({"images": [str(photos / "torn.png")]}, "torn.png: .*not a readable image"),
    }[gone]
    recipe = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path / "run", evaluate={"samples": raw})
    with pytest.raises(DataError, match=message):
        pipeline.run(load_recipe(recipe))
    assert not (tmp_path / "run").exists()


def test_a_run_without_lmms_eval_shows_what_its_models_say(
    photos: Path,
    scenes_dir: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: Any,
) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "lmms_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    evil = "<script>alert(1)</script>"
    asked = {"images": str(photos), "prompts": [evil], "count": 2, "max_new_tokens": 4}
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path / "runs",
        teacher={"model": str(tiny_model_dir)},
        stage={"steps": 1, "batch": {"size": 2}},
        variants={"other": ["stages.0.optimizer.lr=0.5"]},
        evaluate={"samples": asked},
    )
    folder = pipeline.run(load_recipe(raw))
    html = write_report(folder).read_text(encoding="utf-8")
    assert "<script" not in html
    assert evil in unescape(html)
    assert html.count("data:image/jpeg;base64,") == 2
    assert "Sample answers" in html
    assert "The recipe names no lmms-eval tasks." in html
    for label in ("teacher", "student", "other"):
        held = read_json(folder / "evaluation" / label / "answers.json")
        assert len(held["answers"]) == held["expected"] == 2
        for answer in held["answers"]:
            assert answer["answer"] in unescape(html)
    written = (folder / "evaluation" / "student" / "answers.json").stat().st_mtime_ns
    pipeline.run(load_recipe(raw))
    assert (folder / "evaluation" / "student" / "answers.json").stat().st_mtime_ns == written
    assert not list(folder.rglob("results.json"))

    # Images that go away later: the students stay, and the page of what there is.
    for path in sorted(photos.rglob("*.*")):
        path.unlink()
    with pytest.raises(EvaluationError, match=r"3 of 3 models failed.*no images in it"):
        pipeline.run(load_recipe(raw))
    assert html == write_report(folder).read_text(encoding="utf-8")


def test_records_of_the_training_data_are_called_so(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path, terminal: Any
) -> None:
    other_way = str(scenes_dir / ".." / scenes_dir.name / "tr*n.parquet")
    named = [str(scenes_dir / "train.parquet"), other_way, str(scenes_dir / "validation.parquet")]
    for number, records in enumerate(named):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path / str(number),
            stage={"steps": 1, "batch": {"size": 2}},
            evaluate={"samples": {"records": records, "count": 2, "max_new_tokens": 3}},
        )
        html = write_report(pipeline.run(load_recipe(raw))).read_text(encoding="utf-8")
        assert ("were trained on these records" in html) is (number < 2)
        assert "truth" in html


def test_evaluations_from_before_are_the_same_request(tmp_path: Path) -> None:
    """A finished evaluation is not asked again because a recipe can say more now."""
    old = {"tasks": ["pope"], "limit": 3}
    settings = EvaluateConfig(tasks=["pope"], limit=3, samples=SamplesConfig(images=["a.png"]))
    write_json(tmp_path / "request.json", {**MODEL, **old})
    asked = {
        **MODEL,
        "quantize": None,
        **settings.model_dump(mode="json", exclude={"decode", "samples"}),
    }
    assert _asked(tmp_path / "request.json") == asked


def test_a_recipe_with_samples_survives_writing(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    evaluate = {"samples": {"records": str(scenes_dir / "validation.parquet")}}
    recipe = load_recipe(tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, evaluate=evaluate))
    assert load_recipe(yaml.safe_load(to_yaml(recipe))) == recipe
    assert json.loads(recipe.model_dump_json())["evaluate"]["tasks"] == []
