"""`data.sampling`: shares of sources that follow the student's gap to the teacher."""

import json
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from mmkd.commands.bench import bench
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import CheckpointError, RecipeError
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import ModelConfig, load_recipe
from mmkd.report.plots import stage_panels
from mmkd.report.rundata import read_run
from mmkd.runs import pipeline, preflight
from mmkd.runtime.files import read_json
from mmkd.training.domains import first_shares, next_shares, rounded
from tests.support import warm
from tests.support.breaking import broken_off
from tests.support.recipes import tiny_recipe
from tests.support.slow import slow
from tests.support.tiny import write_tiny_model

# Formulas


def twin(shares, gaps, alpha):
    psi = [r * math.exp(g) for r, g in zip(shares, gaps, strict=True)]
    return [alpha * p / sum(psi) + (1 - alpha) / len(psi) for p in psi]


def test_shares_are_those_of_the_paper():
    gaps = [1.8] + [1.2] * 9
    shares = first_shares(gaps)
    assert shares == pytest.approx(twin([1] * 10, gaps, 1.0))
    assert shares[0] == pytest.approx(0.168, abs=5e-4)
    for number in range(40):
        wanted = twin(shares, gaps, 0.5)
        shares = next_shares(shares, gaps, 0.5)
        assert shares == pytest.approx(wanted)
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= 0.05
        if number == 0:
            assert shares[0] == pytest.approx(0.185, abs=5e-4)
    assert shares[0] == pytest.approx(0.219, abs=5e-4)


def test_identities_of_the_shares():
    assert next_shares([0.7, 0.2, 0.1], [1.0, 5.0, 2.0], 0.0) == pytest.approx([1 / 3] * 3)
    shares = [0.9, 0.05, 0.05]
    for _ in range(40):  # equal gaps
        shares = next_shares(shares, [1.5] * 3, 0.5)
    assert shares == pytest.approx([1 / 3] * 3)
    assert first_shares([1e5, 1.0]) == [1.0, 0.0]  # exp would overflow
    assert next_shares([1.0, 0.0], [1.0, 1e5], 1.0) == [1.0, 0.0]
    a = next_shares([0.3, 0.7], [1.0, 2.0], 0.5)
    assert a == pytest.approx(next_shares([0.3, 0.7], [11.0, 12.0], 0.5))
    assert rounded([1 / 3, 2 / 3]) == [0.3333, 0.6667]


# Runs


@pytest.fixture(scope="module")
def raw(scenes_dir, tiny_model_dir, tmp_path_factory):
    """Two sources, and a teacher with other weights than the student."""
    folder = tmp_path_factory.mktemp("domains")
    write_tiny_model(scenes_dir / "processor", folder / "teacher")
    model = load_model(ModelConfig(model=str(folder / "teacher")))
    torch.manual_seed(1)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    model.save_pretrained(folder / "teacher")
    table = pq.read_table(scenes_dir / "train.parquet")
    sources = []
    for name, part in {"one": table.slice(0, 12), "two": table.slice(12, 30)}.items():
        pq.write_table(part, folder / f"{name}.parquet")
        sources.append({"train": str(folder / f"{name}.parquet")})
    sampling = {"kind": "domain", "every": 2, "held_out": 3}
    return tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        folder / "runs",
        stage={
            "objectives": [{"kind": "ce"}, {"kind": "kl"}],
            "steps": 5,
            "batch": {"size": 2, "total": 4},
            "checkpoint": {"interval": 3},
        },
        teacher={"model": str(folder / "teacher")},
        data={"sources": sources, "sampling": sampling},
    )


def changed(raw, name, **sampling):
    made = json.loads(json.dumps({**raw, "name": name}))
    made["data"]["sampling"] |= sampling
    return made


def lines(path):
    found = map(json.loads, (path / "01-mimic" / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


@pytest.fixture(scope="module")
def whole(raw):
    """The metrics of an uninterrupted run."""
    return lines(pipeline.run(load_recipe(changed(raw, "whole"))))


def test_shares_change_after_each_interval(raw, whole):
    shares = [line["mixture"] for line in whole]
    assert shares[0] == {"one": 9 / 36, "two": 27 / 36}
    assert shares[0] == shares[1]
    assert shares[1] != shares[2] == shares[3] != shares[4]
    for first in (0, 2):  # records of an interval are as many as its shares say
        interval = whole[first : first + 2]
        drawn = sum(line["sources"]["one"] for line in interval)
        assert abs(drawn - 8 * interval[0]["mixture"]["one"]) < 1
        assert sum(sum(line["sources"].values()) for line in interval) == 8


def test_the_report_draws_the_shares(raw, whole):
    path = pipeline.run_folder(load_recipe(changed(raw, "whole"))).path
    (stage,) = stage_panels(read_run(path))
    titles = [panel.title for panel in stage.panels]
    assert {"share of one", "share of two"} <= {*titles}


def perplexities(raw, folder):
    """exp of the mean cross-entropy on each source's held-out records, from the model's logits."""
    config = ModelConfig(model=str(folder))
    recipe = load_recipe(raw)
    model, processor = load_model(config).eval(), load_processor(config)
    records = Records(recipe.data, measured=True)
    encoder = Encoder(records, processor, recipe.data)
    sums = {"one": [0.0, 0], "two": [0.0, 0]}
    for index in range(len(records)):
        batch = encoder.encode([index])
        with torch.no_grad():
            log_p = model(**batch.inputs).logits[0].double().log_softmax(-1)
        ids, answer = batch.targets.input_ids[0], batch.targets.response[0]
        at = sums[records.sources[records.source_of(index)].config.label]
        for t in answer.nonzero()[:, 0].tolist():
            at[0] -= float(log_p[t - 1, ids[t]])
            at[1] += 1
    return [math.exp(loss / count) for loss, count in sums.values()]


@pytest.fixture(scope="module")
def stopped(raw):
    """A recipe whose run ended after its checkpoint of step 3, and the state of that."""
    recipe = load_recipe(changed(raw, "stopped"))
    with broken_off(lambda stage, number: number > 3):
        pipeline.run(recipe)
    folder = pipeline.run_folder(recipe).path
    return recipe, folder / "01-mimic" / "checkpoints" / "step-3" / "state.json"


def test_the_shares_are_those_of_the_models_perplexities(raw, tiny_model_dir, whole, stopped):
    state = read_json(stopped[1])["mixture"]
    theirs = perplexities(raw, raw["teacher"]["model"])
    gaps = [a / b for a, b in zip(perplexities(raw, tiny_model_dir), theirs, strict=True)]
    assert state["sources"] == ["one", "two"]
    assert state["teacher_ce"] == pytest.approx([math.log(p) for p in theirs], rel=1e-5)
    assert state["history"][0] == pytest.approx(first_shares(gaps), abs=1e-4)
    assert dict(zip(state["sources"], state["history"][1], strict=True)) == whole[2]["mixture"]


def test_a_checkpoint_without_all_shares_is_refused(stopped):
    recipe, path = stopped
    text = path.read_text()
    state = json.loads(text)
    state["mixture"]["history"].pop()
    path.write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="does not have the shares of 2 intervals"):
        pipeline.run(recipe)
    path.write_text(text)


def test_a_resumed_run_sees_the_same_records(stopped, whole):
    assert lines(pipeline.run(stopped[0])) == whole


def test_two_processes_see_the_same_records(raw, whole, tmp_path):
    made = changed(raw, "two")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(made))
    done = warm.run("run", path, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    path = Path(made["output_dir"]) / "two"
    for line, wanted in zip(lines(path), whole, strict=True):
        for key in ("mixture", "sources", "tokens", "supervised_tokens"):
            assert line[key] == wanted[key]
        assert line["loss"] == pytest.approx(wanted["loss"], rel=1e-4)


@pytest.mark.parametrize(
    "stage",
    [
        slow({"batch": {"size": 2, "total": 4, "pack": 512}}, name="packed"),
        slow({"batch": {"tokens": 2048, "total": 4}}, name="tokens"),
        slow({"engine": {"kind": "deepspeed", "zero": 3, "device": "cpu"}}, name="deepspeed"),
    ],
)
def test_the_layout_and_the_engine_change_no_record(stage, raw, whole, request):
    made = changed(raw, request.node.callspec.id)
    made["stages"][0] |= stage
    for line, wanted in zip(lines(pipeline.run(load_recipe(made))), whole, strict=True):
        for key in ("mixture", "sources", "tokens", "supervised_tokens"):
            assert line[key] == wanted[key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None, "objectives": [{"kind": "ce"}]}, "it needs one teacher, which an obj"),
        ({"objectives": [{"kind": "ce"}]}, "it needs one teacher, which an objective of the stage"),
        ({"teacher": {"source": "self"}}, "a teacher with 'source: self' has no losses on held-"),
        ({"steps": 2}, "the shares change every 2 steps, and the stage has 2 -- lower 'every'"),
        ({"epochs": 0.1}, "the shares change every 2 steps, and the stage has 1 -- lower 'every'"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message, raw):
    made = changed(raw, "refused")
    if "teacher" in change:
        made["teacher"] = change.pop("teacher")
    if "epochs" in change:
        del made["stages"][0]["steps"]
    made["stages"][0] |= change
    with pytest.raises(RecipeError, match=message):
        preflight.check(load_recipe(made))


def test_of_several_teachers_the_stage_names_the_one_that_is_compared_with(raw):
    made = changed(raw, "named")
    made["teacher"] = [{**made["teacher"], "name": name} for name in ("a", "b")]
    with pytest.raises(RecipeError, match="there are 2 -- name one in the stage's 'teacher'"):
        preflight.check(load_recipe(made))
    made["stages"][0]["teacher"] = "b"
    preflight.check(load_recipe(made))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "a.json"}, "give two or more sources"),
        ({"sources": [{"train": "a.json"}]}, "give two or more sources"),
        ({"sources": [{"train": "a.json", "weight": 1}, {"train": "b.json", "weight": 2}]},
         "'sampling' decides the shares -- leave 'weight' of the sources out"),
        ({"sources": [{"train": "a.json", "cap": 5}, {"train": "b.json"}]}, "leave 'cap' of the"),
        ({"sources": [{"train": "hub:a/b", "stream": 5}, {"train": "b.json"}]}, "leave 'stream'"),
    ],
)  # fmt: skip
def test_settings_that_contradict_are_refused(data, message, raw):
    made = changed(raw, "refused")
    made["data"] = {**data, "sampling": {"kind": "domain"}}
    with pytest.raises(RecipeError, match=message):
        load_recipe(made)


def test_a_bench_over_a_change_is_refused(raw):
    with pytest.raises(RecipeError, match="the shares of the sources change after 2 steps, within"):
        bench(load_recipe(raw), None, 2)
