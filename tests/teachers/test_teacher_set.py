"""The teachers of a stage: members, and which of them run on a batch."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.modeling.capture_request import CaptureRequest
from mmkd.modeling.loading import load_model, load_processor
from mmkd.objectives import Objective, build_objective
from mmkd.objectives.divergence_settings import DivergenceConfig
from mmkd.objectives.layer_settings import HiddenMseConfig
from mmkd.objectives.settings import PreferenceConfig
from mmkd.recipe import DataConfig, ModelConfig, TeacherConfig, load_recipe
from mmkd.teachers import (
    LiveTeacher,
    LoadedTeachers,
    TeacherSet,
    ask_each,
    choose_reference,
    load_teachers,
    own_teacher,
)
from tests.support.recipes import tiny_recipe

CPU = torch.device("cpu")
KL, LAYERS = DivergenceConfig(kind="kl"), HiddenMseConfig(kind="hidden_mse", layers=[0])


def no_student() -> LiveTeacher:
    raise AssertionError("the student is no teacher here")


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForImageTextToText.from_pretrained(tiny_model_dir)


@pytest.fixture
def batch(scenes_dir, tiny_model_dir):
    config = DataConfig(train=str(scenes_dir / "train.parquet"))
    processor = load_processor(ModelConfig(model=str(tiny_model_dir)))
    return Encoder(Records(config), processor, config).encode([0, 1])


def settings(*names, **changes):
    return [TeacherConfig(model="m", name=n, **changes) for n in names]


def each(*configs, teachers=()) -> list[Objective]:
    data = DataConfig(train="unused")
    return ask_each([build_objective(c) for c in configs], teachers, data)


def test_a_stage_has_the_teachers_that_its_objectives_need(model):
    first, second = (LiveTeacher(model, CPU) for _ in range(2))
    two = settings("first", "second")
    loaded = LoadedTeachers({"first": first, "second": second}, two)
    both = loaded.for_stage(each(KL, LAYERS, teachers=two), no_student)
    assert both == TeacherSet({"first": first, "second": second}, "first")
    assert both.primary_model is first
    assert both.live == [first, second]
    assert loaded.for_stage(each(LAYERS, teachers=two), no_student).members == {"first": first}
    none = loaded.for_stage([], no_student)
    assert none.members == {}
    assert none.primary_model is None
    assert LoadedTeachers().for_stage([], no_student) == TeacherSet()
    without_settings = LoadedTeachers({"teacher": first}).for_stage(each(KL), no_student)
    assert without_settings == TeacherSet({"teacher": first}, "teacher")


def test_teachers_see_a_batch_as_they_did_alone(model, batch, monkeypatch):
    """The layers of the first one are read, and only the first one has tokens of its own."""
    teachers = TeacherSet({n: LiveTeacher(model, CPU) for n in ("first", "second")}, "first")
    objectives = each(KL, LAYERS, teachers=settings("first", "second"))
    request = CaptureRequest(frozenset({0}))
    alone = teachers.members["first"].signals(batch, request)
    found = teachers.ask(batch, objectives, request)
    assert list(found) == ["first", "second"]
    for signals in found.values():
        assert torch.equal(signals.hidden, alone.hidden)
    assert torch.equal(found["first"].layers[0].block_output, alone.layers[0].block_output)
    assert found["second"].layers == {}
    seen = {}
    monkeypatch.setattr(
        LiveTeacher, "signals", lambda self, batch, *request: seen.update({self: batch.teacher})
    )
    teachers.ask(replace(batch, teacher=batch), objectives)
    assert list(seen.values()) == [batch, None]


def test_a_preference_asks_no_teacher_but_its_reference(model, batch):
    teachers = TeacherSet({"teacher": LiveTeacher(model, CPU)}, "teacher")
    preference = PreferenceConfig(kind="preference")
    assert not teachers.is_asked("teacher", batch, each(preference))
    assert teachers.ask(batch, each(preference)) == {}
    assert teachers.is_asked("teacher", batch, each(preference, KL))
    reference = choose_reference(each(preference), teachers, no_student)
    assert reference.model is teachers.members["teacher"]
    assert reference.name == "teacher"


def test_the_student_as_teacher_and_as_reference_is_one_copy(model):
    own = own_teacher(model, CPU, only_adapters=False)
    loaded = LoadedTeachers(settings=[TeacherConfig(source="self")])
    objectives = each(KL, PreferenceConfig(kind="preference", reference="self"))
    teachers = loaded.for_stage(objectives, lambda: own)
    reference = choose_reference(objectives, teachers, lambda: own)
    assert teachers.members == {"teacher": own}
    assert reference.model is own
    assert reference.name == "teacher"
    assert own.model is not model


def test_a_recipe_loads_the_teachers_that_some_stages_need(scenes_dir, tiny_model_dir, tmp_path):
    def loaded(*kinds, **teacher):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            teacher=[
                {"model": str(tiny_model_dir), "name": name, **teacher} for name in ("a", "b")
            ],
            stage={"objectives": [{"kind": kind} for kind in kinds]},
        )
        recipe = load_recipe(raw)
        return load_teachers(recipe, recipe.stages[0])

    assert list(loaded("ce", "kl").members) == ["a", "b"]
    assert list(loaded("hidden_mse").members) == ["a"]
    none = loaded("ce")
    assert not none.members
    assert none.processor is None
    assert [t.name for t in none.settings] == ["a", "b"]
    weights = load_model(ModelConfig(model=str(tiny_model_dir))).state_dict()
    teacher = loaded("kl").members["b"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in teacher.tensors())
