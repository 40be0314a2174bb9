"""Settings of data that a model makes: who answers which questions, and which answers are kept."""

import os
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmkd.errors import nearest
from mmkd.recipe.answer_checks import CHECKS, AnyCheckConfig
from mmkd.recipe.base import BOTH, LocalPath, Strict
from mmkd.recipe.object_questions import ObjectQuestionsConfig
from mmkd.recipe.stages import SamplingConfig
from mmkd.recipe.templates import placeholders, written
from mmkd.runtime.fields import MOST, MOST_SEED, Prose

OF_RECORDS = ("question", "answer")
"""Placeholders of prompts about records."""
MADE = "made:"
"""Begins the value of `data.train`, or of `records`, that names an entry of `make`."""
WHY = "-why"
"""Ends the name of an entry's rationales."""
STUDENT = "student"
"""Names the student, before the stage that reads the records, as the model that answers."""


class CandidatesConfig(SamplingConfig):
    """How many answers a model gives to each question, and how they are sampled."""

    max_new_tokens: int = Field(
        256, ge=1, le=10**6, description="largest number of tokens of an answer"
    )
    temperature: float = Field(0.0, ge=0, le=1e3, description="0: greedy decoding")
    n: int = Field(1, ge=1, le=1000, description="answers to each question")

    @model_validator(mode="after")
    def _differ(self) -> "CandidatesConfig":
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.n} answers at temperature 0 are all the same -- raise the temperature, or "
                "set n to 1"
            )
        return self


class ContextConfig(Strict):
    """What only the model that answers reads. The records do not contain it."""

    system: Prose | None = Field(None, description="system message")
    shots: LocalPath | None = Field(
        None, description="file of records that are put before each question as examples"
    )

    @model_validator(mode="after")
    def _something(self) -> "ContextConfig":
        if self.system is None and self.shots is None:
            raise ValueError("nothing is set -- add 'system' or 'shots', or leave it out")
        return self


class RationaleConfig(Strict):
    """Rationales of the kept answers, as records of their own (Distilling step-by-step)."""

    prompt: Prose = Field(
        "Explain briefly how the image shows this.",
        description="asked of the same model after the answer; the record's own answer, if it has "
        "one and no check looks for hard questions",
    )
    question: Prose = Field(
        "Explain your answer.", description="added to the question of a rationale's record"
    )
    max_new_tokens: int = Field(256, ge=1, le=10**6, description="of a rationale")
    out: LocalPath = Field(description="file to write; data.train can be made:NAME-why")


class MakeConfig(Strict):
    """Records whose answers a model writes, before the stages that train on them."""

    pictures: LocalPath | None = Field(
        None, description="folder of images, in any depth, to ask 'prompts' about"
    )
    records: LocalPath | None = Field(
        None,
        description="records, as data.train, also made:NAME of another entry; their first question "
        "is asked, or 'prompts' if given",
    )
    images: LocalPath | None = Field(
        None, description="folder that image paths of 'records' are relative to"
    )
    limit: int | None = Field(
        None, ge=1, le=MOST, description="largest number of images or records; all by default"
    )
    twins: int | None = Field(
        None,
        ge=0,
        le=64,
        description="an image is not asked about if its perceptual hash differs from that of an "
        "earlier one in at most so many of 256 bits, such as 16; all are by default",
    )
    against: list[LocalPath] = Field(
        [],
        max_length=1000,
        description="names of evaluation tasks, files of records, or folders of images (with a /): "
        "near-duplicates of their images are not asked about, up to 'twins' bits, or 16 without it",
    )
    by: list[str] = Field(
        ["teacher"],
        min_length=1,
        max_length=100,
        description="models that answer: names of teachers, 'student', or names under 'servers'; "
        "several take turns",
    )
    prompts: list[Prose] = Field(
        [],
        max_length=1000,
        description="questions about each image; those about 'records' may contain {question} and "
        "{answer}, the record's first question and its answer",
    )
    objects: ObjectQuestionsConfig | None = Field(
        None, description="questions about the objects that a model lists for each image"
    )
    writes: Literal["answers", "questions"] = Field(
        "answers",
        description="questions: what the model writes is a question about the images, in a record "
        "without an answer, for another entry that reads it as 'records'",
    )
    context: ContextConfig | None = Field(
        None, description="what only the model that answers reads"
    )
    sampling: CandidatesConfig = Field(
        CandidatesConfig(), description="how answers are sampled; greedy by default"
    )
    checks: list[AnyCheckConfig] = Field(
        ["empty"],
        validate_default=True,
        description="an answer that fails one of these is not used, nor is one without text; a "
        "kind, or a mapping with its settings",
    )
    keep: Literal["all", "best", "pair"] = Field(
        "best",
        description="all: each answer that passes the checks is a record; best: the one with the "
        "highest score; pair: the best and the worst one, as a preference",
    )
    distinct: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="a text is left out if its ROUGE-L F1 with an earlier one is above this, such "
        "as 0.7 (Lion); answers to the same question about the same images are compared, and all "
        "questions about the same images",
    )
    join: bool = Field(
        False,
        description="all questions about an image are turns of one record, in random order, so "
        "that the image's tokens are computed once; by default each is a record",
    )
    why: RationaleConfig | None = Field(
        None, description="also write rationales of the kept answers"
    )
    out: LocalPath = Field(
        description="file to write, .jsonl or .parquet; answers so far are in a folder next to it"
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="of sampled answers")
    batch_size: int = Field(8, ge=1, le=10**5, description="questions that run at once on a device")

    @field_validator("by", "against", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("checks", mode="before")
    @classmethod
    def _kinds(cls, value: Any) -> Any:
        short = isinstance(value, list)
        return [{"kind": c} if isinstance(c, str) else c for c in value] if short else value

    @field_validator("prompts")
    @classmethod
    def _are_templates(cls, value: list[str]) -> list[str]:
        for text in value:
            placeholders(text, OF_RECORDS)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "MakeConfig":
        if (self.pictures is None) == (self.records is None):
            raise ValueError(f"{BOTH}give either 'pictures' (a folder) or 'records'")
        if self.pictures is not None and not self.prompts and self.objects is None:
            raise ValueError("images have no questions -- add 'prompts'")
        if self.pictures is not None and any(placeholders(p, OF_RECORDS) for p in self.prompts):
            raise ValueError(
                f"images of a folder have no {written(OF_RECORDS)} -- give 'records', or leave it "
                "out of 'prompts'"
            )
        if self.images is not None and self.records is None:
            raise ValueError("'images' is for 'records' -- leave it out")
        for out in self.files:
            if not out.endswith((".jsonl", ".parquet")):
                raise ValueError(f"got out: {out} -- end its name with .jsonl or .parquet")
        if self.why is not None and self.keep != "best":
            raise ValueError(f"'why' explains one answer to each question, and keep is {self.keep} "
                             "-- set keep to best")  # fmt: skip
        if len({c.kind for c in self.checks}) != len(self.checks):
            raise ValueError("two checks are of the same kind -- leave one out")
        self._check_candidates()
        if self.writes == "questions":
            self._check_questions()
        return self

    def _check_questions(self) -> None:
        """Check that what is made can be a question."""
        if not self.prompts and self.objects is None:
            raise ValueError("what answers the records' own questions is no question -- add "
                             "'prompts' that ask for one")  # fmt: skip
        refused = {
            "why": self.why is not None,
            "join": self.join,
            "keep: pair": self.keep == "pair",
            "objects.existence": self.objects is not None and self.objects.existence is not None,
            "agrees": any(c.kind == "agrees" for c in self.checks),
        }
        for key in (key for key, is_there in refused.items() if is_there):
            raise ValueError(f"{key!r} is for answers, and this entry writes questions -- leave it "
                             "out")  # fmt: skip
        if all(c.kind != "cut" for c in self.checks):
            raise ValueError(
                "a question that was cut off cannot be answered -- add the check 'cut'"
            )

    def _check_candidates(self) -> None:
        """Check that there are enough candidates to choose from or to compare."""
        if self.keep == "pair":
            if self.distinct is not None:
                raise ValueError("'distinct' compares single texts, and a pair has two -- leave it "
                                 "out")  # fmt: skip
            if self.sampling.n < 2:
                raise ValueError("a pair needs two answers or more -- set sampling.n to 4")
            if not any(c.scores for c in self.checks):
                kinds = CHECKS.built_in.items()
                known = ", ".join(sorted(k for k, c in kinds if getattr(c, "scores", False)))
                raise ValueError(f"a pair needs a check that scores answers -- add one of {known}")
        for check in self.checks:
            if check.kind == "agrees" and self.sampling.n < 2:
                raise ValueError("'agrees' compares answers -- set sampling.n to 2 or more")
            if (check.compares or check.kind == "objects") and self.records is None:
                raise ValueError(f"{check.kind!r} reads records -- give 'records', or leave it out")
            if check.compares and (self.prompts or self.objects):
                raise ValueError(
                    f"{check.kind!r} compares with the record's own answer, which is none to "
                    "'prompts' or 'objects' -- change it, or make them in another entry"
                )
        if self.join and (self.keep != "best" or all(c.kind != "cut" for c in self.checks)):
            raise ValueError("'join' needs 'keep: best' and the check 'cut' -- change them")
        if len(set(self.by)) != len(self.by):
            raise ValueError("'by' names a model twice -- name it once")

    @property
    def models(self) -> list[str]:
        """Names of the models that answer or judge, each once."""
        judges = [name for check in self.checks for name in check.models]
        return list(dict.fromkeys([*self.by, *judges]))

    @property
    def finds_hard(self) -> bool:
        """Whether a check looks for hard questions."""
        return any(check.finds_hard for check in self.checks)

    @property
    def files(self) -> list[str]:
        """The files that it writes."""
        return [self.out, *([] if self.why is None else [self.why.out])]

    @property
    def source(self) -> dict[str, str | None]:
        """The data source that its file is: keys of a `SourceConfig`."""
        return {"train": self.out, "images": self.pictures or self.images}


def check_makers(make: dict[str, MakeConfig], teachers: list[str], servers: list[str]) -> None:
    """Check the models that are to answer and to judge.

    Args:
        make: entries of the recipe.
        teachers, servers: names of the recipe's teachers, and of its models on servers.

    Raises:
        ValueError: a name is unknown or has two meanings, a judge rates its own answers, or two
            entries write the same file.
    """
    names = [*teachers, STUDENT]
    if taken := [s for s in servers if s in names]:
        raise ValueError(f"a server has the name {taken[0]!r} of another model -- rename it")
    known = [*names, *servers]
    for entry, config in make.items():
        for name in config.models:
            if name not in known:
                raise ValueError(
                    f"make.{entry} asks {name!r}, which is no model of the recipe -- "
                    f"{nearest(name, known)}"
                )
        for check in config.checks:
            try:
                check.check_makers(config.by)
            except ValueError as error:
                raise ValueError(f"make.{entry}: {error}") from error
        _check_compared(entry, make)
        if f"{entry}{WHY}" in make and config.why is not None:
            raise ValueError(
                f"make.{entry}{WHY} is the name of another entry's rationales -- rename it"
            )
    files = [os.path.normpath(file) for config in make.values() for file in config.files]
    if len(set(files)) != len(files):
        raise ValueError("two entries of 'make' write the same file -- give each its own 'out'")


def _check_compared(entry: str, make: dict[str, MakeConfig]) -> None:
    """Check that no model rates an answer next to one that it has made in another entry.

    Raises:
        ValueError: one does.
    """
    config = make[entry]
    judges = {name for check in config.checks if check.compares for name in check.models}
    for name, other in make.items():
        if config.records in (other.out, f"{MADE}{name}"):
            for own in (maker for maker in other.by if maker in judges):
                raise ValueError(
                    f"make.{entry}: {own!r} would judge its own answers, of make.{name} -- name "
                    "another model"
                )
