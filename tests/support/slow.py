"""Further cases of a check of which `make test` runs one case. `make test-all` runs all of them."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any, name: str | None = None) -> Any:
    """A case that `make test` leaves out: another engine, launcher or number of processes."""
    return pytest.param(*values, marks=pytest.mark.slow, id=name)


def only(quick: Iterable[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases, of which `make test` runs only those that are named."""
    kept, cases = set(quick), list(cases)
    assert kept <= set(cases)
    return [case if case in kept else slow(case, name=str(case)) for case in cases]


def runs_all_cases(request: pytest.FixtureRequest) -> bool:
    """Whether slow cases of a fixture's module were selected, so that it has to make their runs."""
    items = request.session.items
    return any(item.path == request.path and item.get_closest_marker("slow") for item in items)
