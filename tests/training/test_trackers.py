"""Trackers get the numbers of metrics.jsonl, each once, and cannot stop training."""

import inspect
import json
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest

from mmkd.errors import RecipeError, StoppedError
from mmkd.recipe import Recipe, load_recipe
from mmkd.runs import pipeline
from mmkd.training import trackers
from mmkd.training.stage import Stage
from mmkd.training.trackers import Tracked, Trackers, flattened
from tests.support.recipes import tiny_recipe

LINE = {
    "step": 3,
    "loss": 0.5,
    "skipped": 0,
    "expert_load": {"0": [0.25, 0.25, 0.4, 0.1], "2": [0.5, 0.5, 0.0, 0.0]},
}


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, tmp_path):
    def make(report_to, **changes):
        return load_recipe(
            tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, report_to=report_to, **changes)
        )

    return make


class FakeRun:
    """What wandb.init and trackio.init return: it remembers."""

    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], []

    def log(self, metrics, step=None, **settings):
        self.logged.append((step, metrics))

    def finish(self, **settings):
        self.finished.append(settings)


@pytest.fixture
def fakes(monkeypatch):
    """wandb and trackio that remember their runs."""
    runs = {"wandb": [], "trackio": []}
    for name, made in runs.items():
        module = ModuleType(name)

        def init(made=made, **settings):
            made.append(FakeRun(**settings))
            return made[-1]

        module.init = init
        monkeypatch.setitem(sys.modules, name, module)
    return runs


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def killed_after(step, monkeypatch):
    """A run that breaks off behind that many steps."""
    before = Stage.step

    def breaking(self, number, batches):
        if number > step:
            raise KeyboardInterrupt
        return before(self, number, batches)

    monkeypatch.setattr(Stage, "step", breaking)
    return lambda: monkeypatch.setattr(Stage, "step", before)


def test_tensorboard_has_every_step_once_after_a_kill(recipe, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = recipe("tensorboard", stage={"steps": 4, "checkpoint": {"interval": 2}})
    restore = killed_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(made)
    restore()
    folder = pipeline.run(made)
    events = EventAccumulator(str(folder / "tensorboard" / "01-mimic"))
    events.Reload()
    found = lines(folder / "01-mimic")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert set(events.Tags()["scalars"]) == {f"train/{k}" for k in found[0] if k != "step"}
    for key in ("loss", "ce", "lr", "grad_norm", "supervised_tokens"):
        scalars = events.Scalars(f"train/{key}")
        assert [s.step for s in scalars] == [1, 2, 3, 4]
        assert [s.value for s in scalars] == pytest.approx([line[key] for line in found])
    assert events.Tags()["tensors"] == ["recipe/text_summary"]
    (text,) = events.Tensors("recipe/text_summary")
    assert b"kind: ce" in text.tensor_proto.string_val[0]


def test_wandb_and_trackio_get_every_step_once_after_a_kill(recipe, fakes, monkeypatch):
    made = recipe(["wandb", "trackio"], stage={"steps": 4, "checkpoint": {"interval": 2}})
    restore = killed_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(made)
    restore()
    folder = pipeline.run(made)
    found = lines(folder / "01-mimic")
    for runs in fakes.values():
        assert [step for run in runs for step, _ in run.logged] == [1, 2, 3, 4]
        last = runs[1].logged[-1][1]
        assert last == flattened(found[-1])
        assert last["train/loss"] == found[-1]["loss"]
    first, second = (run.settings for run in fakes["wandb"])
    assert first == second
    assert (first["name"], first["group"], first["resume"]) == ("tiny/01-mimic", "tiny", "allow")
    assert first["config"]["stages"][0]["name"] == "mimic"
    assert first["dir"] == str(folder)
    assert [run.settings["resume"] for run in fakes["trackio"]] == ["never", "allow"]
    assert [run.finished for run in fakes["wandb"]] == [[{"exit_code": 1}], [{"exit_code": 0}]]
    assert [run.finished for run in fakes["trackio"]] == [[{}], [{}]]


def test_a_stage_and_a_folder_of_their_own_are_a_run_of_their_own(recipe, fakes, tmp_path):
    made = recipe("wandb", variants={"fast": ["stages.0.optimizer.lr=0.1"]})
    for out in ("a", "b"):
        made = made.model_copy(update={"output_dir": str(tmp_path / out)})
        pipeline.run(made)
    settings = [run.settings for run in fakes["wandb"]]
    names = ["tiny/student/01-mimic", "tiny/fast/01-mimic"]
    assert [s["name"] for s in settings] == names * 2
    assert len({s["id"] for s in settings}) == 4
    assert {s["project"] for s in settings} == {"mmkd"}


def test_where_charts_go_may_change_between_two_runs(recipe, fakes, monkeypatch):
    restore = killed_after(2, monkeypatch)
    stage = {"steps": 4, "checkpoint": {"interval": 2}}
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe("none", stage=stage))
    restore()
    pipeline.run(recipe("trackio", stage=stage))
    (run,) = fakes["trackio"]
    assert [step for step, _ in run.logged] == [3, 4]


@pytest.mark.parametrize("breaks", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_left_out(breaks, recipe, fakes, capsys, monkeypatch):
    def fail(*_, **__):
        raise OSError("no network\nat all")

    if breaks == "init":
        monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    else:
        monkeypatch.setattr(FakeRun, breaks, fail)
    folder = pipeline.run(recipe("wandb"))
    assert len(lines(folder / "01-mimic")) == 4
    assert (folder / "01-mimic" / "done.json").exists()
    said = [line for line in capsys.readouterr().out.splitlines() if "wandb" in line]
    assert said == [
        "wandb failed (no network at all): training goes on without it, metrics.jsonl has all steps"
    ]


def test_trackio_is_silent_in_a_log(recipe, fakes, tmp_path, capsys, monkeypatch):
    init = sys.modules["trackio"].init

    def chatty(**settings):
        print("\x1b[1mtrackio show\x1b[0m")
        return init(**settings)

    monkeypatch.setattr(sys.modules["trackio"], "init", chatty)
    tracked = Tracked(recipe("trackio"), tmp_path, tmp_path / "01-mimic")
    with Trackers(tracked, step=0, written=0) as charts:
        charts.log(LINE)
    assert [step for step, _ in fakes["trackio"][0].logged] == [3]
    assert "trackio show" not in capsys.readouterr().out


@pytest.mark.parametrize(("error", "failed"), [(StoppedError("asked"), 0), (OSError("disk"), 1)])
def test_a_stage_that_was_asked_to_stop_has_not_failed(error, failed, recipe, fakes, tmp_path):
    tracked = Tracked(recipe("wandb"), tmp_path, tmp_path / "01-mimic")
    with pytest.raises(type(error)), Trackers(tracked, step=0, written=0):
        raise error
    assert fakes["wandb"][0].finished == [{"exit_code": failed}]


def test_other_ranks_track_nothing(recipe, fakes, tmp_path):
    tracked = Tracked(recipe("wandb"), tmp_path, tmp_path / "01-mimic")
    with Trackers(tracked, step=0, written=0, active=False) as charts:
        charts.log(LINE)
    assert fakes["wandb"] == []
    assert not tracked.stage.exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_one_that_is_not_installed_is_an_error_before_anything_is_written(
    name, recipe, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, trackers.MODULES[name], None)
    with pytest.raises(RecipeError) as error:
        pipeline.run(recipe(name))
    said = str(error.value)
    assert said.startswith(f"report_to: {name} cannot be imported (")
    assert said.endswith(" -- pip install 'mmkd[trackers]'")
    assert "\n" not in said
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("none", []),
        (None, []),
        ("wandb", ["wandb"]),
        (["trackio", "tensorboard"], ["trackio", "tensorboard"]),
        (["wandb", "wandb"], ["wandb"]),
    ],
)
def test_a_name_or_a_list_or_none(written, meant, recipe):
    assert recipe(written).report_to == meant


@pytest.mark.parametrize("written", ["wanb", ["tensorboard", "wanb"]])
def test_an_unknown_one_names_the_nearest(written, recipe):
    with pytest.raises(RecipeError, match="report_to: no tracker 'wanb' -- did you mean 'wandb'"):
        recipe(written)


def test_the_schema_takes_both_forms():
    forms = Recipe.model_json_schema()["properties"]["report_to"]["anyOf"]
    assert {"enum": ["tensorboard", "wandb", "trackio"], "type": "string"} in forms
    assert {"const": "none", "type": "string"} in forms


def test_lists_become_their_ends():
    assert flattened(LINE) == {
        "train/loss": 0.5,
        "train/skipped": 0,
        "train/expert_load/0/min": 0.1,
        "train/expert_load/0/max": 0.4,
        "train/expert_load/2/min": 0.0,
        "train/expert_load/2/max": 0.5,
    }


@pytest.mark.skipif(find_spec("wandb") is None, reason="needs wandb")
def test_wandb_itself_takes_the_calls_and_works_offline(recipe, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    asked = record_calls(wandb, monkeypatch)
    folder = pipeline.run(recipe("wandb"))
    inspect.signature(wandb.Run.finish).bind(None, exit_code=0)
    (settings,) = asked
    (written,) = folder.glob("wandb/offline-run-*")
    content = (written / f"run-{settings['id']}.wandb").read_bytes()
    assert b"train/loss" in content
    summary = json.dumps(lines(folder / "01-mimic")[-1]["loss"]).encode()
    assert summary in content


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio")
def test_trackio_itself_has_every_step_once_after_a_kill(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    record_calls(trackio, monkeypatch)
    made = recipe("trackio", stage={"steps": 4, "checkpoint": {"interval": 2}})
    restore = killed_after(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(made)
    restore()
    folder = pipeline.run(made)
    found = SQLiteStorage.get_logs("mmkd", "tiny/01-mimic")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    losses = [line["loss"] for line in lines(folder / "01-mimic")]
    assert [line["train/loss"] for line in found] == pytest.approx(losses)


def record_calls(module, monkeypatch):
    """Have `init` check its arguments against its signature and remember them."""
    asked, init = [], module.init

    def recorded(**settings):
        inspect.signature(init).bind(**settings)
        asked.append(settings)
        return init(**settings)

    monkeypatch.setattr(module, "init", recorded)
    return asked
