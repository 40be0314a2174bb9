"""How a finished student is released, with its defaults."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mmkd.errors import HINT
from mmkd.recipe.base import Strict
from mmkd.runtime.fields import DATA_SET, LANGUAGE, LICENSE, LICENSE_LINK, LICENSE_NAME


class ReleaseConfig(Strict):
    """How `mmkd release` publishes a finished student on the Hub."""

    repo: str | None = Field(None, description="repository on the Hub, such as me/student")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the released weights; by default as they were trained"
    )
    private: bool = Field(False, description="private; false leaves it to the Hub's own default")
    license: str | None = Field(
        None,
        pattern=LICENSE,
        description="the Hub's name for it, such as apache-2.0, or other",
    )
    license_name: str | None = Field(
        None,
        pattern=LICENSE_NAME,
        description="of a license that the Hub calls other, such as qwen-research",
    )
    license_link: str | None = Field(
        None,
        pattern=LICENSE_LINK,
        description="where that license can be read",
    )
    datasets: list[Annotated[str, Field(pattern=DATA_SET)]] = Field(
        [], description="Hub ids of the data that it was trained on"
    )
    language: list[Annotated[str, Field(pattern=LANGUAGE)]] = Field(
        [], description="ISO 639 codes, such as en"
    )
    tags: list[str] = Field([], description="tags in addition to mmkd and distillation")

    @model_validator(mode="after")
    def _other_license(self) -> "ReleaseConfig":
        told = [k for k in ("license_name", "license_link") if getattr(self, k) is not None]
        if told and self.license != "other":
            raise ValueError(f"{told[0]!r} is of 'license: other' -- set that, or leave it out")
        return self

    @field_validator("repo")
    @classmethod
    def _names_a_repository(cls, repo: str | None) -> str | None:
        if repo is None:
            return None
        from huggingface_hub.errors import HFValidationError  # takes a fifth of a second
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            reason = str(error).replace(HINT, " '--' ")  # it may name the characters
            raise ValueError(f"got {repo!r} -- {reason}") from error
        if "/" not in repo:
            raise ValueError(f"got {repo!r} -- write it with its owner, such as me/student")
        return repo
