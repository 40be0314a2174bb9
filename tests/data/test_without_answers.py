"""Records without an answer: for objectives that need none, and for sampled answers."""

import json
from pathlib import Path

import pytest

from mmkd.commands.check_data import check_data
from mmkd.commands.plan import make_plan
from mmkd.data.check import Look
from mmkd.data.records import Records
from mmkd.errors import DataError
from mmkd.recipe import DataConfig, load_recipe, to_yaml
from mmkd.runs import pipeline
from tests.support.recipes import tiny_recipe

VISION = {"kind": "kl", "region": "vision"}


@pytest.fixture
def questions(scenes_dir, tmp_path):
    """Images with a question each, and no answer."""
    found = Records(DataConfig(train=str(scenes_dir / "train.parquet")))
    lines = []
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(found[number].images[0]["bytes"])
        said = [{"from": "human", "value": "<image>\nIs there a cat?"}]
        lines.append({"id": str(number), "image": f"{number}.png", "conversations": said})
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(lines))
    return path


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, questions, tmp_path):
    def make(*objectives, **stage):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            data={"train": str(questions), "images": str(tmp_path)},
            teacher={"model": str(tiny_model_dir)},
            stage={"objectives": list(objectives), "steps": 2, "batch": {"size": 2}, **stage},
        )
        raw["student"]["convert"] = [{"kind": "depth_pruning", "decoder": [0]}]
        return load_recipe(raw)

    return make


def metrics(folder: Path):
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_image_tokens_need_no_answer(recipe):
    made = recipe(VISION)
    assert make_plan(made)["members"]["student"]["stages"][0]["supervised_tokens_per_step"] == 0
    for line in metrics(pipeline.run(made)):
        assert line["kl"] > 0


def test_the_students_own_answers_need_none(recipe):
    own = {"on_policy": {"lmbda": 1.0, "max_new_tokens": 4}}
    for line in metrics(pipeline.run(recipe({"kind": "jeffreys"}, **own))):
        assert line["sampled"] == 2
        assert line["supervised_tokens"] >= 2
        assert line["jeffreys"] > 0


@pytest.mark.parametrize(
    ("objective", "stage"),
    [
        ({"kind": "ce"}, {}),
        ({"kind": "kl"}, {}),
        ({"kind": "kl"}, {"on_policy": {"lmbda": 0.5}}),
        ({"kind": "affinity"}, {}),
        ({"kind": "embedding"}, {}),
    ],
)
def test_where_answers_are_needed_it_is_refused(recipe, objective, stage, tmp_path):
    with pytest.raises(DataError, match="no response of the assistant"):
        pipeline.run(recipe(VISION, {**objective, "name": "other"}, **stage))
    assert not (tmp_path / "tiny").exists()


def test_the_check_of_the_data_knows_what_is_needed(recipe, tmp_path):
    counts = []
    for objectives in ([VISION], [VISION, {"kind": "ce"}]):
        path = tmp_path / "recipe.yaml"
        path.write_text(to_yaml(recipe(*objectives)))
        found = check_data(str(path), None, Look(), 1)
        counts.append(sum(p["records"] for s in found["sources"] for p in s["problems"]))
    assert counts == [0, 6]


def test_a_record_without_a_question_is_bad(questions):
    records = Records(DataConfig(train=str(questions), images=str(questions.parent)))
    assert not records[0].has_answer
    for said in ([], [{"from": "gpt", "value": "yes"}]):
        questions.write_text(json.dumps([{"id": "a", "conversations": said}]))
        with pytest.raises(DataError):
            Records(DataConfig(train=str(questions)))[0]
