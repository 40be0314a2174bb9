"""What every part of a recipe is."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Base of all parts of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


BOTH = "both of them or neither -- "
"""Begins what a validator says of two keys that stand for each other."""
