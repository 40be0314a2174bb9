"""`mmkd plan`: it refuses what a run refuses, adds up, and fits a terminal of 80 columns."""

import json
import sys

import pytest
import yaml
from rich.console import Console

from mmkd.cli import main
from mmkd.commands.plan import check_recipe, make_plan, print_plan, show
from mmkd.errors import MmkdError
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline, timings
from mmkd.runtime import progress
from mmkd.runtime.files import write_json
from mmkd.students import check
from tests.support.recipes import tiny_recipe

KL = {"objectives": [{"kind": "ce"}, {"kind": "kl"}]}


@pytest.fixture
def world(scenes_dir, tiny_model_dir, tmp_path):
    def raw(**changes):
        changes = {"teacher": {"model": str(tiny_model_dir)}, "stage": KL, **changes}
        return tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, **changes)

    return raw


def printed(monkeypatch, plan, *, width=80, **settings):
    from mmkd.runtime import progress

    console = Console(width=width, color_system=None)
    for module in (show, progress):
        monkeypatch.setattr(module, "console", console)
    with console.capture() as caught:
        print_plan(plan, **settings)
    return caught.get()


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"train": "nowhere.json"}},
        {"data": {"sources": [{"train": "nowhere.json"}]}},
        {"stage": {**KL, "data": {"train": "nowhere.json"}}},
        {"stage": {"objectives": [{"kind": "preference"}]}},  # without pairs
        {"stage": {"objectives": [{"kind": "hidden_mse", "layers": [7]}]}},
        {"stage": {"objectives": [{"kind": "matrix", "layers": [0]}]}},  # not with sdpa
        {"stage": {**KL, "train": ["nothing"]}},
        {"stage": {"objectives": [{"kind": "balance"}]}},  # without experts
        {"teacher": None},
        {"evaluate": {"tasks": ["no_such_task"]}},
        {"variants": {"other": ["data.train=nowhere.json"]}},
    ],
)
def test_it_refuses_what_a_run_refuses(world, tmp_path, changes):
    recipe = load_recipe(world(**changes))
    with pytest.raises(MmkdError) as of_run:
        pipeline.run(recipe)
    with pytest.raises(MmkdError) as of_plan:
        check_recipe(recipe)
    assert str(of_plan.value) == str(of_run.value)
    assert not (tmp_path / "tiny").exists()


def test_the_command_checks_and_data_may_be_left_out(world, tmp_path, monkeypatch, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(world(data={"train": "nowhere.json"})))
    for words, status in ((["--without-data"], 0), ([], 2)):
        monkeypatch.setattr(sys, "argv", ["mmkd", "plan", str(file), *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == status
    out, err = capsys.readouterr()
    assert "not built yet" in out
    assert err == "mmkd: nowhere.json: no such data file -- check data.train\n"
    with pytest.raises(MmkdError, match="nothing"):  # all but the data is still looked at
        check_recipe(
            load_recipe(world(data={"train": "nowhere.json"}, stage={**KL, "train": ["nothing"]})),
            without_data=True,
        )


def test_json_stands_alone_on_stdout_and_a_note_comes_once(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_said", set())
    monkeypatch.setattr(check, "prompt_ends_in_blank", lambda processor: True)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(world(seeds=[0, 1], variants={"b": ["stages.0.steps=3"]})))
    monkeypatch.setattr(sys, "argv", ["mmkd", "plan", str(file), "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    out, err = capsys.readouterr()
    assert len(json.loads(out)["members"]) == 4
    assert err.count("generation prompt ends in a space") == 1


def test_totals_count_shared_stages_once(world):
    raw = world(variants={"late": ["stages.1.optimizer.lr=1"], "early": ["stages.0.steps=7"]})
    raw["stages"] = [{**raw["stages"][0], "name": name, "steps": 4} for name in "ab"]
    raw["seeds"] = [0, 1]
    plan = make_plan(load_recipe(raw))
    stage = plan["members"]["student-seed0"]["stages"][0]
    assert stage["tokens"] == 4 * stage["tokens_per_step"]
    assert stage["flops"] == 4 * stage["flops_per_step"]["total"]
    shared = {label: m["shared_stages"] for label, m in plan["members"].items()}
    assert shared == {
        "student-seed0": 0, "late-seed0": 1, "early-seed0": 0,
        "student-seed1": 0, "late-seed1": 1, "early-seed1": 0,
    }  # fmt: skip
    assert plan["total"]["steps"] == 2 * (8 + 4 + 11)
    assert plan["total"]["flops"] == plan["total"]["steps"] * stage["flops_per_step"]["total"]


def test_a_first_pass_of_the_student_is_counted(world):
    flops = []
    for size in (4, 2):
        batch = {"size": size, "total": 4}
        stage = {**KL, "objectives": [{"kind": "affinity"}], "batch": batch}
        plan = make_plan(load_recipe(world(stage=stage)))
        flops.append(plan["members"]["student"]["stages"][0]["flops_per_step"])
    one, two = flops
    assert two["student_decoder"] * 3 == pytest.approx(one["student_decoder"] * 4)
    assert two["teacher_decoder"] == one["teacher_decoder"]


@pytest.mark.parametrize(("steps", "warned"), [(1600, True), (1599, False)])
def test_it_warns_of_a_hundred_passes(world, steps, warned):
    plan = make_plan(load_recipe(world(stage={**KL, "steps": steps})))  # 64 records, 4 a step
    assert bool(plan["warnings"]) is warned
    if warned:
        said = "stage mimic passes over its 64 records 100 times (1,600 steps)"
        assert plan["warnings"] == [said]


def test_epochs_of_data_that_are_not_there_are_not_counted(world):
    stage = {**KL, "steps": None, "epochs": 2}
    (warning,) = make_plan(load_recipe(world(stage=stage, data={"train": "no.json"})))["warnings"]
    assert warning.endswith("its steps are not known, and the totals count one")


def test_a_study_is_a_few_lines_each(world, monkeypatch):
    variants = {f"v{n}": [f"stages.0.optimizer.lr={n}"] for n in range(1, 5)}
    plan = make_plan(load_recipe(world(variants=variants, seeds=list(range(10)))))
    assert len(plan["members"]) == 50
    text = printed(monkeypatch, plan)
    assert len(text.splitlines()) < 25
    for label, (override,) in variants.items():
        assert f"  {label}, seeds 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n    {override}\n" in text
    assert "5 students, 50 trainings" in text
    long = printed(monkeypatch, plan, verbose=True)
    assert long.count("memory, estimated") == 5
    assert max(map(len, [*text.splitlines(), *long.splitlines()])) <= 88


def test_no_name_is_broken_at_80_columns(world, monkeypatch):
    raw = world()
    names = [f"a_rather_long_stage_name_{n}" for n in range(4)]
    long = [
        {"kind": "ce"},
        {"kind": "kl", "region": "vision", "name": "x"},
        {"kind": "skew_reverse_kl", "weight": 0.25},
    ]
    raw["stages"] = [{**raw["stages"][0], "name": n, "objectives": long} for n in names]
    text = printed(monkeypatch, make_plan(load_recipe(raw)))
    assert all(len(line) <= 80 for line in text.splitlines() if "mmkd bench`" not in line)
    for word in (*names, "skew_reverse_kl", "kl@vision"):
        assert word in text
    assert text.count("kl@vision") == len(names)


def test_rounds_have_the_timing_of_one(world):
    recipe = load_recipe(world(stage={**KL, "steps": 7200, "rounds": 3}))
    assert timings.keep_timing(recipe.with_rounds(), 0, {"seconds": 0.5}).is_file()
    plan = make_plan(recipe)
    assert [stage["seconds"] for stage in plan["members"]["student"]["stages"]] == [3600] * 3
    assert plan["total"]["steps"] == 3 * 7200


def test_hours_where_bench_has_timed_the_stage(world, tmp_path, monkeypatch):
    recipe = load_recipe(world(stage={**KL, "steps": 7200}))
    assert make_plan(recipe)["total"]["seconds"] is None
    path = timings.keep_timing(recipe, 0, {"seconds": 0.5})
    assert path.parent == tmp_path / "tiny" / "bench"
    plan = make_plan(recipe)
    assert plan["total"]["seconds"] == 3600
    assert "7,200 steps" in (text := printed(monkeypatch, plan))
    assert "1.00 hours of training" in text
    for changed in ({**KL, "batch": {"size": 2}}, {"objectives": [{"kind": "kl"}]}):
        other = load_recipe(world(stage={**changed, "steps": 7200}))
        assert make_plan(other)["total"]["seconds"] is None
    longer = load_recipe(world(stage={**KL, "steps": 100, "optimizer": {"lr": 1}}, seed=3))
    assert make_plan(longer)["total"]["seconds"] == 50
    kept = {"seconds": 0.5, "machine": {"device": "cuda", "name": "another"}}
    write_json(path, kept)
    assert make_plan(recipe)["total"]["seconds"] is None
    path.write_text("{")
    assert make_plan(recipe)["total"]["seconds"] is None


def test_a_run_says_its_stage_and_the_time_left_in_all(world, tmp_path, capsys):
    raw = world(variants={"late": ["stages.1.optimizer.lr=1e-4"]}, teacher=None)
    one = {**raw["stages"][0], "objectives": [{"kind": "ce"}]}
    raw["stages"] = [{**one, "name": "a"}, {**one, "name": "b", "steps": None, "epochs": 0.125}]
    recipe = load_recipe(raw)
    assert [timings.steps_of(recipe, stage) for stage in recipe.stages] == [4, 2]
    pipeline.run(recipe)
    lines = capsys.readouterr().out.splitlines()
    rules = [line.strip("─ ") for line in lines if line.startswith("─")]
    assert rules == [
        "student: stage 1 of 2, a", "student: stage 2 of 2, b", "late: stage 2 of 2, b"
    ]  # fmt: skip
    first = [next(line for line in lines if line.startswith(start)) for start in ("a 1/4", "b 1/2")]
    for line, place in zip(first, ("stage 1 of 2", "stage 2 of 2"), strict=True):
        assert f", {place}, eta 0:0" in line
        assert "for all stages" in line
    last = [line for line in lines if line.startswith("b 2/2")][-1]
    assert "for all stages" not in last
