"""Small recipes for tests: the scenes data and a tiny model, a few steps."""

from pathlib import Path
from typing import Any


def tiny_recipe(
    scenes: Path,
    model: Path | str,
    out: Path,
    *,
    stage: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A one-stage recipe; `stage` and `changes` replace parts of it."""
    return {
        "name": "tiny",
        "output_dir": str(out),
        "student": {"model": str(model)},
        "data": {"train": str(scenes / "train.parquet")},
        "stages": [
            {
                "name": "mimic",
                "objectives": [{"kind": "ce"}],
                "steps": 4,
                "batch": {"size": 4},
                "optimizer": {"lr": 1e-3},
                "engine": {"device": "cpu"},
                **(stage or {}),
            }
        ],
        **changes,
    }
