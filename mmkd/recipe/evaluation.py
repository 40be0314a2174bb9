"""What is evaluated after the training, with its defaults."""

from typing import Annotated

from pydantic import Field, model_validator

from mmkd.recipe.base import LocalPath, Strict
from mmkd.runtime.fields import MOST, Prose

ANSWER_ECE, TOKEN_ECE = "answer_ece", "token_ece"
"""Metrics of tasks: the expected calibration errors of answers with options, and of tokens."""


class SamplesConfig(Strict):
    """Questions about a few images; the report shows the answers."""

    records: LocalPath | None = Field(
        None,
        description="records that are not trained on, written as in data.train; the first "
        "question of each is asked",
    )
    images: list[LocalPath] | LocalPath | None = Field(
        None,
        description="images, or a folder of them; with 'records', the folder that image "
        "paths are relative to",
    )
    prompts: list[Prose] = Field(
        ["Describe the image."], min_length=1, description="questions about each of 'images'"
    )
    count: int = Field(
        12,
        ge=1,
        le=10**6,
        description="number of records or images, evenly spread",
    )
    max_new_tokens: int = Field(
        128, ge=1, le=10**6, description="largest number of tokens of an answer"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "SamplesConfig":
        if self.records is None and not self.images:
            raise ValueError("nothing to show -- give 'records' or 'images'")
        if self.records is not None and isinstance(self.images, list):
            raise ValueError("with 'records', 'images' must be one folder -- name it")
        told = self.prompts != type(self).model_fields["prompts"].default
        if self.records is not None and told:
            raise ValueError(
                "'prompts' are asked about 'images', and 'records' have their own -- leave one out"
            )
        return self


class EvaluateConfig(Strict):
    """Evaluation of the finished students and the teacher: lmms-eval and sample answers."""

    tasks: list[str] = Field([], description="names of lmms-eval tasks")
    samples: SamplesConfig | None = Field(
        None,
        description="held-out images with questions, whose answers the report shows; does "
        "not need lmms-eval",
    )
    include: LocalPath | None = Field(None, description="folder of lmms-eval task files")
    local: LocalPath | None = Field(
        None, description="folder with the tasks' data as parquet files, instead of the Hub"
    )
    batch_size: int = Field(32, ge=1, le=10**6, description="questions answered together")
    limit: int | None = Field(None, ge=1, le=MOST, description="documents per task")
    calibration: bool = Field(
        True,
        description="also compute the expected calibration error on the tasks' true answers, with "
        "one further forward pass per document",
    )
    teacher: bool = Field(True, description="evaluate the teacher too")
    every_stage: bool = Field(
        False, description="evaluate the student of every stage, not only of the last"
    )
    decode: list[Annotated[int, Field(ge=1, le=10**7)]] = Field(
        [], description="context lengths at which decoding is timed, with the cache's size"
    )

    @model_validator(mode="after")
    def _something(self) -> "EvaluateConfig":
        if not self.tasks and self.samples is None and not self.decode:
            raise ValueError("nothing to evaluate -- name 'tasks', or give 'samples'")
        return self
