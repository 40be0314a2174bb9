"""Each attack is refused in one line, with exit status 2 and nothing new or changed on disk."""

import pytest

from tests.attacks import attacks
from tests.support.bad_inputs import refused, world_in


@pytest.mark.parametrize("case", attacks(), ids=lambda case: case.name)
def test_an_attack_is_refused_in_one_line_and_changes_nothing(case, given, tmp_path):
    with world_in(tmp_path / "world", given) as world:
        refused(case, world)


def test_names_are_told_apart():
    assert len({case.name for case in attacks()}) == len(attacks())
