"""Runs as a user starts them: resume after a kill, several processes, variants, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml

from mmkd.errors import RecipeError
from mmkd.modeling.loading import load_model
from mmkd.recipe import ModelConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.runtime.files import read_json
from tests.support import warm
from tests.support.recipes import tiny_recipe
from tests.support.slow import slow
from tests.support.tiny import write_tiny_model

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "true"}


def metrics_of(folder):
    """Every logged figure but the seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def write(path, raw):
    path.write_text(yaml.safe_dump(raw))
    return path


def start(recipe, *launcher, processes=1):
    if not launcher:
        return warm.Command("run", recipe, "--nproc", processes)
    return subprocess.Popen(
        [*launcher, "run", str(recipe)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture
def dropout_model_dir(scenes_dir, tmp_path):
    """The tiny model with dropout on, so that a resumed run needs the random states too."""
    folder = tmp_path / "dropout-model"
    write_tiny_model(scenes_dir / "processor", folder, dropout=0.2)
    return folder


def test_a_killed_run_continues_with_the_same_figures(
    scenes_dir, tiny_model_dir, dropout_model_dir, tmp_path
):
    stages = [
        {
            "name": name,
            "objectives": [{"kind": "ce"}, {"kind": "jsd"}],
            "steps": 40,
            "batch": {"size": 2, "accumulate": 2},
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"interval": 7},
            "precision": "bfloat16",
        }
        for name in ("first", "second")
    ]
    common = {"stages": stages, "teacher": {"model": str(tiny_model_dir)}}
    runs = {}
    for name in ("whole", "killed"):
        raw = tiny_recipe(scenes_dir, dropout_model_dir, tmp_path, name=name, **common)
        runs[name] = write(tmp_path / f"{name}.yaml", raw)
    assert finish(start(runs["whole"]))[0] == 0
    for folder in ("01-first", "02-second"):
        process = start(runs["killed"])
        path = tmp_path / "killed" / folder / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not path.exists() or len(path.read_text().splitlines()) < 17:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    code, output = finish(start(runs["killed"]))
    assert code == 0, output
    for folder in ("01-first", "02-second"):
        want = metrics_of(tmp_path / "whole" / folder)
        assert len(want) == 40
        assert metrics_of(tmp_path / "killed" / folder) == want
    whole, killed = (
        (tmp_path / name / "02-second" / "student" / "model.safetensors").read_bytes()
        for name in runs
    )
    assert whole == killed


@pytest.mark.parametrize(
    ("objectives", "data"),
    [
        slow([{"kind": "ce"}, {"kind": "kl"}], "train"),  # as in the tests of engines
        # its baseline is a mean over both processes, which share the work of the reference
        ([{"kind": "preference", "loss": "kto_pair", "reference_logps": "once"}], "preferences"),
    ],
)
def test_two_processes_train_like_one(objectives, data, scenes_dir, tiny_model_dir, tmp_path):
    for name, size in (("one", 4), ("two", 2)):
        stage = {"objectives": objectives, "batch": {"size": size}}
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            stage=stage,
            data={"train": str(scenes_dir / f"{data}.parquet")},
            teacher={"model": str(tiny_model_dir)},
        )
        write(tmp_path / f"{name}.yaml", raw)
    assert finish(start(tmp_path / "one.yaml"))[0] == 0
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc_per_node", "2", "-m", "mmkd.cli")  # fmt: skip
    code, output = finish(start(tmp_path / "two.yaml", *torchrun))
    assert code == 0, output
    one, two = (metrics_of(tmp_path / n / "01-mimic") for n in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["supervised_tokens"] == b["supervised_tokens"]
        for key in ("loss", "grad_norm", *(o["kind"] for o in objectives)):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6)


def test_one_of_two_processes_scores(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        stage={"steps": 1, "batch": {"size": 2}},
        evaluate={
            "tasks": ["scenes_vqa"],
            "include": str(scenes_dir / "tasks"),
            "limit": 2,
        },
    )
    path = write(tmp_path / "two.yaml", raw)
    code, output = finish(start(path, processes=2))
    assert code == 0, output
    assert (tmp_path / "tiny" / "report.html").exists()
    assert read_json(tmp_path / "tiny" / "evaluation" / "student" / "results.json")["scores"]


def test_finished_stages_are_kept_and_another_recipe_is_refused(
    scenes_dir, tiny_model_dir, tmp_path
):
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path)
    folder = pipeline.run(load_recipe(raw))
    student = folder / "01-mimic" / "student" / "model.safetensors"
    written = student.stat().st_mtime_ns
    pipeline.run(load_recipe(raw))
    pipeline.run(load_recipe(raw, ["release={repo: me/student}"]))  # says nothing of training
    assert student.stat().st_mtime_ns == written
    path = folder / "training.yaml"
    older = yaml.safe_load(path.read_text())
    older["stages"][0]["train"] = ["all"]
    del older["data"]["image_cache"], older["stages"][0]["batch"]
    path.write_text(yaml.safe_dump(older))  # as written before these keys were there
    pipeline.run(load_recipe(raw))
    before = sorted(p.name for p in folder.rglob("*"))
    with pytest.raises(RecipeError, match=r"which differs in stages\.0\.optimizer\.lr"):
        pipeline.run(load_recipe(raw, ["stages.0.optimizer.lr=0.5"]))
    assert sorted(p.name for p in folder.rglob("*")) == before


def test_variants_and_seeds_start_alike_and_are_trained_apart(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        label="kd",
        teacher={"model": str(tiny_model_dir)},
        stage={"objectives": [{"kind": "ce"}, {"kind": "tvd"}], "steps": 2},
        variants={"ce": ["stages.0.objectives=[{kind: ce}]"]},
        seeds=[1, 2],
    )
    recipe = load_recipe(raw)
    labels = [m.label for m in pipeline.members(recipe)]
    assert labels == ["kd-seed1", "ce-seed1", "kd-seed2", "ce-seed2"]
    folder = pipeline.run(recipe)
    first = {label: metrics_of(folder / label / "01-mimic")[0] for label in labels}
    assert first["kd-seed1"]["ce"] == first["ce-seed1"]["ce"]
    assert first["kd-seed1"]["ce"] != first["kd-seed2"]["ce"]
    assert "tvd" not in first["ce-seed1"]


def test_variants_share_the_stages_in_which_they_are_alike(scenes_dir, tiny_model_dir, tmp_path):
    """A stage that two recipes begin with is trained once, and comes out as if trained twice."""
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name="shared")
    first = raw["stages"][0]
    cut = {"kind": "width_pruning", "decoder": 32}
    raw["student"]["convert"] = [cut]
    raw["stages"] = [{**first, "name": "one"}, {**first, "name": "two"}]
    raw["variants"] = {
        "other": ["stages.1.optimizer.lr=1e-2"],
        "apart": ["stages.0.optimizer.lr=1e-2"],
        "moe": ["stages.1.convert=[{kind: moe}]"],
    }
    folder = pipeline.run(load_recipe(raw))

    def inode(member, stage):
        return (folder / member / stage / "student" / "model.safetensors").stat().st_ino

    for member in ("other", "moe"):
        assert inode(member, "01-one") == inode("student", "01-one")
        assert inode(member, "02-two") != inode("student", "02-two")
        assert (folder / member / "00-start" / "done.json").exists()
    assert inode("apart", "01-one") != inode("student", "01-one")
    alone = {**raw, "name": "alone", "variants": {}, "label": "other"}
    apart = pipeline.run(load_recipe(alone, raw["variants"]["other"]))
    for stage in ("01-one", "02-two"):
        a, b = (f / stage / "student" / "model.safetensors" for f in (folder / "other", apart))
        assert a.read_bytes() == b.read_bytes()
    again = pipeline.run(load_recipe(raw))  # all is there, nothing changes
    assert again == folder


def test_a_converted_student_keeps_the_chosen_layers(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        student={
            "model": str(tiny_model_dir),
            "convert": [{"kind": "depth_pruning", "decoder": [1], "vision": [0]}],
        },
    )
    folder = pipeline.run(load_recipe(raw))
    config = read_json(folder / "01-mimic" / "student" / "config.json")
    assert config["text_config"]["num_hidden_layers"] == 1
    assert config["vision_config"]["num_hidden_layers"] == 1
    done = read_json(folder / "00-start" / "done.json")
    assert done["after"] < done["before"]


def test_a_start_that_was_killed_before_its_end_is_made_again(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, stage={"steps": 1})
    raw["student"]["convert"] = [{"kind": "mamba", "layers": [1], "init": "default"}]
    folder = pipeline.run(load_recipe({**raw, "name": "whole"}))
    want = (folder / "01-mimic" / "student" / "model.safetensors").read_bytes()
    started = tmp_path / "killed" / "00-start" / "student"
    started.mkdir(parents=True)
    (started / "config.json").write_text("{}")
    folder = pipeline.run(load_recipe({**raw, "name": "killed"}))
    assert (folder / "01-mimic" / "student" / "model.safetensors").read_bytes() == want


def test_the_command_line_reports_errors_in_one_line(tmp_path):
    path = write(tmp_path / "bad.yaml", {"nmae": "x"})
    done = warm.run("run", path)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "bad.yaml" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_whole_run_from_recipe_to_report(scenes_dir, tiny_model_dir, tmp_path):
    """What `make quickstart` does, on tiny models, with a stage before: two students that share
    it, scores of every stage, one page."""
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        label="kd",
        teacher={"model": str(tiny_model_dir)},
        student={
            "model": str(tiny_model_dir),
            "convert": [{"kind": "depth_pruning", "decoder": [0], "vision": [1]}],
        },
        stage={"objectives": [{"kind": "ce"}, {"kind": "kl"}], "steps": 3},
        variants={"ce": ["stages.1.objectives=[{kind: ce}]"]},
        evaluate={
            "every_stage": True,
            "tasks": ["scenes_pope", "scenes_vqa", "scenes_caption"],
            "include": str(scenes_dir / "tasks"),
            "batch_size": 8,
            "limit": 6,
        },
    )
    raw["stages"] = [{**raw["stages"][0], "name": "align"}, *raw["stages"]]
    code, output = finish(start(write(tmp_path / "recipe.yaml", raw)))
    assert code == 0, output
    folder = tmp_path / "tiny"
    for label in ("teacher", "kd", "ce"):
        results = read_json(folder / "evaluation" / label / "results.json")
        assert set(results["scores"]) == {"scenes_pope", "scenes_vqa", "scenes_caption"}
        assert label in output
    assert "ce@align: scores of the same weights as kd@align" in output
    shared = read_json(folder / "evaluation" / "ce@align" / "results.json")
    assert shared["model"].endswith("ce/01-align/student")
    assert shared["scores"] == read_json(folder / "evaluation/kd@align/results.json")["scores"]
    page = (folder / "report.html").read_text()
    for text in ("kd", "ce", "teacher", "kd after align", "POPE", "CHAIR", "data:image/png"):
        assert text in page
    record = read_json(folder / "provenance.json")
    assert record["versions"]["torch"]
    assert record["data"][str(scenes_dir / "train.parquet")]
    assert record["models"] == {str(tiny_model_dir): "folder"}
    written = (folder / "evaluation" / "kd" / "results.json").stat().st_mtime_ns
    assert finish(start(tmp_path / "recipe.yaml"))[0] == 0
    assert (folder / "evaluation" / "kd" / "results.json").stat().st_mtime_ns == written


def test_a_run_killed_behind_a_stage_leaves_no_checkpoints(scenes_dir, tiny_model_dir, tmp_path):
    folder = pipeline.run(load_recipe(tiny_recipe(scenes_dir, tiny_model_dir, tmp_path)))
    left = folder / "01-mimic" / "checkpoints" / "step-4"
    left.mkdir(parents=True)
    pipeline.run(load_recipe(tiny_recipe(scenes_dir, tiny_model_dir, tmp_path)))
    assert not left.parent.exists()


def test_a_large_student_is_written_in_parts(scenes_dir, tiny_model_dir, tmp_path, monkeypatch):
    from mmkd.students import write as writing

    whole = pipeline.run(load_recipe(tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name="one")))
    monkeypatch.setattr(writing, "SHARD_SIZE", "100KB")
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name="parts", evaluate=None)
    folder = pipeline.run(load_recipe(raw)) / "01-mimic" / "student"
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert (folder / "model.safetensors.index.json").exists()
    students = [
        load_model(ModelConfig(model=str(f))) for f in (folder, whole / "01-mimic" / "student")
    ]
    pairs = zip(*(m.state_dict().items() for m in students), strict=True)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
