"""Bad input gives a one-line error, exit status 2, and no files on disk."""

from pathlib import Path

import pytest
import yaml

from tests.support.bad_inputs import CASES, refused, row, run, world_in
from tests.support.bad_inputs.table import RECORD, RUN
from tests.support.places import DOCS

PAGE = (DOCS / "errors.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_one_line_and_changes_nothing(case, given, tmp_path):
    with world_in(tmp_path / "world", given) as world:
        message = refused(case, world)
    assert row(case, message) in PAGE.splitlines(), "python -m scripts.errors"


def test_the_page_has_these_cases_and_no_others():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    told = [line.split(" | ")[0] for line in rows if not line.startswith("| the user")]
    assert told == [row(case, "").split(" | ")[0] for case in CASES]
    assert len({case.name for case in CASES}) == len(CASES)
    assert f"runs all {len(CASES)} below" in PAGE


def test_a_mended_recipe_runs_in_the_same_place(given, tmp_path):
    with world_in(tmp_path / "world", given) as world:
        world.records({**RECORD, "image": "gone.png"})
        Path("recipe.yaml").write_text(yaml.safe_dump(world.raw))
        assert run(RUN, world.patch)[0] == 2
        world.records(RECORD)
        assert run(RUN, world.patch)[0] == 0
    assert (world.folder / "runs" / "tiny" / "01-mimic" / "student" / "config.json").exists()
