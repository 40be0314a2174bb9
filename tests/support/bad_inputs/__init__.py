"""Bad inputs: a table of cases, and the page that is generated from it."""

from tests.support.bad_inputs import (  # noqa: F401
    commands,
    data_files,
    evaluations,
    held_out,
    left_out,
    making,
    models,
    pictures,
    recipes,
    records,
    runs,
    stages,
)
from tests.support.bad_inputs.page import in_order, page, row
from tests.support.bad_inputs.table import (
    Case,
    Given,
    Outcome,
    World,
    outcome,
    refused,
    run,
    world_in,
)

CASES = in_order()

__all__ = [
    "CASES",
    "Case",
    "Given",
    "Outcome",
    "World",
    "outcome",
    "page",
    "refused",
    "row",
    "run",
    "world_in",
]
