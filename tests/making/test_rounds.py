"""Data that are made between stages: chains of entries, rounds of a stage, kills."""

import json
import os
import shutil
import signal
import time
from contextlib import chdir
from pathlib import Path

import pytest
import torch
import yaml

from mmkd.commands.bench import bench
from mmkd.commands.make_answers import make_entries
from mmkd.commands.plan import check_recipe, make_plan
from mmkd.commands.plan.made import made_lines
from mmkd.commands.score_data import score_data
from mmkd.data.records import Records
from mmkd.errors import MmkdError, RecipeError
from mmkd.making.make import make_answers, make_records
from mmkd.making.makers import build_makers
from mmkd.making.state import is_made
from mmkd.making.used import (
    check_later,
    made_before,
    made_for,
    used_entries,
    with_stage_data,
)
from mmkd.modeling.loading import load_processor
from mmkd.recipe import load_recipe, load_written, to_yaml
from mmkd.report import write_report
from mmkd.runs import pipeline
from tests.making.conftest import PROMPTS
from tests.support import warm

CPU = torch.device("cpu")
STAGE = {"objectives": [{"kind": "ce"}], "steps": 2, "batch": {"size": 2},
         "optimizer": {"lr": 1e-2}, "engine": {"device": "cpu"},
         "checkpoint": {"interval": 1}}  # fmt: skip
RUN = Path("runs/rounds")
MADE = [RUN / f"0{number + 1}-tune-{number}" / "made" for number in (1, 2)]


@pytest.fixture(scope="module")
def raw(photos, scenes_dir, tiny_model_dir):
    """A recipe in which the student answers, the teacher answers the same questions, and the stage
    `tune` trains on both after `align`. Its paths are relative to the working directory."""
    asked = {"sampling": {"temperature": 1.0, "max_new_tokens": 6}, "checks": ["empty"],
             "batch_size": 2}  # fmt: skip
    own = {**asked, "by": "student", "pictures": str(photos), "prompts": PROMPTS,
           "out": "own.jsonl"}  # fmt: skip
    both = {"sources": [{"train": "made:own"}, {"train": "made:again"}]}
    return {
        "name": "rounds",
        "teacher": {"model": str(tiny_model_dir)},
        "student": {"model": str(tiny_model_dir)},
        "make": {
            "again": {**asked, "records": "made:own", "seed": 7, "out": "again.jsonl"},
            "own": own,
        },
        "data": {"train": str(scenes_dir / "train.parquet")},
        "stages": [
            {**STAGE, "name": "align"},
            {**STAGE, "name": "tune", "rounds": 2, "data": both},
        ],
    }


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """A folder in which the recipe was run."""
    folder = tmp_path_factory.mktemp("whole")
    with chdir(folder):
        pipeline.run(load_recipe(raw))
    return folder


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """A copy of the folder as the working directory."""
    shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(path):
    return [row["messages"][-1]["content"][0]["text"] for row in lines(path)]


def questions(path):
    return [row["messages"][:-1] for row in lines(path)]


def within(part, whole):
    """Whether a list is another one, in its order, without some items."""
    return len(part) > 6 and [item for item in whole if item in part] == part


def student(stage):
    return (stage / "student" / "model.safetensors").read_bytes()


def test_an_entry_reads_the_records_of_another(raw, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = load_recipe(raw)
    assert [*read.make] == ["own", "again"]
    assert (read.make["again"].records, read.make["again"].images) == ("own.jsonl", str(photos))
    assert load_written(yaml.safe_load(to_yaml(read))) == read
    alone = load_recipe(raw, ["stages.1.data={train: 'made:again'}"])
    assert [*used_entries(alone, [alone.stages[1].data])] == ["own", "again"]
    first, second = make_entries(read, ["again"])
    assert (first.out.name, second.out.name) == ("own.jsonl", "again.jsonl")
    assert second.questions == first.records
    assert within(questions(second.out), questions(first.out))
    assert texts(first.out) != texts(second.out)
    assert is_made(read, "again")
    [only] = make_entries(read, ["again"])  # the first is made
    assert (only.out, only.asked.answers) == (second.out, 0)
    changed = load_recipe(raw, ["make.own.seed=1"])
    assert not is_made(changed, "again")
    make_entries(changed, ["own"])
    assert not is_made(changed, "again")  # its records are others now


def test_rationales_can_be_read_too(raw):
    own = {**raw["make"]["own"], "why": {"out": "why.jsonl"}}
    again = {**raw["make"]["again"], "records": "made:own-why"}
    read = load_recipe({**raw, "make": {"again": again, "own": own}})
    assert read.make["again"].records == "why.jsonl"
    assert [*made_for(read.with_rounds(), 1)] == ["own", "again"]


def test_each_round_asks_the_student_of_the_one_before(raw, here):
    assert not Path("own.jsonl").exists()
    assert texts(MADE[0] / "own.jsonl") != texts(MADE[1] / "own.jsonl")
    for before, made in zip(("01-align", "02-tune-1"), MADE, strict=True):
        own = load_recipe(raw, [f"student.model={RUN / before / 'student'}",
                                "make.own.out=separate.jsonl"])  # fmt: skip
        entry = own.make["own"]
        makers = build_makers(own, entry.models, 3, CPU)
        shutil.rmtree("separate.jsonl.answers", ignore_errors=True)
        Path("separate.jsonl").unlink(missing_ok=True)
        make_records(entry, makers, "separate", load_processor(own.student))
        assert Path("separate.jsonl").read_bytes() == (made / "own.jsonl").read_bytes()
        assert within(questions(made / "again.jsonl"), questions(made / "own.jsonl"))


def test_rounds_are_stages_in_a_row(raw, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    align, tune = raw["stages"]
    tune = {key: value for key, value in tune.items() if key != "rounds"}
    stages = [align, {**tune, "name": "tune-1"}, {**tune, "name": "tune-2"}]
    written = load_recipe({**raw, "stages": stages})
    assert load_recipe(raw).with_rounds() == written.with_rounds() == written
    pipeline.run(written)
    for folder in ("01-align", "02-tune-1", "03-tune-2"):
        assert student(RUN / folder) == student(whole / RUN / folder)


def test_what_the_run_writes_of_it(raw, here):
    for number, made in enumerate(MADE, 1):
        counts = json.loads((made.parent / "made.json").read_text())["entries"]
        assert set(counts) == {"own", "again"}
        kept = [row["kept"] for row in counts.values()]
        assert kept == [len(lines(made / f"{name}.jsonl")) for name in counts]
        notes = json.loads((made.parent / "inputs.json").read_text())
        assert {str(made / "own.jsonl"), str(made / "again.jsonl")} <= set(notes["files"])
        text = f"{counts['own']['kept']} of 12 questions kept"
        assert text in write_report(RUN).read_text()
        assert f"tune-{number}</td>" in write_report(RUN).read_text()
    provenance = json.loads((RUN / "provenance.json").read_text())
    assert [*provenance["data"]] == [raw["data"]["train"]]
    assert "continued" not in provenance
    assert yaml.safe_load((RUN / "recipe.yaml").read_text())["stages"][1]["rounds"] == 2
    stages = yaml.safe_load((RUN / "training.yaml").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["align", "tune-1", "tune-2"]


def test_the_plan_says_when_data_are_made(raw, tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(raw)
    check_recipe(recipe)
    plan = make_plan(recipe)
    assert made_lines(plan["made"]) == [
        "data: own, 12 questions, 12 answers by student, before tune-1, tune-2; made again before "
        "each",
        "data: again, answers by teacher to the questions of own, before tune-1, tune-2; made "
        "again before each",
    ]
    records = [stage["records"] for stage in plan["members"]["student"]["stages"]]
    assert (records[0] > 0, records[1:]) == (True, [0, 0])
    monkeypatch.chdir(whole)
    stages = make_plan(recipe)["members"]["student"]["stages"]
    assert stages[1]["records"] == sum(len(lines(path)) for path in MADE[0].glob("*.jsonl"))


@pytest.fixture
def trained(monkeypatch):
    """Names of the stages that are trained."""
    names, run_stage = [], pipeline.run_stage

    def watched(inputs):
        names.append(inputs.config.name)
        return run_stage(inputs)

    monkeypatch.setattr(pipeline, "run_stage", watched)
    return names


def test_a_finished_run_gets_another_round(raw, here, trained):
    before = [student(made.parent) for made in MADE]
    pipeline.run(load_recipe(raw))
    assert trained == []
    pipeline.run(load_recipe(raw, ["stages.1.rounds=3"]))
    assert trained == ["tune-3"]
    assert before == [student(made.parent) for made in MADE]
    assert texts(RUN / "04-tune-3/made/own.jsonl") != texts(MADE[1] / "own.jsonl")
    with pytest.raises(RecipeError, match="--from-stage tune-3"):
        pipeline.run(load_recipe(raw))


def test_a_round_starts_again(raw, here, trained):
    with pytest.raises(RecipeError, match="--from-stage tune-1"):
        pipeline.run(load_recipe(raw, ["stages.1.optimizer.lr=1e-3"]))
    with pytest.raises(RecipeError, match=r"make\.own\.seed \(stage tune-1\)"):
        pipeline.run(load_recipe(raw, ["make.own.seed=1"]))
    first = texts(MADE[1] / "own.jsonl")
    other = [*raw["stages"], {**STAGE, "name": "more"}]
    pipeline.run(load_recipe({**raw, "stages": other}, ["stages.1.steps=2"]))
    assert trained == ["more"]
    pipeline.run(load_recipe({**raw, "stages": other}, ["make.again.seed=8"]), from_stage="tune-1")
    assert trained == ["more", "tune-1", "tune-2", "more"]
    moved = RUN / "replaced" / "2" / "03-tune-2" / "made" / "own.jsonl"
    assert texts(moved) == first
    assert texts(MADE[1] / "own.jsonl") != first


def test_data_of_a_stage_that_has_begun_must_stay(raw, here):
    shutil.rmtree(RUN / "03-tune-2" / "student")
    (RUN / "03-tune-2" / "done.json").unlink()
    (RUN / "03-tune-2" / "checkpoints" / "step-1").mkdir(parents=True)
    with (MADE[1] / "own.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(MmkdError, match="it has changed since the run began"):
        pipeline.run(load_recipe(raw))


def killed_when(command, condition):
    while command.poll() is None and not condition():
        time.sleep(0.005)
    was_running = command.poll() is None
    if was_running:
        os.killpg(command.pid, signal.SIGKILL)
    command.communicate(timeout=120)
    return was_running


def count(path):
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def test_killed_while_data_are_made_and_after(raw, whole, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    logs = [tmp_path / MADE[0] / f"{name}.jsonl.answers/answers-00000.jsonl"
            for name in ("own", "again")]  # fmt: skip
    moments = [lambda: count(logs[0]) > 3, lambda: count(logs[1]) > 3,
               lambda: count(tmp_path / RUN / "02-tune-1/metrics.jsonl") > 0]  # fmt: skip
    for moment in moments:
        command = warm.Command("run", "recipe.yaml", cwd=tmp_path, session=True)
        assert killed_when(command, moment)
    command = warm.Command("run", "recipe.yaml", cwd=tmp_path)
    text, _ = command.communicate(timeout=120)
    assert command.returncode == 0, text
    for number in (1, 2):
        stage = RUN / f"0{number + 1}-tune-{number}"
        assert student(tmp_path / stage) == student(whole / stage)
        for name in ("own", "again"):
            made = MADE[number - 1] / f"{name}.jsonl"
            assert (tmp_path / made).read_bytes() == (whole / made).read_bytes()
    for log in logs:
        assert count(log) <= 12 + 2 * 2  # a batch that was in flight is asked again


def test_two_processes_make_the_same(raw, tmp_path):
    """The student that answers has hardly changed before, and its answers are greedy, because two
    processes add gradients in another order."""
    frozen = {**STAGE, "name": "align", "optimizer": {"lr": 1e-12, "kind": "sgd"}, "steps": 1}
    tune = {**raw["stages"][1], "rounds": 1, "batch": {"size": 1, "total": 2}}
    greedy = {**raw["make"]["own"], "sampling": {"max_new_tokens": 6}}
    settings = {**raw, "make": {**raw["make"], "own": greedy}, "stages": [frozen, tune]}
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
        words = ("run", "recipe.yaml", "--nproc", processes)
        command = warm.Command(*words, cwd=folder)
        text, _ = command.communicate(timeout=200)
        assert command.returncode == 0, text
        made = folder / RUN / "02-tune" / "made"
        assert len([*(made / "own.jsonl.answers").glob("answers-*.jsonl")]) == processes
        metrics = lines(made.parent / "metrics.jsonl")
        assert len(metrics) == 2
        found.append((texts(made / "own.jsonl"), texts(made / "again.jsonl"), metrics))
    assert found[0][:2] == found[1][:2]
    for one, other in zip(found[0][2], found[1][2], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_rounds_of_the_first_stage_and_held_out_records(raw, tmp_path, monkeypatch):
    """What the first stage reads is made before the run, where the recipe says."""
    monkeypatch.chdir(tmp_path)
    tune = {**raw["stages"][1], "data": {"train": "made:own", "validation": "made:again"}}
    recipe = load_recipe({**raw, "stages": [tune]}, ["stages.0.validation.interval=1"])
    [own] = [m.recipe for m in pipeline.members(recipe)]
    assert [*made_before(own)] == [*made_for(own, 1)] == ["own", "again"]
    assert made_for(own, 0) == {}
    folder = pipeline.run(recipe)
    assert Path("own.jsonl").exists()
    assert not (folder / "01-tune-1" / "made").exists()
    assert json.loads((folder / "01-tune-1" / "made.json").read_text())["entries"]
    assert texts(folder / "02-tune-2/made/own.jsonl") != texts(Path("own.jsonl"))
    assert len(lines(folder / "02-tune-2" / "validation.jsonl")) == 2


def test_members_share_stages_and_not_data(raw, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    variants = {"slow": ["stages.1.optimizer.lr=1e-3", "stages.1.rounds=2"]}
    pipeline.run(load_recipe({**raw, "variants": variants}, ["stages.1.rounds=1"]))
    one, other = RUN / "student" / "02-tune", RUN / "slow" / "02-tune-1"
    assert student(one.parent / "01-align") == student(other.parent / "01-align")
    for name in ("own.jsonl", "again.jsonl"):
        assert (one / "made" / name).read_bytes() == (other / "made" / name).read_bytes()
    assert student(one) == student(whole / RUN / "02-tune-1")
    assert student(one) != student(other)
    assert (other.parent / "03-tune-2").is_dir()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (["stages.1.data.sources.0.leave_out=left.jsonl"], "left.jsonl"),
        (["stages.1.data.sources.0.select={kind: difference, large: a, small: b, "
          "scores: scores.parquet}"], "scores.parquet"),
        (["teacher.source=cache", "teacher.cache={folder: cache}",
          "stages.1.objectives=[{kind: kl}]"], "the teacher's cache"),
    ],
)  # fmt: skip
def test_what_belongs_to_records_before_the_run(raw, changes, what):
    recipe = load_recipe(raw, changes)
    [own] = [member.recipe for member in pipeline.members(recipe)]
    with pytest.raises(RecipeError, match=f"stage tune-1: {what} belongs to records"):
        check_later(own)
    check_later(load_recipe(raw, [*changes, "make.own.by=teacher"]).with_rounds())


def test_commands_read_what_mmkd_data_answers_makes(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(raw)
    scores = Path("s.parquet")
    for command in (
        lambda: bench(recipe, "tune-2", 1),
        lambda: score_data(recipe, scores, stage="tune", device="cpu"),
    ):
        with pytest.raises(MmkdError, match=r"make\.own: its records are not made yet"):
            command()
    make_entries(recipe)
    assert bench(recipe, "tune-2", 1)["stage"] == "tune-2"


def test_paths_of_images_stay_where_they_were(raw, photos, tmp_path, monkeypatch):
    """Records without a folder of images are relative to their file."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "data")
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    row = {"id": "a", "images": ["0.png"], "messages": [{"role": "user", "content": content}]}
    Path("data/questions.jsonl").write_text(json.dumps(row))
    own = {"records": "data/questions.jsonl", "by": "student", "out": "data/own.jsonl",
           "checks": [], "sampling": {"max_new_tokens": 6, "temperature": 1.0}}  # fmt: skip
    again = {**raw["make"]["again"], "out": "data/again.jsonl", "checks": []}
    data = {"train": "made:again", "validation": "data/questions.jsonl"}
    stages = [raw["stages"][0], {**raw["stages"][1], "data": data, "rounds": 1}]
    recipe = load_recipe({**raw, "make": {"own": own, "again": again}, "stages": stages})
    moved = with_stage_data(recipe, 1, tmp_path / "made")
    for name in ("own", "again"):
        make_answers(moved, name, CPU)
    records = Records(moved.stages[1].data)
    assert (records[0].root / records[0].images[0]).is_file()
    assert [source.config.label for source in records.sources] == ["again"]
    held_out = Records(moved.stages[1].data, held_out=True)
    assert (held_out[0].root / held_out[0].images[0]).is_file()
