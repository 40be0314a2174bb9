"""Each attack is refused in one line, with exit status 2 and nothing new or changed on disk."""

import importlib
from pathlib import Path

import pytest

from tests.attacks import ATTACKS
from tests.support.bad_inputs import Given, outcome, world_in

for module in sorted(Path(__file__).parent.glob("on_*.py")):
    importlib.import_module(f"tests.attacks.{module.stem}")


@pytest.fixture(scope="session")
def given(tiny_model_dir, tmp_path_factory):
    return Given(tmp_path_factory.mktemp("given"), tiny_model_dir)


@pytest.mark.parametrize("case", ATTACKS, ids=lambda case: case.name)
def test_an_attack_is_refused_in_one_line_and_changes_nothing(case, given, tmp_path):
    with world_in(tmp_path / "world", given) as world:
        found = outcome(case, world)
    assert found.status == 2, found.message
    assert found.message.startswith("mmkd: ")
    assert "\n" not in found.message
    assert found.message.count(" -- ") == 1
    for part in case.parts:
        assert part in found.message
    assert found.changed == []


def test_names_are_told_apart():
    assert len({case.name for case in ATTACKS}) == len(ATTACKS)
