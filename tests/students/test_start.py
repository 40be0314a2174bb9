"""The student as it stands before a stage: made from the recipe, or read from a run."""

import pytest
import torch

from mmkd.errors import CheckpointError
from mmkd.recipe import load_recipe
from mmkd.runs.members import members
from mmkd.runs.start import student_before, write_start
from mmkd.students import start_folder, student_at, write_student
from mmkd_models.layout import mamba_layers, moe_layers
from tests.support.recipes import tiny_recipe

MAMBA = {"kind": "mamba", "init": "default", "layers": [0]}
MOE = {"kind": "moe", "layers": "all", "experts": 2}


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, tmp_path):
    def made(*stages, **student):
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path / "runs")
        (stage,) = raw["stages"]
        raw["stages"] = [{**stage, "name": f"s{i}", **s} for i, s in enumerate(stages)]
        raw["student"] |= student
        (member,) = members(load_recipe(raw))
        return member

    return made


def equal(a, b):
    weights, others = a.state_dict(), b.state_dict()
    assert list(weights) == list(others)
    return all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("start", [[], [MAMBA]])
@pytest.mark.parametrize("convert", [[], [MOE]])
def test_before_the_first_stage_it_is_the_student_that_a_run_starts_from(recipe, start, convert):
    member = recipe({"convert": convert}, convert=start)
    write_start(member, 0, member.recipe)
    ran, _ = student_before(member, 0)
    torch.manual_seed(1)  # the caller's random stream decides nothing
    made = student_at(member.recipe, 0)
    assert equal(made, ran)
    assert mamba_layers(made.config) == ((0,) if start else ())
    assert bool(moe_layers(made.config)) == bool(convert)
    folder = start_folder(member.recipe, 0, member.folder)
    assert (folder is not None and folder.is_dir()) == bool(start or convert)


def test_conversions_add_up_and_the_meta_device_has_the_same_structure(recipe):
    member = recipe({}, {"convert": [MAMBA]}, {}, {"convert": [MOE]})
    for index, (mamba, moe) in enumerate([(0, 0), (1, 0), (1, 0), (1, 1)]):
        made, planned = (student_at(member.recipe, index, meta=m) for m in (False, True))
        assert (bool(mamba_layers(made.config)), bool(moe_layers(made.config))) == (mamba, moe)
        shapes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters()} for m in (made, planned)]
        assert shapes[0] == shapes[1]
        assert all(p.is_meta for p in planned.parameters())


def test_a_later_stage_starts_from_what_the_stage_before_has_written(recipe):
    member = recipe({}, {"convert": [MAMBA]})
    write_start(member, 0, member.recipe)
    trained, processor = student_before(member, 0)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(0.5)
    with pytest.raises(CheckpointError, match="its student is gone"):
        write_start(member, 1, member.recipe)
    write_student(trained, processor, member.stages[0].student)
    write_start(member, 1, member.recipe)
    student, _ = student_before(member, 1)
    assert mamba_layers(student.config) == (0,)
    assert start_folder(member.recipe, 1, member.folder) == member.stages[1].start.student
    assert equal(student, student_at(member.recipe, 1, folder=member.folder))
    kept = {n: p for n, p in trained.named_parameters() if "layers.0.self_attn" not in n}
    own = dict(student.named_parameters())
    assert all(torch.equal(own[name], weight) for name, weight in kept.items())
