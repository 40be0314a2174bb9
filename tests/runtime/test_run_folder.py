"""The layout of a run's folder."""

import json

import pytest

from mmkd.errors import CheckpointError
from mmkd.runtime.run_folder import MemberFolder, RunFolder, StageFolder, StudentFolder


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")


def test_a_run_of_one_student_has_no_folder_for_it(tmp_path):
    run = RunFolder(tmp_path / "run")
    assert run.members() == []
    touch(run.member("b").training, run.member("a").training)
    assert run.members() == [run.member("a"), run.member("b")]
    touch(run.only_member.training)
    assert run.members() == [MemberFolder(run.path)]


def test_stages_are_numbered_from_one_and_found_whatever_their_names_are(tmp_path):
    member = MemberFolder(tmp_path)
    assert member.stage(0, "align").path.name == "01-align"
    for path in (member.start, member.stage(0, "align"), member.stage(9, "x")):
        path.path.mkdir()
    (tmp_path / "02-file").touch()
    assert member.stages_from(0) == [member.stage(0, "align"), member.stage(9, "x")]
    assert member.stages_from(1) == [member.stage(9, "x")]
    member.stage(120, "y").path.mkdir()
    assert member.stages_from(10) == [member.stage(120, "y")]


@pytest.mark.parametrize("folder", [StudentFolder, StageFolder])
def test_a_student_is_complete_when_its_file_says_so(tmp_path, folder):
    made = folder(tmp_path)
    whole = {"before": 1, "after": 1, "changes": []}
    if folder is StageFolder:
        whole = {"steps": 3}
    assert not made.is_done()
    assert not made.is_begun()
    made.done.write_text(json.dumps(whole))
    assert made.is_done()
    assert made.is_begun()
    made.done.write_text("{}")
    with pytest.raises(CheckpointError, match="it is damaged"):
        made.is_done()


@pytest.mark.parametrize(
    "name", ["student/x", "checkpoints/step-3/x", "reference.safetensors", "done.json"]
)
def test_a_stage_with_work_in_it_is_begun(tmp_path, name):
    stage = StageFolder(tmp_path)
    touch(stage.metrics, stage.inputs)
    assert not stage.is_begun()
    touch(tmp_path / name)
    assert stage.is_begun()


def test_evaluations_are_found_by_label(tmp_path):
    run = RunFolder(tmp_path)
    assert not list(run.every_evaluation())
    touch(run.evaluation("kd").results, run.evaluation("kd@align").samples("pope"))
    found = dict(run.every_evaluation())
    assert list(found) == ["kd", "kd@align"]
    assert found["kd"] == run.evaluation("kd")
    assert found["kd@align"].samples("pope").is_file()
