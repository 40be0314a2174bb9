"""`mmkd bench`: the parts add up to the step, and there is a lower bound of the models' time."""

import json
import time
from pathlib import Path

import pytest
import yaml

from mmkd.commands import bench
from mmkd.errors import RecipeError
from mmkd.recipe import load_recipe
from mmkd.runtime.hashes import weights_hash
from mmkd.teachers import LiveTeacher, load, place_teacher
from mmkd_models.parts import find_parts
from tests.support import warm
from tests.support.recipes import tiny_recipe


@pytest.fixture
def raw(scenes_dir, tiny_model_dir, tmp_path):
    def make(**stage):
        return tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            teacher={"model": str(tiny_model_dir)},
            stage={"objectives": [{"kind": "ce"}, {"kind": "kl"}], **stage},
        )

    return make


@pytest.mark.parametrize("train", [["all"], ["language_model"]])
def test_parts_add_up(raw, tmp_path, train):
    found = bench.bench(load_recipe(raw(train=train, batch={"size": 2, "accumulate": 2})), None, 3)
    assert sum(found["parts"].values()) == pytest.approx(found["seconds"])
    for name in ("data", "teacher", "student forward", "objectives", "backward", "optimizer"):
        assert found["parts"][name] > 0
    assert set(found["floor"]) == {"teacher", "student"}
    assert found["floor_seconds"] == pytest.approx(sum(found["floor"].values()))
    assert found["supervised_tokens_per_second"] > 0
    assert not (tmp_path / "tiny").exists()


def test_engines_that_own_the_weights_have_no_floor(raw):
    pytest.importorskip("deepspeed")
    engine = {"device": "cpu", "kind": "deepspeed", "zero": 3}
    found = bench.bench(load_recipe(raw(engine=engine)), "mimic", 1)
    assert found["floor"] == {}
    assert found["parts"]["backward"] > 0


def test_an_unknown_stage_is_named(raw):
    with pytest.raises(RecipeError, match=r"no stage 'align' -- there are mimic"):
        bench.bench(load_recipe(raw()), "align", 1)


def test_the_command_writes_table_numbers_and_picture(raw, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw()))
    words = ["--steps", "1", "--json", tmp_path / "b.json", "--plot", tmp_path / "b.png"]
    done = warm.run("bench", tmp_path / "recipe.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert "without data, of the floor" in done.stdout
    assert json.loads((tmp_path / "b.json").read_text())["stage"] == "mimic"
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    (kept,) = (tmp_path / "tiny" / "bench").glob("*.json")
    assert json.loads(kept.read_text())["seconds"] > 0  # where mmkd plan looks for it


class Slow(LiveTeacher):
    """A teacher that takes its time, and counts."""

    def __init__(self, inner, seconds):
        self.inner, self.seconds, self.calls = inner, seconds, 0
        super().__init__(inner.model, inner.device)

    def own_signals(self, batch, *request):
        self.calls += 1
        time.sleep(self.seconds)
        return super().own_signals(batch, *request)


def timed(raw, monkeypatch, seconds):
    """What bench finds where the teachers take these seconds, and the teachers."""
    made = []

    def place(model, *rest):
        made.append(Slow(place_teacher(model, *rest), seconds[len(made)]))
        return made[-1]

    monkeypatch.setattr(load, "place_teacher", place)
    return bench.bench(load_recipe(raw), None, 2), made


def test_every_teacher_is_timed(raw, tiny_model_dir, monkeypatch):
    recipe = raw(objectives=[{"kind": "kl"}], batch={"size": 2})
    recipe["teacher"] = [
        {"name": name, "model": str(tiny_model_dir), "weight": 0.5} for name in ("one", "two")
    ]
    found, teachers = timed(recipe, monkeypatch, [0.1, 0.3])
    assert found["parts"]["teacher"] > 0.4
    assert found["floor"]["teacher"] > 0.4
    assert [t.calls for t in teachers] == [8, 8]  # two warm-up steps and two, each with its floor


def test_a_teacher_of_which_layers_are_read_stops_early(raw, monkeypatch):
    """In the steps and in the floor, after one forward pass of all layers."""
    behind = []
    placed = LiveTeacher.__init__

    def watched(self, model, device):
        placed(self, model, device)
        layer = find_parts(self.model).decoder_layers[1]
        layer.register_forward_hook(lambda *_: behind.append(self))

    monkeypatch.setattr(LiveTeacher, "__init__", watched)
    objectives = [{"kind": "hidden_mse", "layers": [0]}, {"kind": "ce"}]
    found = bench.bench(load_recipe(raw(objectives=objectives, batch={"size": 2})), None, 1)
    assert len(behind) == 1
    assert found["parts"]["teacher"] > 0
    assert found["floor"]["teacher"] > 0


def test_the_floor_has_only_the_teachers_that_are_asked(raw, tiny_model_dir, tmp_path, monkeypatch):
    """Each of two teachers is asked about one source, and a micro-batch is from one of them."""
    recipe = raw(objectives=[{"kind": "kl"}])
    train = Path(recipe["data"]["train"])
    files = {"one": train, "two": train.with_name("validation.parquet")}
    recipe["data"] = {"sources": [{"name": n, "train": str(f)} for n, f in files.items()]}
    recipe["teacher"] = [{"name": n, "model": str(tiny_model_dir), "sources": [n]} for n in files]
    stage, student = bench.prepare(load_recipe(recipe), 0, tmp_path)
    asked = []
    monkeypatch.setattr(bench, "_bare_teacher", lambda clock, teacher, *rest: asked.append(teacher))
    encoder, teachers = stage.stream.encoder, stage.teachers
    for first in encoder.records.starts:
        bench.floor_of(stage, student, teachers, [encoder.encode([first])])
    assert asked == list(teachers.members.values())


def test_a_teacher_that_is_the_reference_too_runs_once(raw, tiny_model_dir, tmp_path, monkeypatch):
    rows = [
        {"id": str(i), "prompt": f"Say {i}", "chosen": "one two", "rejected": "three"}
        for i in range(4)
    ]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    recipe = raw(
        objectives=[{"kind": "preference", "reference": "teacher"}, {"kind": "kl"}],
        batch={"size": 2},
    )
    recipe["data"] = {"train": str(tmp_path / "pairs.json")}
    found, (teacher,) = timed(recipe, monkeypatch, [0.1])
    assert teacher.calls == 8
    assert found["parts"]["teacher"] > 0.1


@pytest.mark.parametrize("nothing", ["", None])
def test_no_folder_has_no_weights(nothing, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.chdir(tmp_path)
    assert weights_hash(nothing) is None
    assert weights_hash("org/model") is None
    assert weights_hash(".") == weights_hash(tmp_path) == weights_hash(str(tmp_path))
