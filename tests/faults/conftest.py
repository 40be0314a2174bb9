"""A run that is long enough to be interrupted."""

import pytest

from tests.support.interrupted import write
from tests.support.recipes import tiny_recipe


@pytest.fixture
def long_run(scenes_dir, tiny_model_dir, tmp_path):
    """A recipe of two stages with more steps than a test waits for, and its folder."""

    def make(name="long", steps=2000, workers=0, **stage):
        settings = {"steps": steps, "batch": {"size": 2, "total": 4}, **stage}
        raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name=name, stage=settings)
        raw["data"]["workers"] = workers
        raw["stages"] = [raw["stages"][0], {**raw["stages"][0], "name": "second"}]
        return write(tmp_path, raw), tmp_path / name

    return make
