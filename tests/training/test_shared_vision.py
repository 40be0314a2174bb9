"""A frozen vision tower that teacher and student share runs once."""

import copy
import json

import pytest
import torch

from mmkd.modeling.capture import capture
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from mmkd.students import set_trainable
from mmkd.teachers import LiveTeacher
from mmkd.training import build
from mmkd.training.shared_vision import share_vision
from mmkd_models.parts import find_parts
from tests.support.families import FAMILIES, inputs, make
from tests.support.recipes import tiny_recipe

CPU = torch.device("cpu")


def pair(family):
    """A teacher, and a student with its frozen tower and another decoder."""
    teacher = make(family)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in find_parts(student).decoder.parameters():
            parameter.mul_(0.9)
    set_trainable(student, ["language_model"])
    return LiveTeacher(teacher, CPU), student.train()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_takes_the_same_pictures(family):
    teacher, student = pair(family)
    given = inputs(family, [5, 9])
    alone = capture(student, given).hidden
    shared = share_vision(teacher, student)
    assert shared is not None
    ran = []
    find_parts(student).vision_layers[0].register_forward_hook(lambda *_: ran.append(1))
    with shared.recording(), torch.no_grad():
        capture(teacher.model, given)
    with shared.replaying():
        assert torch.equal(capture(student, given).hidden, alone)
    assert not ran
    other = {k: v + 1 if k == "pixel_values" else v for k, v in given.items()}
    with shared.recording(), torch.no_grad():
        capture(teacher.model, other)
    with shared.replaying():  # other images than the teacher saw
        assert torch.equal(capture(student, given).hidden, alone)
    assert ran


def test_only_equal_and_frozen_towers_are_shared():
    teacher, student = pair("llava")
    set_trainable(student, ["all"])
    assert share_vision(teacher, student) is None
    teacher, student = pair("llava")
    with torch.no_grad():
        next(find_parts(student).vision.parameters()).flatten()[0].add_(1e-6)
    assert share_vision(teacher, student) is None
    teacher, student = pair("llava")
    find_parts(student).vision.config.attention_dropout = 0.1
    assert share_vision(teacher, student) is None
    teacher, _ = pair("llava")
    assert share_vision(teacher, pair("qwen2_5_vl")[1]) is None


def test_a_stage_shares_and_its_losses_stay(scenes_dir, tiny_model_dir, tmp_path, monkeypatch):
    def losses(name):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            teacher={"model": str(tiny_model_dir)},
            stage={
                "objectives": [{"kind": "kl"}, {"kind": "ce"}],
                "train": ["language_model"],
                "activation_checkpointing": True,
            },
        )
        path = pipeline.run(load_recipe(raw)) / "01-mimic" / "metrics.jsonl"
        return [json.loads(line)["loss"] for line in path.read_text().splitlines()]

    made = []

    def share(*models):
        made.append(share_vision(*models))
        return made[-1]

    monkeypatch.setattr(build, "share_vision", share)
    together = losses("together")
    assert made[0] is not None
    monkeypatch.setattr(build, "share_vision", lambda *_: None)
    assert together == losses("apart")
