"""Advice on the size of a teacher."""

import pytest

from mmkd.commands.plan import make_plan, print_plan
from mmkd.commands.plan.teacher_size import size_advice
from mmkd.recipe import load_recipe
from tests.support.recipes import tiny_recipe


@pytest.mark.parametrize(
    ("teacher", "student", "said"),
    [
        (100, 100, None),
        (119, 100, None),
        (780, 100, "the teacher's decoder has 7.8 times the student's parameters; published"),
        (250, 100, "found the best between 2 and 8"),
        (2000, 100, "between 2 and 8; 'assistant' can train a student of about 2.5 times the size"),
        (50, 100, None),
    ],
)  # fmt: skip
def test_advice(teacher, student, said):
    text = size_advice(teacher, student)
    assert (text is None) == (said is None)
    assert said is None or said in text
    assert text is None or ("assistant" in text) == (teacher > 8 * student)


def test_a_plan_says_it_once_for_each_teacher(scenes_dir, tiny_model_dir, tmp_path, caplog):
    """Of two stages, whose student has half of the teacher's layers."""
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, teacher={"model": str(tiny_model_dir)})
    raw["student"]["convert"] = [{"kind": "depth_pruning", "decoder": [0]}]
    stage = {**raw["stages"][0], "objectives": [{"kind": "kl"}]}
    raw["stages"] = [stage, {**stage, "name": "again"}]
    plan = make_plan(load_recipe(raw))
    (note,) = plan["notes"]
    assert note.startswith("the teacher's decoder has 2.0 times the student's parameters")
    print_plan(plan)
    assert f"note: {note}" in [r.getMessage() for r in caplog.records]
    raw["student"]["convert"] = []
    assert make_plan(load_recipe(raw))["notes"] == []
    raw["stages"] = [{**stage, "objectives": [{"kind": "ce"}]}]
    assert make_plan(load_recipe(raw))["notes"] == []
