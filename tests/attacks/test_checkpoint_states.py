"""A checkpoint whose state.json has another structure is damaged: a run logs and skips it."""

import json
from types import SimpleNamespace

import pytest

from mmkd.training.checkpoint import _damage, check_batch

GOOD = {"records_per_step": 4, "files": {"a.safetensors": {"bytes": 1, "sha256": "x"}}}


@pytest.mark.parametrize(
    "state",
    [
        *(None, 1, "text", [], {}, {**GOOD, "files": {}}, {**GOOD, "files": []}),
        *({**GOOD, "files": {"a": {}}}, {**GOOD, "files": {"a": None}}, {"files": GOOD["files"]}),
        *({**GOOD, "records_per_step": "4"}, {**GOOD, "records_per_step": None}),
    ],
    ids=repr,
)
def test_a_state_of_another_shape_is_damage(state, tmp_path):
    step = tmp_path / "step-1"
    step.mkdir()
    (step / "state.json").write_text(json.dumps(state))
    said = _damage(step, SimpleNamespace(world_size=1, rank=0))
    assert said is not None
    assert said.startswith("state.json ")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", '"x"', "null", '{"files": 1, "files": 1}', "\xff"]
)
def test_a_state_that_cannot_be_read_is_no_other_batch(text, tmp_path):
    step = tmp_path / "step-1"
    step.mkdir()
    (step / "state.json").write_text(text, encoding="latin-1")
    check_batch(tmp_path, 4)
