"""lmms-eval's own tasks on local files of the Hub's schema, against scores counted by hand."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from mmkd.cli import models  # noqa: F401 -- registers `eval`
from mmkd.cli.app import app
from mmkd.errors import DataError, MmkdError
from mmkd.evaluation.run import check, evaluate
from mmkd.recipe import load_recipe
from mmkd.report.metrics import HEADLINE
from mmkd.report.rundata import read_run
from mmkd.report.samples import choose_samples
from mmkd.report.tables import build_tables, print_scores, print_tables
from mmkd.runs import pipeline
from mmkd.runtime.files import read_json, write_json
from tests.support import benchmarks_in_small as small
from tests.support.benchmarks_in_small import annotators, pictures, put, scored, texts
from tests.support.recipes import tiny_recipe

pytestmark = pytest.mark.usefixtures("datasets_cache")


def test_pope(tmp_path: Path) -> None:
    truth = ["yes", "yes", "yes", "yes", "no", "no", "no"]
    said = ["Yes", "yes", "no", "Yes, there is.", "no", "yes", "No"]
    rows = [small.pope(i, answer) for i, answer in enumerate(truth)]
    put(rows, tmp_path / "POPE" / "test.parquet")
    scores, model = scored("pope", tmp_path, said)
    # 2 true positives, 1 false positive, 1 said no; "Yes, there is." is neither yes nor no
    assert scores == pytest.approx(
        {
            "pope_accuracy": 4 / 7,
            "pope_precision": 2 / 3,
            "pope_recall": 2 / 3,
            "pope_f1_score": 2 / 3,
            "pope_yes_ratio": 4 / 7,  # of the data, as lmms-eval counts it
        }
    )
    asked = "Is there a cat in the image 3?\nAnswer the question using a single word or phrase."
    assert texts(model.asked[3]) == asked
    assert [p.size for p in pictures(model.asked[3])] == [(64, 64)]


def test_mme(tmp_path: Path) -> None:
    rows, said = [], []
    pairs = [
        # one of two images fully right: accuracy 75, accuracy+ 50
        ("existence", "a.png", ("Yes", "No"), ("yes", "no.")),
        ("existence", "b.png", ("Yes", "No"), ("Yes", "yes")),
        # one wrong and one that is no answer: 0 and 0
        ("count", "c.png", ("Yes", "No"), ("No", "maybe")),
        # right by the first letters: 100 and 100
        ("OCR", "d.png", ("Yes", "No"), ("Yes, it is", "Nope")),
        # half: 50 and 0
        ("code_reasoning", "e.png", ("Yes", "No"), ("yes", "yes")),
        ("text_translation", "f.png", ("Yes", "No"), ("y", "n")),
    ]
    for category, picture, truths, answers in pairs:
        rows += [small.mme(picture, category, truth) for truth in truths]
        said += answers
    put(rows, tmp_path / "MME" / "test.parquet")
    scores, _ = scored("mme", tmp_path, said)
    assert scores == pytest.approx(
        {
            "mme_perception_score": (75 + 50) + (0 + 0) + (100 + 100),
            "mme_cognition_score": (50 + 0) + (100 + 100),
        }
    )
    parted = [rows[0], rows[2], *rows[4:]]
    put(parted, tmp_path / "MME" / "test.parquet")
    with pytest.raises(MmkdError, match=r"mme: lmms-eval refuses.*pairwise.* -- .*a limit must"):
        scored("mme", tmp_path, said)
    with pytest.raises(MmkdError, match=r"task mme scores .* in pairs, and limit 3 splits"):
        check(["mme", "pope"], None, None, 3)


@pytest.mark.parametrize(
    ("task", "config"), [("scienceqa", "ScienceQA-FULL"), ("scienceqa_img", "ScienceQA-IMG")]
)
def test_scienceqa(tmp_path: Path, task: str, config: str) -> None:
    rows = [
        small.scienceqa(["robin", "cod"], 0, hint="Birds have feathers."),
        small.scienceqa(["carp", "cod", "owl"], 2),
        small.scienceqa(["carp", "owl"], 1),
        small.scienceqa(["carp", "owl"], 1),
        small.scienceqa(["owl", "carp"], 0),
    ]
    if task == "scienceqa":
        rows[1]["image"] = None
    put(rows, tmp_path / "ScienceQA" / config / "test.parquet")
    # right; right with its text; wrong; words alone do not count; lower case with a point neither
    scores, model = scored(task, tmp_path, ["a", "C. owl", "A", "owl", "a. owl"])
    assert scores == {"exact_match": 2 / 5}
    post = "\nAnswer with the option's letter from the given choices directly."
    asked = "Which of these is a bird?\nA. carp\nB. cod\nC. owl" + post
    assert texts(model.asked[1]) == asked
    assert texts(model.asked[0]).startswith("Context: Birds have feathers.\nWhich")
    assert len(pictures(model.asked[1])) == (0 if task == "scienceqa" else 1)


def test_mmbench_without_a_judge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [small.mmbench(i, answer) for i, answer in enumerate("ABCA")]
    put(rows, tmp_path / "MMBench" / "en" / "dev.parquet")
    # letter; text of an option; wrong; nothing that can be read as an option, which is wrong
    scores, model = scored("mmbench", tmp_path, ["A", "It is a mountain.", "A", "I do not know"])
    assert scores == {"gpt_eval_score": 50.0}
    options = "There are several options:\nA. a lake\nB. a mountain\nC. a street"
    assert options in texts(model.asked[0])
    assert "D." not in texts(model.asked[0])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "submissions").exists()


def test_mmbench_counts_a_question_that_is_right_in_all_its_rotations(tmp_path: Path) -> None:
    # Rotations of a question's options have its index and a multiple of a million more.
    indices, truths = [1, 2, 1_000_001, 1_000_002, 2_000_001], "ABCAB"
    rows = [small.mmbench(i, answer) for i, answer in zip(indices, truths, strict=True)]
    put(rows, tmp_path / "MMBench" / "en" / "dev.parquet")
    scores, _ = scored("mmbench", tmp_path, list(truths))
    assert scores == {"gpt_eval_score": 100.0}
    scores, _ = scored("mmbench", tmp_path, [*"ABCA", "C"])  # the first one's second rotation
    assert scores == {"gpt_eval_score": 50.0}
    scores, _ = scored("mmbench", tmp_path, [*"AB"], limit=2)  # rotations come last in the data
    assert scores == {"gpt_eval_score": 100.0}


def test_gqa(tmp_path: Path) -> None:
    folder = tmp_path / "lmms-lab-encoder" / "GQA"
    rows = [
        {"id": "1", "imageId": "n1", "question": "What colour?", "answer": "red"},
        {"id": "2", "imageId": "n2", "question": "What colour?", "answer": "blue"},
        {"id": "3", "imageId": "n1", "question": "Is it red?", "answer": "yes"},
    ]
    put(rows, folder / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet")
    images = [{"id": "n2", "image": small.picture("blue")}]
    images += [{"id": "n1", "image": small.picture("red")}]
    put(images, folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet")
    scores, model = scored("gqa", tmp_path, ["Red.", "green", "yes"])
    assert scores == {"exact_match": 2 / 3}
    colours = [pictures(model.asked[i])[0].getpixel((0, 0)) for i in range(3)]
    assert colours == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    put(images[:1], folder / "testdev_balanced_images" / "testdev-00000-of-00001.parquet")
    with pytest.raises(DataError, match="no image with id n1"):
        scored("gqa", tmp_path, ["Red.", "green", "yes"])


# Ten people; an answer's score is the mean over leaving one out of min(1, equal answers / 3).
PEOPLE = [annotators("stop"), annotators("go", "go", "stop")]
SAID = ["Stop", "go"]
BY_HAND = (1 + (2 * 1 / 3 + 8 * 2 / 3) / 10) / 2


def test_textvqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(
        [small.textvqa(i, a) for i, a in enumerate(PEOPLE)], tmp_path / "textvqa/validation.parquet"
    )
    scores, model = scored("textvqa", tmp_path, SAID)
    assert scores == {"exact_match": pytest.approx(BY_HAND)}
    assert texts(model.asked[0]).startswith("What does the sign say?\nAnswer")
    assert not (tmp_path / "submissions").exists()  # nothing for a server


def test_vizwiz(tmp_path: Path) -> None:
    put(
        [small.vizwiz(str(i), a) for i, a in enumerate(PEOPLE)], tmp_path / "VizWiz-VQA/val.parquet"
    )
    scores, model = scored("vizwiz", tmp_path, SAID)
    assert scores == {"exact_match": pytest.approx(BY_HAND)}
    assert "respond with 'Unanswerable'" in texts(model.asked[0])


def test_vqav2(tmp_path: Path) -> None:
    people = [[text.lower() for text in answers] for answers in PEOPLE]
    put([small.vqav2(i, a) for i, a in enumerate(people)], tmp_path / "VQAv2/validation.parquet")
    scores, _ = scored("vqav2", tmp_path, ["stop", "go"])
    assert scores == {"exact_match": pytest.approx(BY_HAND)}


def test_seed(tmp_path: Path) -> None:
    rows = [
        small.seed("1", "image", "A"),
        small.seed("2", "image", "B"),
        small.seed("3", "video", "C"),
    ]
    put(rows, tmp_path / "SEED-Bench" / "test.parquet")
    scores, model = scored("seed", tmp_path, ["A. One", "C", "c"])
    assert scores == pytest.approx({"seed_image": 1 / 2, "seed_video": 1.0, "seed_all": 2 / 3})
    assert len(pictures(model.asked[2])) == 2


def test_ai2d(tmp_path: Path) -> None:
    put([small.ai2d(answer) for answer in "0123"], tmp_path / "ai2d" / "test.parquet")
    scores, model = scored("ai2d", tmp_path, ["A", "b", "C. c", "the letter d"])
    assert scores == {"exact_match_flexible-extract": 3 / 4}
    assert "A. a\nB. b\nC. c\nD. d\nAnswer" in texts(model.asked[0])


def test_chartqa(tmp_path: Path) -> None:
    rows = [
        small.chartqa("human_test", "100"),
        small.chartqa("human_test", "100"),
        small.chartqa("augmented_test", "Peru"),
    ]
    put(rows, tmp_path / "ChartQA" / "test.parquet")
    # within 5 %, outside, words alike but for case
    scores, _ = scored("chartqa", tmp_path, ["104.9", "105.1", "peru"])
    assert scores == pytest.approx(
        {"relaxed_human_split": 1 / 2, "relaxed_augmented_split": 1.0, "relaxed_overall": 2 / 3}
    )


def test_mmmu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        small.mmmu(1, "multiple-choice", "['a lake', 'a hill', 'a road']", "B"),
        small.mmmu(2, "multiple-choice", "['a lake', 'a hill', 'a road']", "C"),
        small.mmmu(3, "open", "[]", "12"),
    ]
    put(rows, tmp_path / "MMMU" / "validation.parquet")
    scores, model = scored("mmmu", tmp_path, ["(B)", "A", "The answer is 12."])
    assert scores == {"mmmu_acc": pytest.approx(2 / 3, abs=1e-5)}  # lmms-eval rounds to 5 places
    kinds = [part["type"] for part in model.asked[0][0]["content"]]
    assert kinds == ["text", "image", "text", "image", "text"]  # where the question names them
    assert capsys.readouterr().out == ""
    # no letter to be read: one is drawn, the same whenever the same answers are scored
    put([small.mmmu(i, "multiple-choice", "['a', 'b']", "B") for i in range(20)],
        tmp_path / "MMMU" / "validation.parquet")  # fmt: skip
    drawn = [scored("mmmu", tmp_path, ["I see."] * 20)[0]["mmmu_acc"] for _ in range(2)]
    assert 0 < drawn[0] == drawn[1] < 1


def test_a_model_answers_local_tasks(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The same files through a model that generates, and what lands in the folder."""
    local = tmp_path / "local"
    file = put([small.pope(i, "no") for i in range(3)], local / "POPE" / "test.parquet")
    put([small.mme("a", "OCR", a) for a in ("Yes", "No")], local / "MME" / "test.parquet")
    put([small.scienceqa(["owl", "cod"], 0)] * 2, local / "ScienceQA/ScienceQA-IMG/test.parquet")
    out = tmp_path / "out"
    tasks = ["pope", "mme", "scienceqa_img"]
    result = evaluate(tiny_model_dir, tasks=tasks, include_path=None, local=local, out=out)
    written = json.loads((out / "results.json").read_text())
    assert list(written["scores"]) == tasks
    assert written["data"]["pope"] == [str(file)]
    for task in tasks:
        assert {c.key[1] for c in HEADLINE[task]} - {"mme_cognition_score"} <= set(
            result.scores[task]
        )
        lines = (out / "samples" / f"{task}.jsonl").read_text().splitlines()
        assert len(lines) == len(result.samples[task]) == {"pope": 3}.get(task, 2)
    right = [s["prediction"].lower().strip() == "no" for s in result.samples["pope"]]
    assert result.scores["pope"]["pope_accuracy"] == sum(right) / 3


def test_the_command(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put([small.pope(i, "no") for i in range(3)], tmp_path / "local" / "POPE" / "test.parquet")
    put([small.chartqa("human_test", "3")], tmp_path / "local" / "ChartQA" / "test.parquet")
    monkeypatch.chdir(tiny_model_dir)
    out = tmp_path / "out"
    words = ["eval", ".", "--local", str(tmp_path / "local"), "--out", str(out), "--limit", "2"]
    done = CliRunner().invoke(app, [*words, "--tasks", "pope, chartqa,"])
    assert done.exit_code == 0, done.output
    written = read_json(out / "results.json")
    assert list(written["scores"]) == ["pope", "chartqa"]
    assert written["limit"] == 2
    assert written["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert tiny_model_dir.name in done.output  # the row of a folder that was named by a point


def test_teacher_and_student_side_by_side(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path, terminal: Any
) -> None:
    local = tmp_path / "local"
    put([small.pope(i, "no") for i in range(3)], local / "POPE" / "test.parquet")
    put([small.mme("a", "OCR", a) for a in ("Yes", "No")], local / "MME" / "test.parquet")
    put([small.mmbench(i, "A") for i in range(2)], local / "MMBench" / "en" / "dev.parquet")
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path / "runs",
        teacher={"model": str(tiny_model_dir)},
        stage={"steps": 1, "batch": {"size": 2}},
        evaluate={"tasks": ["pope", "mme", "mmbench"], "local": str(local)},
    )
    with pytest.raises(MmkdError, match="unknown task 'popee' -- did you mean pope"):
        pipeline.run(load_recipe(raw, ["evaluate.tasks=[popee]"]))
    with pytest.raises(DataError, match="no local data of task gqa"):
        pipeline.run(load_recipe(raw, ["evaluate.tasks=[gqa]"]))
    assert not (tmp_path / "runs").exists()
    folder = pipeline.run(load_recipe(raw))
    known = {label: read_json(folder / "evaluation" / label / "results.json")["scores"]
             for label in ("teacher", "student")}  # fmt: skip
    assert all(set(found) == {"pope", "mme", "mmbench_en_dev_static"} for found in known.values())
    run = read_run(folder)
    print_tables(build_tables(run))
    shown = terminal.export_text()
    for column in ("POPE", "F1 %", "perception", "EN dev %"):
        assert column in shown
    for label, found in known.items():
        (line,) = (row for row in shown.splitlines() if row.split()[:1] == [label])
        assert f"{100 * found['pope']['pope_accuracy']:.1f}" in line
        assert f"{found['mmbench_en_dev_static']['gpt_eval_score']:.1f}" in line
    assert [len(t.shown) for t in choose_samples(run)] == [3, 2, 2]
    assert all(s.picture for t in choose_samples(run) for s in t.shown)

    path = folder / "evaluation" / "student"
    older = read_json(path / "request.json")
    del older["every_stage"]  # as written before this key was there
    write_json(path / "request.json", older)
    before = (path / "results.json").stat().st_mtime_ns
    pipeline.run(load_recipe(raw))
    assert (path / "results.json").stat().st_mtime_ns == before


def in_hub_cache(name: str, revision: str, files: dict[str, Path], cache: Path) -> None:
    """A model's files as huggingface_hub keeps what it has downloaded."""
    folder = cache / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(revision.encode()).hexdigest()
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    for file, source in files.items():
        shutil.copy(source, folder / "snapshots" / commit / file)


def test_a_teacher_is_scored_in_its_revision_with_its_processor(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    cache, local = tmp_path / "hub", tmp_path / "local"
    config, weights = (tiny_model_dir / n for n in ("config.json", "model.safetensors"))
    in_hub_cache("org/teacher", "main", {"config.json": config}, cache)
    files = {"config.json": config, "model.safetensors": weights}
    in_hub_cache("org/teacher", "v2", files, cache)
    put([small.pope(i, "no") for i in range(2)], local / "POPE" / "test.parquet")
    teacher = {"model": "org/teacher", "revision": "v2", "processor": str(tiny_model_dir)}
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path / "runs",
        teacher=teacher,
        stage={"steps": 1, "batch": {"size": 2}, "objectives": [{"kind": "kl"}]},
        evaluate={"tasks": ["pope"], "local": str(local), "decode": [20]},
    )
    write_json(tmp_path / "recipe.yaml", raw)
    done = subprocess.run(
        [sys.executable, "-m", "mmkd.cli", "run", str(tmp_path / "recipe.yaml")],
        env={**os.environ, "HF_HUB_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny" / "evaluation" / "teacher"
    found = read_json(folder / "results.json")
    assert found["model"] == "org/teacher"
    assert found["weights_bytes"] == weights.stat().st_size
    asked = read_json(folder / "request.json")
    assert {key: asked[key] for key in teacher} == teacher
    assert read_json(folder / "decode.json")["rows"]


def test_units_of_the_standard_benchmarks(terminal: Any) -> None:
    def one(accuracy: float, perception: float, mmbench: float) -> dict[str, Any]:
        return {
            "mme": {"mme_perception_score": perception},
            "mmbench_en_dev_static": {"gpt_eval_score": mmbench},
            "gqa": {"exact_match": accuracy},
        }

    print_scores({"teacher": one(0.625, 1502.7, 67.25), "kd": one(0.5, 1432.4, 60.0)})
    rows = [line.split() for line in terminal.export_text().splitlines()]
    assert ["teacher", "1,503", "67.2", "62.5"] in rows
    assert ["kd", "1,432", "60.0", "50.0"] in rows
