"""What a release holds and says: the card, the recipe and where they come from, without paths."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from mmkd.cli import main
from mmkd.errors import CheckpointError, RecipeError
from mmkd.recipe import ReleaseConfig, load_recipe
from mmkd.release import release
from mmkd.release.card import make_card
from mmkd.release.papers import papers
from mmkd.release.scrub import scrub
from mmkd.release.source import choose
from tests.support.written_runs import ACCURACY, put, results, scores

SETTINGS = ReleaseConfig(
    repo="me/student", license="mit", datasets=["me/pictures"], language=["en"], tags=["small"]
)
TEACHER, START = "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"
TOKEN = "hf_" + "c" * 34


def change(path, edit):
    """Edit a JSON or YAML file in place."""
    held = yaml.safe_load(path.read_text())
    edit(held)
    put(path, json.dumps(held))


@pytest.fixture
def hub_run(run_dir):
    """The study with teacher and start from the Hub."""
    for path in [run_dir / "recipe.yaml", *run_dir.glob("*/training.yaml")]:

        def edit(recipe):
            recipe["teacher"]["model"], recipe["student"]["model"] = TEACHER, START

        change(path, edit)
    models = {TEACHER: "Hub", START: "Hub"}
    change(run_dir / "provenance.json", lambda found: found.update(models=models))
    return run_dir


def card_of(run, label=None, seed=None, settings=SETTINGS):
    return make_card(choose(run, label, seed), settings)


def lines_with(card, text):
    return [line for line in card.text.splitlines() if text in line]


def test_metadata(hub_run, tmp_path):
    """The card is written and read again, as the Hub would."""
    card_of(hub_run, seed=1).save(tmp_path / "README.md")
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.base_model == [START, TEACHER]
    assert data.base_model_relation == "finetune"  # of two, not their merge
    assert data.license == "mit"
    assert data.datasets == ["me/pictures"]
    assert data.language == ["en"]
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "image-text-to-text"
    assert data.tags == ["mmkd", "distillation", "small"]
    assert data.model_name == "student"
    got = {(r.dataset_type, r.metric_type): r.metric_value for r in data.eval_results}
    want = scores(ACCURACY["kd"][1])
    assert got == {
        (task, metric): pytest.approx(want[task][metric])
        for task, metric in [
            *(("scenes_pope", f"pope_{k}_accuracy") for k in ("random", "popular", "adversarial")),
            ("scenes_pope", "pope_yes_rate"),
            ("scenes_vqa", "vqa_accuracy"),
            ("scenes_caption", "caption_chair_i"),
            ("scenes_caption", "caption_bleu"),
        ]
    }
    assert all(r.task_type == "image-text-to-text" for r in data.eval_results)


def test_teacher_and_student_stand_side_by_side_with_the_spread_over_seeds(hub_run):
    card = card_of(hub_run, seed=1)
    head, *_ = lines_with(card, "this student")
    assert head == "| task | score | teacher | this student | 3 seeds | majority answer |"
    (vqa,) = lines_with(card, "VQA all kinds")
    assert vqa == "| `scenes_vqa` | VQA all kinds % | 90.0 | 74.0 | 72.0 ± 2.0 | 40.0 |"
    (chair,) = lines_with(card, "CHAIR-i")
    shown = "Caption CHAIR-i % (lower is better)"
    assert chair == f"| `scenes_caption` | {shown} | 10.0 | 26.0 | 28.0 ± 2.0 | – |"
    assert "trained 3 times" in card.text
    assert "One seed" not in card.text


def test_what_could_not_be_scored_is_said(hub_run):
    assert "could not be asked" not in card_of(hub_run).text
    found = {
        "failed": {"pope": "DataError: no rows in /home/me/pope.parquet"},
        "unanswered": {"scenes_vqa": {"documents": 2, "first": 5, "reason": "/home/me/a.png"}},
    }
    change(
        hub_run / "evaluation" / "kd-seed0" / "results.json", lambda results: results.update(found)
    )
    text = card_of(hub_run).text
    assert "- Task `pope` failed and has no scores." in text
    assert "could not be asked about 2 of the documents of `scenes_vqa`; they count as" in text
    assert "/home/me" not in text


def test_how_it_was_made(hub_run):
    card = card_of(hub_run)
    (row,) = lines_with(card, "| mimic |")
    assert row == "| mimic | 0.5 × ce + kl (T = 2) | all | train.parquet | 40 | 8 | 2e-05 |"
    assert f"[{TEACHER}](https://huggingface.co/{TEACHER})" in card.text
    assert "trust_remote_code" not in card.text
    assert "no code of its own" in card.text


def test_adapters_token_batches_and_a_student_that_teaches_itself(hub_run, tmp_path):
    def edit(recipe):
        recipe["teacher"] = {"source": "self"}
        (stage,) = recipe["stages"]
        stage["train"] = {"groups": ["connector"], "lora": {"rank": 4, "dora": True, "keep": True}}
        stage["batch"] = {"tokens": 4096, "total": 24}

    change(hub_run / "kd-seed0" / "training.yaml", edit)
    put(hub_run / "kd-seed0" / "01-mimic" / "student" / "adapter" / "adapter_config.json", "{}")
    release(hub_run, repo="me/student", out=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    (row,) = lines_with(card, "| mimic |")
    assert "| connector, DoRA of rank 4 in language_model | train.parquet | 40 | 24 |" in row
    assert "| teacher | the student itself, as it was before each stage |" in card.text
    assert "[LoRA](https://arxiv.org/abs/2106.09685), [DoRA]" in card.text
    assert card.data.base_model == [START]
    assert not (tmp_path / "out" / "adapter").exists()


def test_several_teachers(hub_run):
    other, third = "Qwen/Qwen2.5-VL-72B-Instruct", "artifacts/ocr"

    def edit(recipe):
        recipe["teacher"]["name"] = "chat"
        recipe["more_teachers"] = [{"model": other, "name": "large"}, {"model": third, "name": "b"}]

    change(hub_run / "kd-seed0" / "training.yaml", edit)
    change(hub_run / "provenance.json", lambda found: found["models"].update({other: "Hub"}))
    card = card_of(hub_run)
    assert card.data.base_model == [START, TEACHER, other]
    (row,) = lines_with(card, "| teachers |")
    chat, large = (f"[{name}](https://huggingface.co/{name})" for name in (TEACHER, other))
    assert row == f"| teachers | chat: {chat}; large: {large}; b: a local model |"
    assert "distilled from 3 teachers" in card.text
    change(
        hub_run / "kd-seed0" / "training.yaml",
        lambda recipe: recipe["student"].update(model=other),
    )
    assert lines_with(card_of(hub_run), "| starts from | the teacher large itself |")


def test_data_sets_of_the_hub_are_told(hub_run):
    def edit(recipe):
        sources = [{"train": "hub:me/chat", "subset": "a"}, {"train": "hub:you/ocr", "name": "ocr"}]
        recipe["data"] = {"sources": sources}
        recipe["stages"][0]["data"] = {"sources": [*sources, {"train": "/data/own.json"}]}

    change(hub_run / "kd-seed0" / "training.yaml", edit)
    card = card_of(hub_run)
    assert card.data.datasets == ["me/chat", "you/ocr", "me/pictures"]
    assert "| me/chat, ocr, own.json |" in lines_with(card, "| mimic |")[0]
    assert (
        len(lines_with(card, "| data | [me/chat](https://huggingface.co/datasets/me/chat), ")) == 1
    )


def test_a_license_without_a_name_on_the_hub(hub_run, tmp_path):
    link = "https://example.org/LICENSE"
    words = ["license=other", "license_name=qwen-research", f"license_link={link}"]
    release(hub_run, repo="me/student", overrides=words, out=tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.license_name) == ("other", "qwen-research")
    assert card.data.license_link == link
    assert lines_with(card, f"| license | [qwen-research]({link}) |")
    assert f"Weights: qwen-research ({link})." in (tmp_path / "out" / "LICENSE").read_text()


def test_a_student_without_a_teacher_has_none(hub_run):
    card = card_of(hub_run, "ce")
    assert card.data.base_model == [START]
    assert "distillation" not in card.data.tags
    assert "without a teacher" in card.text
    assert TEACHER not in card.text


def test_local_models_and_paths_are_not_told(run_dir, tmp_path):
    models = {"artifacts/teacher": "folder", "artifacts/start": "folder"}
    change(run_dir / "provenance.json", lambda found: found.update(models=models))
    card = card_of(run_dir)
    assert "base_model" not in card.data.to_dict()
    assert len(lines_with(card, "a local model")) == 2
    assert "artifacts" not in str(card)
    assert str(tmp_path) not in str(card)


def test_what_was_not_recorded_is_no_hub_model(run_dir):
    assert "base_model" not in card_of(run_dir).data.to_dict()


def test_a_run_without_scores(hub_run):
    shutil.rmtree(hub_run / "evaluation")
    card = card_of(hub_run)
    assert not card.data.to_dict().keys() & {"model-index", "model_name"}
    assert "no scores of this student" in card.text


def test_limits_are_told(hub_run):
    path = hub_run / "evaluation" / "kd-seed0" / "results.json"
    local = {"data": {"scenes_vqa": ["/home/alice/vqa.parquet"]}}
    put(path, json.dumps(results(0.7, 1_000_000, limit=50) | local))
    for other in ("kd-seed1", "kd-seed2"):
        shutil.rmtree(hub_run / "evaluation" / other)
    teacher = hub_run / "evaluation" / "teacher" / "results.json"
    change(teacher, lambda found: found["scores"].update(mme={"mme_score": 1500.0}))
    card = card_of(hub_run)  # the teacher alone was scored on another task
    assert "the first 50 questions of each task only" in card.text
    assert "One seed" in card.text
    assert lines_with(card, "- Scored on local files instead of the Hub's data: `scenes_vqa`.")
    assert "alice" not in str(card)
    assert all(r.dataset_args == {"limit": 50} for r in card.data.eval_results)


def test_a_name_cannot_break_the_tables(hub_run):
    def edit(recipe):
        recipe["data"]["train"] = "/data/a|b<script>.json"

    change(hub_run / "kd-seed0" / "training.yaml", edit)
    (row,) = lines_with(card_of(hub_run), "| mimic |")
    assert "| a\\|b&lt;script>.json |" in row


def test_without_a_repository_the_card_bears_the_run_s_name(hub_run):
    card = card_of(hub_run, settings=ReleaseConfig())
    assert card.data.model_name == "study"
    assert card.text.startswith("\n# study\n")
    assert "license" not in card.data.to_dict()
    assert "not stated" in card.text


def test_papers_of_the_methods(hub_run):
    recipe = load_recipe(
        yaml.safe_load((hub_run / "kd-seed0" / "training.yaml").read_text()),
        [
            "student.convert=[{kind: mamba, layers: [0]}, {kind: moe}]",
            "stages.0.objectives=[{kind: jsd}, {kind: preference, loss: kto_pair}, {kind: ce}, "
            "{kind: alm}, {kind: uld}, {kind: kl}, {kind: kl, name: v, region: vision}]",
            "stages.0.on_policy={lmbda: 0.5}",
        ],
    )
    names = [paper.name for paper in papers(recipe)]
    assert names == ["Mamba-2", "mmMamba", "Komatsuzaki et al.", "GKD", "LLaVA-MoD", "KTO",
                     "ALM", "ULD", "knowledge distillation", "LLaVA-KD"]  # fmt: skip


SCRUBBED = [
    ("/home/alice/my data/train.json", "train.json"),
    ("~/models/qwen", "qwen"),
    ("~alice/models/qwen", "qwen"),
    ("../alice/x.yaml", "x.yaml"),
    (r"C:\Users\alice\x.yaml", "x.yaml"),
    ("data.train=/home/alice/my data/train.json", "data.train=train.json"),
    ("data={train: /home/alice/a.json, images: '~/b'}", "data={train: a.json, images: 'b'}"),
    ("stages.0.data={train: ../alice/a.json}", "stages.0.data={train: a.json}"),
    ("data/llava_665k.json", "data/llava_665k.json"),
    ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
    ("https://example.org/a/b", "https://example.org/a/b"),
    ("x=https://alice:secret@example.org/a", "x=https://example.org/a"),
    ("file:///home/alice/my data/x.json", "x.json"),
    ("data={train: 'file:/home/alice/x.json'}", "data={train: 'x.json'}"),
    (
        "data={train: '/home/alice/my data/x.json', images: \"~/my data\"}",
        "data={train: 'x.json', images: \"my data\"}",
    ),
    (r"\\server\alice\x.json", "x.json"),
    ("answers and/or 1 / 2 ...", "answers and/or 1 / 2 ..."),
    (f"token={TOKEN}", "token=hf_..."),
    (f"token={TOKEN.replace('hf', 'api_org')}", "token=api_org_..."),
]


@pytest.mark.parametrize(("told", "kept"), SCRUBBED)
def test_paths_and_tokens(told, kept):
    assert scrub([{"key": told, told: 1}]) == [{"key": kept, kept: 1}]


def test_two_paths_with_one_name_are_both_kept():
    assert scrub({"/a/x.json": 1, "/b/x.json": 2}) == {"x.json": 1, "x.json (2)": 2}


def test_a_folder_tells_nothing_of_the_machine(hub_run, tmp_path):
    def edit(found):
        found["command"] = ["mmkd", "run", str(tmp_path / "study.yaml"), f"x={TOKEN}"]
        found["data"] = {str(tmp_path / "train.parquet"): "c6b0c417"}

    change(hub_run / "provenance.json", edit)
    change(
        hub_run / "kd-seed0" / "training.yaml",
        lambda recipe: recipe["data"].update(train=str(tmp_path / "train.parquet")),
    )
    out = tmp_path / "released"
    release(hub_run, repo="me/student", overrides=["license=mit"], out=out)
    names = {path.name for path in out.iterdir()}
    assert names == {"README.md", "LICENSE", "recipe.yaml", "provenance.json", "config.json",
                     "model.safetensors"}  # fmt: skip
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert TOKEN.encode() not in path.read_bytes(), path
    assert json.loads((out / "provenance.json").read_text())["data"] == {
        "train.parquet": "c6b0c417"
    }
    recipe = load_recipe(out / "recipe.yaml")
    assert recipe.data.train == "train.parquet"
    assert (recipe.seed, recipe.label) == (0, "kd")
    assert recipe.evaluate.tasks == list(scores(1.0))
    assert "Weights: mit" in (out / "LICENSE").read_text()


def test_settings_of_the_recipe_and_of_the_command(hub_run, tmp_path):
    change(
        hub_run / "recipe.yaml",
        lambda recipe: recipe.update(release={"repo": "me/one", "license": "mit"}),
    )
    release(hub_run, out=tmp_path / "one")
    assert ModelCard.load(tmp_path / "one" / "README.md").data.model_name == "one"
    overrides = ["license=apache-2.0", "datasets=[me/a, me/b]"]
    release(hub_run, repo="you/two", overrides=overrides, out=tmp_path / "two")
    data = ModelCard.load(tmp_path / "two" / "README.md").data
    assert data.model_name == "two"
    assert data.license == "apache-2.0"
    assert data.datasets == ["me/a", "me/b"]


def spoil_student(run):
    shutil.rmtree(run / "kd-seed0" / "01-mimic" / "student")


WRONG = [
    ({"label": "kdd"}, None, RecipeError, "no student 'kdd' -- it has kd, ce"),
    ({"seed": 7}, None, RecipeError, "no kd with seed 7 -- its seeds: 0, 1, 2"),
    ({}, lambda run: (run / "kd-seed0" / "01-mimic" / "done.json").unlink(), CheckpointError,
     "kd-seed0 is not finished: stage mimic -- run its recipe again"),
    ({}, spoil_student, CheckpointError, "the student of stage 01-mimic is gone"),
    ({}, lambda run: (run / "recipe.yaml").unlink(), CheckpointError, "not a run"),
    ({"repo": "student"}, None, RecipeError, "release: repo: got 'student' -- .* its owner"),
    ({"repo": "me/.."}, None, RecipeError, r"release: repo: got 'me/\.\.' -- .*start or end with"),
    ({"repo": "me/a--b"}, None, RecipeError, "got 'me/a--b' -- Cannot have '--' or"),
    ({"overrides": ["license_name=mine"]}, None, RecipeError,
     "'license_name' is of 'license: other' -- set that"),
    ({"overrides": ["licence=mit"]}, None, RecipeError, "unknown key -- did you mean 'license'"),
    ({"out": Path("/")}, None, CheckpointError, "it is there already -- name a new folder"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "spoil", "error", "message"), WRONG)
def test_what_cannot_be_released_is_one_line(run_dir, tmp_path, settings, spoil, error, message):
    if spoil:
        spoil(run_dir)
    with pytest.raises(error, match=message) as caught:
        release(run_dir, **{"out": tmp_path / "out", **settings})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_repository(run_dir):
    with pytest.raises(RecipeError, match=r"no repository is named -- give --repo"):
        release(run_dir)


def test_a_dry_run_shows_all_and_writes_nothing(hub_run, monkeypatch, capsys):
    before = sorted(hub_run.rglob("*"))
    words = ["mmkd", "release", str(hub_run), "--repo", "me/student", "--private", "--dry-run"]
    monkeypatch.setattr(sys, "argv", [*words, "--student", "ce", "--seed", "2"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for text in (
        "ce-seed2: file",
        "model.safetensors",
        "1.2 kB",
        "base_model:",
        "pipeline_tag: image-text-to-text",
        "would go to https://huggingface.co/me/student, private; nothing was written or sent",
    ):
        assert text in said
    assert sorted(hub_run.rglob("*")) == before
