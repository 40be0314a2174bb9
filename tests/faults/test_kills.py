"""A few kills at random moments; `make faults` makes a hundred."""

import random
import shutil

import pytest

from tests.faults.kills import ENGINES, start_warm, torment
from tests.support.slow import only


@pytest.mark.parametrize("engine", only(["ZeRO 2 x2"], ["torch x1", "ZeRO 2 x2"]))
def test_killed_runs_end_like_quiet_ones(scenes_dir, tmp_path, engine):
    from tests.support.tiny import write_tiny_model

    shutil.copytree(scenes_dir, tmp_path / "scenes")
    write_tiny_model(scenes_dir / "processor", tmp_path / "model", dropout=0.2)
    draw = random.Random(list(ENGINES).index(engine))
    kills = torment(tmp_path, engine, 3, draw, start_warm)
    assert len(kills) == 3
