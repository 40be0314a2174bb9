"""Settings of questions about the objects that a model has listed for each image."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from mmkd.recipe.base import Strict
from mmkd.recipe.templates import placeholders, written
from mmkd.runtime.fields import Prose

PLACES = ("name", "a_name", "names", "other")
"""Placeholders of a question: a name, with its article, in the plural, and a second name."""


class ExistenceConfig(Strict):
    """Questions whether an object is in the image, half of them about objects that are not
    (UniversalNER's negatives, on images). The model answers them in a second pass; an answer that
    contradicts the list makes no record."""

    per_image: int = Field(6, ge=2, le=1000, description="questions about an image, an even number")
    negatives: Literal["frequency", "uniform", "cooccurring"] = Field(
        "frequency",
        description="which absent objects are asked about; frequency: in proportion to the number "
        "of images that have them; uniform: all alike; cooccurring: in proportion to how often "
        "they are listed together with the image's objects",
    )
    question: str = Field("Is there {a_name} in the image?", description="with {name} or {a_name}")

    @field_validator("per_image")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"got {value}, and half of the questions are about absent objects -- "
                             "give an even number")  # fmt: skip
        return value

    @field_validator("question")
    @classmethod
    def _about_one(cls, value: str) -> str:
        return _checked(value, ("name", "a_name"), ("name", "a_name"))


class ObjectQuestionsConfig(Strict):
    """Questions about the objects in each image. The first model under 'by' lists them first."""

    prompt: Prose = Field(
        "List the objects that you can see in this image, separated by commas.",
        description="asks for the list",
    )
    names: list[str] = Field(
        [],
        max_length=10**5,
        description="names that are searched for in the answer; by default it is read as a list",
    )
    max_new_tokens: int = Field(128, ge=1, le=10**5, description="of the list")
    least_images: int = Field(
        2, ge=1, le=10**9, description="a name counts if it is listed for so many images"
    )
    existence: ExistenceConfig | None = Field(None, description="questions with the answer yes/no")
    ask: list[str] = Field(
        [],
        max_length=100,
        description="further questions about listed objects, such as 'How many {names} are "
        "there?', 'What colour is the {name}?' or 'Where is the {name}, seen from the {other}?'",
    )
    per_image: int = Field(1, ge=1, le=1000, description="objects that 'ask' is about, by image")

    @field_validator("ask")
    @classmethod
    def _have_names(cls, value: list[str]) -> list[str]:
        return [_checked(text, PLACES, ("name", "a_name", "names")) for text in value]

    @model_validator(mode="after")
    def _something(self) -> "ObjectQuestionsConfig":
        if self.existence is None and not self.ask:
            raise ValueError("there are no questions -- add 'existence' or 'ask'")
        return self


def _checked(text: str, known: tuple[str, ...], needed: tuple[str, ...]) -> str:
    """A question whose placeholders are known.

    Raises:
        ValueError: one is unknown, or none of `needed` is there.
    """
    found = placeholders(text, known)
    if not found & set(needed):
        raise ValueError(f"{text!r} names no object -- known placeholders: {written(known)}")
    return text
