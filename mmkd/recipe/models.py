"""A recipe and its models, with their defaults."""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from mmkd.errors import nearest
from mmkd.recipe.base import BOTH, LocalPath, Strict
from mmkd.recipe.conversions import AnyConversionConfig
from mmkd.recipe.evaluation import EvaluateConfig
from mmkd.recipe.made import in_order, with_made
from mmkd.recipe.making import MakeConfig, check_makers
from mmkd.recipe.release import ReleaseConfig
from mmkd.recipe.rounds import MOST_STAGES, with_rounds
from mmkd.recipe.servers import ServerConfig
from mmkd.recipe.sources import DataConfig
from mmkd.recipe.stage_teacher import check_stage_teachers
from mmkd.recipe.stages import StageConfig
from mmkd.runtime.fields import (
    FOLDER,
    MOST,
    MOST_SEED,
    NAME,
    NAMED,
)
from mmkd.runtime.run_folder import ASSISTANT, RESERVED, START, TEACHER, stage_name

TeacherPlacement = Literal["auto", "replicated", "sharded", "offload"]
Quantization = Literal["4bit", "8bit"]

OF_THE_RUN = ("name", "output_dir", "label", "seeds", "variants", "evaluate", "release")
"""Keys that are one for all students of a run."""


class ImageSizeConfig(Strict):
    """The size to which a processor scales images, which decides how many image tokens they take.
    A family has some of these settings; the others are refused."""

    max_pixels: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="of an image after resizing (Qwen-VL and similar processors)",
    )
    min_pixels: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="of an image after resizing (Qwen-VL and similar processors)",
    )
    longest_edge: int | None = Field(
        None,
        ge=1,
        le=100_000,
        description="in pixels after resizing (Idefics3, SmolVLM, Pixtral, Mistral3)",
    )
    max_patches: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="tiles of an image (InternVL, LFM2-VL, LLaVA-NeXT, -OneVision)",
    )
    min_patches: int | None = Field(
        None, ge=1, le=1024, description="tiles of an image (InternVL, LFM2-VL)"
    )
    split: bool | None = Field(
        None, description="cut images into tiles (Idefics3, SmolVLM, LFM2-VL)"
    )

    @model_validator(mode="after")
    def _in_order(self) -> "ImageSizeConfig":
        if not self.model_dump(exclude_none=True):
            raise ValueError("it sets nothing -- give a key, such as max_pixels, or leave it out")
        for low, high in (("min_pixels", "max_pixels"), ("min_patches", "max_patches")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} is larger than {high} -- swap them")
        return self


class ModelConfig(Strict):
    """Where a model comes from: a folder or Hub id, or an architecture with random weights."""

    model: LocalPath | None = Field(None, description="folder or Hub id")
    config: dict[str, Any] | None = Field(
        None, description="a Hugging Face config (with model_type) to start from random weights"
    )
    processor: LocalPath | None = Field(
        None, description="folder or Hub id; the model's own by default"
    )
    revision: str | None = Field(None, description="commit, tag or branch on the Hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="data type of the weights"
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa",
        description="attention implementation; `matrix` needs eager where it reads attention",
    )
    trust_remote_code: bool = Field(
        False,
        description="the model contains Python code; it runs only with --trust-remote-code on the "
        "command line",
    )
    image_size: ImageSizeConfig | None = Field(
        None, description="size of images, instead of the processor's own"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        self._check_source()
        return self

    def _check_source(self) -> None:
        if (self.model is None) == (self.config is None):
            either = "give either 'model' (folder or Hub id) or 'config' (random weights)"
            raise ValueError(BOTH + either)
        if self.config is not None and self.processor is None:
            raise ValueError("a model from 'config' has no processor -- add 'processor'")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("'config' names no architecture -- add 'model_type', such as llava")

    @property
    def processor_source(self) -> str:
        return self.processor or self.model or ""


class CacheConfig(Strict):
    """A teacher's output distributions on disk."""

    folder: LocalPath = Field(description="where `mmkd cache` writes")
    k: int = Field(
        34,
        ge=1,
        le=10**7,
        description="most likely tokens that are stored of each distribution, with the "
        "total probability of all others",
    )
    hidden: bool = Field(
        False, description="also store final hidden states in 16 bits, for relation and affinity"
    )


class TeacherConfig(ModelConfig):
    """The frozen model that the student learns from."""

    name: str = Field(
        "teacher",
        max_length=NAME,
        pattern=NAMED,
        description="name in metrics, if there are several",
    )
    weight: float = Field(
        1.0, gt=0, le=1e6, description="factor of the objectives on this teacher's outputs"
    )
    sources: list[str] = Field(
        [], description="names of the data sources on which it is used; all by default"
    )
    source: Literal["live", "cache", "self"] = Field(
        "live",
        description="live: it runs in every step; cache: its outputs are read from what "
        "`mmkd cache` stored; self: the student as it was before the stage "
        "(with adapters, the student without them)",
    )
    cache: CacheConfig | None = Field(
        None, description="where `mmkd cache` stores the outputs, and what it stores"
    )
    placement: TeacherPlacement = Field(
        "auto",
        description="replicated: whole on every process; sharded: split over the processes; "
        "offload: on the CPU, each layer is copied when it runs (both need "
        "DeepSpeed); auto: chosen by size",
    )

    quantize: Quantization | None = Field(
        None,
        description="load the linear layers of its language model in 4 (NF4) or 8 "
        "(LLM.int8) bits; needs a GPU and bitsandbytes",
    )

    def _check_source(self) -> None:
        if self.quantize is not None and self.model is None:
            raise ValueError("'quantize' needs a teacher with weights -- add 'model'")
        if self.quantize is not None and self.placement in ("sharded", "offload"):
            raise ValueError(
                f"placement {self.placement} does not work with 'quantize' -- leave one of them out"
            )
        if self.source == "self":
            if self.model is not None or self.config is not None:
                raise ValueError("'source: self' is the student itself -- leave 'model' out")
            if self.image_size is not None:
                raise ValueError("'source: self' is the student itself -- leave 'image_size' out")
            return
        if self.source == "live" or self.model is not None or self.config is not None:
            super()._check_source()
        if self.source == "cache" and self.cache is None:
            raise ValueError("'source: cache' needs 'cache' -- add it, with its folder")


class StudentConfig(ModelConfig):
    """The model that is trained, and how its structure changes before the first stage."""

    convert: list[AnyConversionConfig] = Field(
        [], description="changes of its structure, applied in this order"
    )


class AssistantConfig(Strict):
    """A student that is trained first, once, and is then the teacher of all other students (a
    teacher assistant)."""

    student: StudentConfig
    stages: list[StageConfig] = Field(
        min_length=1,
        max_length=MOST_STAGES,
        description="its stages; their names differ from all others",
    )
    data: DataConfig | None = Field(None, description="its data; the recipe's by default")


Label = Annotated[str, Field(max_length=NAME, pattern=NAMED)]
TrackerName = Literal["tensorboard", "wandb", "trackio"]


def _trackers(value: Any) -> Any:
    """`none`, one name or a list of them, as a list."""
    names = value if isinstance(value, list) else [] if value in (None, "none") else [value]
    for name in names:
        if name not in get_args(TrackerName):
            raise ValueError(f"no tracker {name!r} -- {nearest(str(name), get_args(TrackerName))}")
    return list(dict.fromkeys(names))


ReportTo = Annotated[
    list[TrackerName],
    BeforeValidator(
        _trackers, json_schema_input_type=TrackerName | Literal["none"] | list[TrackerName]
    ),
]


class Recipe(Strict):
    """A whole run: teacher, student, data, stages, evaluation, release."""

    name: str = Field(
        max_length=NAME,
        pattern=FOLDER,
        description="the run's folder",
    )
    label: str = Field("student", max_length=NAME, pattern=NAMED, description="name in the tables")
    seed: int = Field(
        42, ge=0, le=MOST_SEED, description="decides data order, new weights and sampling"
    )
    output_dir: str = Field("runs", description="the run is written to output_dir/name")
    report_to: ReportTo = Field(
        [],
        description="trackers that also get the numbers of metrics.jsonl: tensorboard, "
        "wandb, trackio, a list of these, or none",
    )
    teacher: TeacherConfig | None = Field(None, description="the teacher, or a list of several")
    more_teachers: list[TeacherConfig] = Field(
        [], description="further teachers; write them as a list under 'teacher'"
    )
    student: StudentConfig
    servers: dict[Label, ServerConfig] = Field(
        {}, description="name -> a model on a server that can answer and judge"
    )
    make: dict[Label, MakeConfig] = Field(
        {},
        description="name -> records that a model makes; data.train and data.validation can be "
        "made:NAME",
    )
    data: DataConfig
    stages: list[StageConfig] = Field(min_length=1, max_length=MOST_STAGES)
    assistant: AssistantConfig | None = None
    evaluate: EvaluateConfig | None = None
    release: ReleaseConfig | None = None
    variants: dict[Label, list[str]] = Field(
        {}, description="label -> overrides; each variant is trained in the same run"
    )
    seeds: list[Annotated[int, Field(ge=0, le=MOST_SEED)]] = Field(
        [], description="train everything once per seed; [seed] by default"
    )

    @model_validator(mode="before")
    @classmethod
    def _several_teachers(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("teacher"), list):
            return raw
        if raw.get("more_teachers"):
            raise ValueError(
                "'teacher' is a list, and 'more_teachers' is given too -- write all teachers in "
                "the list, and overrides as teacher.1.model=..."
            )
        first, *others = raw["teacher"] or [None]
        return {**raw, "teacher": first, "more_teachers": others}

    @property
    def teachers(self) -> list[TeacherConfig]:
        """All teachers, the primary one first."""
        return [] if self.teacher is None else [self.teacher, *self.more_teachers]

    @model_validator(mode="after")
    def _with_made(self) -> "Recipe":
        check_makers(self.make, [t.name for t in self.teachers], list(self.servers))
        self.make = in_order(self.make)
        self.data = with_made(self.data, self.make)
        for part in (
            *self.stages,
            self.assistant,
            *(self.assistant.stages if self.assistant else []),
        ):
            if part is not None and part.data is not None:
                part.data = with_made(part.data, self.make)
        return self

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if len({t.name for t in self.teachers}) != len(self.teachers):
            raise ValueError("two teachers have the same name -- give each a 'name'")
        if self.more_teachers and any(t.source != "live" for t in self.teachers):
            raise ValueError("several teachers must all run -- give each 'source: live'")
        stages = with_rounds(self.stages)
        names = [s.name for s in stages]
        if len(set(names)) != len(names):
            raise ValueError("two stages have the same name -- rename one")
        check_stage_teachers(stages, [t.name for t in self.teachers])
        largest = max([self.seed, *self.seeds])
        first = with_rounds(self.assistant.stages) if self.assistant else []
        count = max(len(stages), len(first))
        if largest + count - 1 > MOST_SEED:  # each stage has a seed of its own
            raise ValueError(
                f"the seed {largest} is too large for {count} stages -- give "
                f"{MOST_SEED - count + 1} or less"
            )
        self._check_labels(names)
        self._check_assistant(names)
        self._check_variants()
        if self.label in self.variants:
            raise ValueError(f"a variant has the recipe's own label {self.label!r} -- rename it")
        return self

    def _check_labels(self, names: list[str]) -> None:
        """Check that labels differ from names of the run's folders and from the teacher's label."""
        labels = [self.label, *self.variants]
        if self.teacher is not None and self.teacher.model is not None and TEACHER in labels:
            raise ValueError(
                f"a student has the label {TEACHER!r}, which its teacher's scores have -- rename it"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("two seeds are the same -- give each once")
        stages = [stage_name(index, name) for index, name in enumerate(names)]
        taken = {*RESERVED, START, *stages} if self.variants and not self.seeds else set()
        if found := sorted(taken & {*labels}):
            raise ValueError(
                f"a student has the label {found[0]!r}, which a folder of the run has -- rename it"
            )

    def _check_assistant(self, stages: list[str]) -> None:
        """Check that an assistant can take the teacher's place, and has names of its own."""
        if self.assistant is None:
            return
        if len(self.teachers) > 1 or any(t.source != "live" for t in self.teachers):
            raise ValueError(
                "with 'assistant' there is at most one teacher, which runs -- name one with "
                "'source: live'"
            )
        if named := [s.name for s in self.stages if s.teacher is not None and s.teacher.name]:
            raise ValueError(
                f"stage {named[0]} names a teacher, and the assistant is the teacher of all "
                "students -- leave it out, or train the assistant in a run of its own"
            )
        if ASSISTANT in [self.label, *self.variants]:
            raise ValueError(
                f"a student has the label {ASSISTANT!r}, which the assistant has -- rename it"
            )
        names = [s.name for s in with_rounds(self.assistant.stages)]
        if len({*names, *stages}) != len(names) + len(stages):
            raise ValueError(
                "two stages of assistant and students have the same name -- rename one"
            )

    def _check_variants(self) -> None:
        """Check that variants change nothing that all students of a run share."""
        for label, overrides in self.variants.items():
            for key in (re.split(r"[.=\[]", override)[0].strip() for override in overrides):
                if key == ASSISTANT:
                    raise ValueError(
                        "a variant changes the assistant, which all students share -- write a "
                        "recipe of its own for it"
                    )
                if key in OF_THE_RUN:
                    raise ValueError(
                        f"the variant {label!r} changes {key!r}, which is one for all students of "
                        "a run -- change it in the recipe, or write a recipe of its own for it"
                    )

    def stage_data(self, stage: StageConfig) -> DataConfig:
        return stage.data or self.data

    def with_rounds(self) -> "Recipe":
        """The recipe whose stages are what a run trains: each round is a stage."""
        return self.model_copy(update={"stages": with_rounds(self.stages)})
