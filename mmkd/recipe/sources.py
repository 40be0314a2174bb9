"""Settings of the data: one source of records, or a mixture of several."""

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mmkd.recipe.base import BOTH, LocalPath, Strict
from mmkd.recipe.selection import AnySelectionConfig
from mmkd.runtime.fields import MOST, NAME, Prose

HUB = "hub:"
PATTERN = set("*?[{")
NOT_OF_STREAMS = (
    "'leave_out' is not for streams, whose records are not known before they are read -- "
    "leave 'leave_out' or 'stream' out"
)


class SourceConfig(Strict):
    """A source of records, and its share of an epoch."""

    train: LocalPath = Field(
        description="file, glob, folder or tar shards of records, or hub:OWNER/NAME"
    )
    images: LocalPath | None = Field(None, description="folder that image paths are relative to")
    name: str | None = Field(
        None,
        min_length=1,
        max_length=NAME * 2,
        description="name in metrics and messages; by default made from 'train'",
    )
    weight: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="share of an epoch, relative to the other sources; by default all records once",
    )
    cap: int | None = Field(
        None, ge=1, le=MOST, description="largest number of its records in an epoch"
    )
    subset: str | None = Field(None, description="configuration of a Hub data set")
    split: str = Field("train", description="of a Hub data set")
    revision: str | None = Field(None, description="of a Hub data set: commit, tag or branch")
    stream: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="train on this many first records of a Hub data set while they are downloaded",
    )
    window: int = Field(
        10_000,
        ge=1,
        le=MOST,
        description="records of a stream that are read together and shuffled",
    )
    prompt: Prose = Field(
        "Describe the image.",
        description="the question for captions without one (KEY.txt of a tar shard)",
    )
    leave_out: LocalPath | None = Field(
        None,
        description="file of records that are not trained on, from `mmkd data check --drop`",
    )
    ignore: list[str] = Field(
        [],
        description="keys of records and turns that are left out, such as a video that is "
        "not needed",
    )
    select: AnySelectionConfig | None = Field(
        None, description="train on a part of its records; by default on all"
    )

    @model_validator(mode="after")
    def _of_the_hub(self) -> "SourceConfig":
        fields = type(self).model_fields
        keys = ("subset", "split", "revision", "stream", "window")
        told = [k for k in keys if getattr(self, k) != fields[k].default]
        if told and not self.train.startswith(HUB):
            raise ValueError(f"'{told[0]}' is for Hub data sets -- write train as hub:OWNER/NAME")
        if "window" in told and self.stream is None:
            raise ValueError("'window' is for streams -- set 'stream' to a number of records")
        if self.leave_out is not None and self.stream is not None:
            raise ValueError(NOT_OF_STREAMS)
        if self.select is not None and self.stream is not None:
            raise ValueError(
                "'select' needs all records before training, and a stream has a few of them -- "
                "leave 'stream' out"
            )
        return self

    @property
    def label(self) -> str:
        """Its name in metrics and messages."""
        if self.name is not None:
            return self.name
        if self.train.startswith(HUB):
            return self.train.removeprefix(HUB)
        return self.train if PATTERN & set(self.train) else Path(self.train).stem or self.train


class DomainSampling(Strict):
    """Shares of the sources that follow the student's gap to the teacher on each of them (DDK)."""

    kind: Literal["domain"] = Field(description="rule by which they change")
    every: int = Field(1000, ge=1, le=MOST, description="steps between changes of the shares")
    alpha: float = Field(
        0.5, ge=0, le=1, description="weight of the gaps; the rest is the same for all sources"
    )
    held_out: int = Field(
        500,
        ge=1,
        le=MOST,
        description="records of each source on which the gap is measured; they are not trained on",
    )


ONLY_TRAINING = ("weight", "cap", "stream", "window", "leave_out", "select")
"""Keys of a source that are for training only."""


class HeldOutConfig(Strict):
    """Held-out records, on which a stage measures its losses. Written as a file, a share or a list
    of sources."""

    written_short: ClassVar[str] = "sources"

    share: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="share of each training source's records, the same records in every run",
    )
    sources: list[SourceConfig] = Field([], description="other records, instead of a share")

    @model_validator(mode="after")
    def _one_kind(self) -> "HeldOutConfig":
        if (self.share is None) == (not self.sources):
            raise ValueError(f"{BOTH}give either 'share' or 'sources'")
        names = [s.label for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name -- give each a 'name'")
        fields = SourceConfig.model_fields
        told = [
            k
            for k in ONLY_TRAINING
            if any(getattr(s, k) != fields[k].default for s in self.sources)
        ]
        if told:
            raise ValueError(
                f"'{told[0]}' is only for training: validation reads the same records each time "
                "-- leave it out"
            )
        return self


class DataConfig(Strict):
    """Records to train on, from one source or a mixture."""

    train: LocalPath | None = Field(
        None, description="file, glob, folder or tar shards of records, or hub:OWNER/NAME"
    )
    images: LocalPath | None = Field(None, description="folder that image paths are relative to")
    sources: list[SourceConfig] = Field([], description="a mixture, instead of 'train'")
    leave_out: LocalPath | None = Field(
        None,
        description="file of records that are not trained on, from `mmkd data check --drop`; for "
        "all sources that name none",
    )
    select: AnySelectionConfig | None = Field(
        None, description="train on a part of the records of 'train'; by default on all"
    )
    sampling: DomainSampling | None = Field(
        None, description="change the shares of the sources in training; by default they are fixed"
    )
    validation: HeldOutConfig | None = Field(
        None,
        description="held-out records: as 'train', a share of the training records such as 0.05, "
        "or a list of sources",
    )
    max_length: int = Field(
        2048, ge=8, le=10**7, description="largest number of tokens of a sequence, images included"
    )
    on_bad_record: Literal["stop", "skip"] = Field(
        "stop", description="what to do with a record that cannot be used; skip: use another one"
    )
    workers: int = Field(0, ge=0, le=256, description="processes that prepare batches ahead")
    image_cache: LocalPath | None = Field(
        None, description="folder in which the outputs of the image processors are stored"
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_of_a_source(cls, said: Any) -> Any:
        own = set(SourceConfig.model_fields) - set(cls.model_fields)
        found = [key for key in said if key in own] if isinstance(said, dict) else []
        if found:
            raise ValueError(
                f"'{found[0]}' is a key of a source -- write sources: [{{train: ..., "
                f"{found[0]}: ...}}]"
            )
        return said

    @field_validator("validation", mode="before")
    @classmethod
    def _held_out(cls, said: Any) -> Any:
        if isinstance(said, str):
            return {"sources": [{"train": said}]}
        if isinstance(said, list):
            return {"sources": said}
        if isinstance(said, dict) and not {"share", "sources"} & {*said}:
            return {"sources": [said]}
        if isinstance(said, int | float):
            if isinstance(said, bool) or not 0 < said < 1:
                raise ValueError(
                    f"got {said} -- give a file, or a share of the training records between 0 and 1"
                )
            return {"share": said}
        return said

    @model_validator(mode="after")
    def _one_kind(self) -> "DataConfig":
        if (self.train is None) == (not self.sources):
            raise ValueError(f"{BOTH}give either 'train' (one source) or 'sources' (a mixture)")
        if self.select is not None and self.sources:
            raise ValueError(
                "'select' is for 'train', and there are 'sources' -- move it into a source"
            )
        names = [s.label for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name -- give each a 'name'")
        if len({s.weight is None for s in self.sources}) > 1:
            raise ValueError(
                "some sources have a 'weight' -- give every source a 'weight', or none"
            )
        if self.sampling is not None:
            self._check_sampling()
        share = self.validation is not None and self.validation.share is not None
        if share and any(s.stream is not None for s in self.sources):
            raise ValueError(
                "a share of a stream cannot be held out -- give 'validation' a file or a data set"
            )
        if self.leave_out is not None and any(s.stream is not None for s in self.sources):
            raise ValueError(NOT_OF_STREAMS)
        return self

    def _check_sampling(self) -> None:
        """Check that the shares of the sources can change."""
        if len(self.sources) < 2:
            raise ValueError("'sampling' changes the shares of sources -- give two or more sources")
        fields = SourceConfig.model_fields
        for key, why in {
            "weight": "decides the shares",
            "cap": "draws as many records as the shares say",
            "stream": "holds records out, and a stream has a few of them at a time",
        }.items():
            if any(getattr(s, key) != fields[key].default for s in self.sources):
                raise ValueError(f"'sampling' {why} -- leave '{key}' of the sources out")

    @property
    def parts(self) -> list[SourceConfig]:
        """The sources, one or more, with the folders of their images."""
        if self.train is not None:
            return [
                SourceConfig(
                    train=self.train,
                    images=self.images,
                    leave_out=self.leave_out,
                    select=self.select,
                )
            ]
        own = {"images": self.images, "leave_out": self.leave_out}
        return [
            s.model_copy(update={key: getattr(s, key) or value for key, value in own.items()})
            for s in self.sources
        ]

    @property
    def validation_parts(self) -> list[SourceConfig]:
        """The sources of held-out records, with the folders of their images. With a share, these
        are the sources of the training records."""
        if self.validation is None:
            return []
        if self.validation.share is not None:
            return self.parts
        own = self.validation.sources
        return [s.model_copy(update={"images": s.images or self.images}) for s in own]

    @property
    def held_out_share(self) -> float | None:
        """Share of the training sources' records that is held out; None without a share."""
        return None if self.validation is None else self.validation.share

    @property
    def records_apart(self) -> int:
        """Records of each source that `sampling` does not train on."""
        return 0 if self.sampling is None else self.sampling.held_out

    def without_selection(self) -> "DataConfig":
        """The same data with all records of each source."""
        sources = [s.model_copy(update={"select": None}) for s in self.sources]
        return self.model_copy(update={"select": None, "sources": sources})
