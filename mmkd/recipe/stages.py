"""A stage of a recipe and its parts, with their defaults."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mmkd.objectives import AnyObjectiveConfig
from mmkd.recipe.base import BOTH, Strict
from mmkd.recipe.conversions import AnyConversionConfig
from mmkd.recipe.sources import DataConfig
from mmkd.recipe.stage_teacher import StageTeacherConfig
from mmkd.recipe.training import (
    BatchConfig,
    CheckpointConfig,
    EngineConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from mmkd.runtime.fields import LEAST_TEMPERATURE, MOST, NAME, NAMED

Precision = Literal["float32", "bfloat16", "auto"]


class ValidationConfig(Strict):
    """Validation on the held-out records of `data.validation`."""

    interval: int | None = Field(
        200,
        ge=1,
        le=MOST,
        description="steps between validations, with one after the last step; null: no "
        "validation in this stage",
    )
    records: int | None = Field(
        512,
        ge=1,
        le=MOST,
        description="largest number of records, evenly spread and the same each time; null: all",
    )
    size: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="records per process and forward; by default as in the stage's batch",
    )
    metric: str = Field(
        "loss",
        max_length=NAME,
        description="compared by 'keep' and 'patience', lower is better: loss, answer_ce, "
        "teacher_kl or an objective's name",
    )
    keep: Literal["last", "best"] = Field(
        "last", description="the student that the stage writes: of its last step or its best one"
    )
    patience: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="stop the stage after this many validations in a row without a new best value",
    )

    @model_validator(mode="after")
    def _used(self) -> "ValidationConfig":
        fields = type(self).model_fields
        own = ("metric", "keep", "patience")
        told = [k for k in own if getattr(self, k) != fields[k].default]
        if told and self.interval is None:
            raise ValueError(
                f"{told[0]!r} needs validations -- set 'interval' to a number of steps"
            )
        if self.metric != "loss" and self.keep == "last" and self.patience is None:
            raise ValueError("'metric' is only for 'keep: best' and 'patience' -- set one of them")
        return self


STEP_METRICS = frozenset(
    {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "supervised_tokens",
        "skipped",
        "padding",
        "sampled",
        "corrected",
        "corrected_at",
        "sources",
        "mixture",
        "expert_load",
        "seconds",
    }
)
"""Keys of a step's metrics in addition to its objectives."""

ANSWER_CE, TEACHER_KL = "answer_ce", "teacher_kl"
VALIDATION_METRICS = frozenset({ANSWER_CE, TEACHER_KL, "records", "best"})
"""Keys of a validation's metrics in addition to those of a step."""


class SamplingConfig(Strict):
    """How answers are sampled from a model."""

    max_new_tokens: int = Field(
        128, ge=1, le=10**6, description="largest number of tokens of an answer"
    )
    temperature: float = Field(1.0, ge=0, le=1e3, description="0: greedy decoding")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="nucleus sampling: total probability of the tokens that are sampled from",
    )
    top_k: int = Field(0, ge=0, le=MOST, description="0: all tokens")

    @field_validator("temperature")
    @classmethod
    def _divides(cls, value: float) -> float:
        if 0 < value < LEAST_TEMPERATURE:
            raise ValueError(
                f"got {value}, which is too small -- give 0 for greedy decoding, or at least "
                f"{LEAST_TEMPERATURE}"
            )
        return value


class OnPolicyConfig(SamplingConfig):
    """A share of the responses is sampled from the student (GKD)."""

    lmbda: float = Field(
        0.5, ge=0, le=1, description="share of responses that are sampled from the student"
    )
    correct: int = Field(
        0,
        ge=0,
        le=100,
        description="how often the teacher replaces a token of each sampled answer, from which the "
        "student continues (SCRG); 0: never",
    )

    @model_validator(mode="after")
    def _corrects_some(self) -> "OnPolicyConfig":
        if self.correct and not self.lmbda:
            raise ValueError("'correct' needs sampled answers -- set 'lmbda' above 0")
        return self


class ImageTokensConfig(Strict):
    """A random part of the image tokens is left out, the same in student and teachers."""

    keep: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of each record's image tokens on which the decoders run, drawn anew in "
        "each step",
    )


class LoraConfig(Strict):
    """Low-rank adapters for the linear layers of some groups. The layers' weights are frozen."""

    groups: list[str] = Field(
        ["language_model"],
        min_length=1,
        description="parameter groups whose linear layers get adapters; fully trained "
        "groups are skipped, and the output head must be named explicitly",
    )
    rank: int = Field(16, ge=1, le=10**6, description="rank of the adapters")
    alpha: int = Field(
        32, ge=1, le=10**6, description="the adapters' output is scaled by alpha / rank"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the adapters' inputs")
    dora: bool = Field(False, description="also train the magnitude of each output (DoRA)")
    keep: bool = Field(
        False,
        description="also write the adapters in peft's format, in addition to the merged student",
    )

    @model_validator(mode="after")
    def _head_without_dropout(self) -> "LoraConfig":
        if self.dropout and "head" in self.groups:
            raise ValueError(
                "the head's adapter cannot have dropout, because losses read its weight -- set it "
                "to 0, or leave 'head' out"
            )
        return self


class TrainConfig(Strict):
    """Trainable parameters: groups and adapters. A list contains names of groups."""

    groups: list[str] = Field([], description="parameter groups of which all weights train")
    lora: LoraConfig | None = Field(None, description="adapters for further groups")

    @model_validator(mode="after")
    def _something(self) -> "TrainConfig":
        if not self.groups and self.lora is None:
            raise ValueError("nothing is trained -- name groups, or add 'lora'")
        return self

    @property
    def words(self) -> str:
        """A description for tables."""
        if self.lora is None:
            return ", ".join(self.groups)
        kind = "DoRA" if self.lora.dora else "LoRA"
        adapters = f"{kind} of rank {self.lora.rank} in {' + '.join(self.lora.groups)}"
        return ", ".join([*self.groups, adapters])


class EnsembleConfig(Strict):
    """How the divergences of a stage weigh several teachers."""

    normalize: bool = Field(
        False,
        description="divide the teachers' weights by their sum over the teachers of each record; "
        "the mean is then over the tokens of all records that have a teacher",
    )
    kappa: float | None = Field(
        None,
        ge=1e-3,
        le=1e6,
        description="weigh the teachers by token: in proportion to exp(-CE / kappa), with each "
        "teacher's cross-entropy of the next token; computes each teacher's logits once more",
    )

    @model_validator(mode="after")
    def _something(self) -> "EnsembleConfig":
        if not self.normalize and self.kappa is None:
            raise ValueError("nothing is set -- add 'normalize: true' or 'kappa'")
        return self


class StageConfig(Strict):
    """One training run: which parameters train, on which data, with which objectives."""

    name: str = Field(max_length=NAME, pattern=NAMED, description="its folder is NN-name")
    convert: list[AnyConversionConfig] = Field(
        [], description="changes of the student's structure before this stage"
    )
    train: TrainConfig = Field(
        TrainConfig(groups=["all"]),
        description="parameter groups that train, by name or with adapters",
    )
    data: DataConfig | None = Field(
        None, description="data of this stage; the recipe's data by default"
    )
    objectives: list[AnyObjectiveConfig] = Field(
        min_length=1, description="losses; their weighted sum is minimised"
    )
    balance_gradients: bool = Field(
        False,
        description="divide the weight of each objective by the norm of its gradient at the "
        "student's final hidden states, in the step before (GradMag)",
    )
    teacher: StageTeacherConfig | None = Field(
        None,
        description="the only teacher of this stage: its name, or `{stage: NAME}` for the student "
        "after an earlier stage; by default all of the recipe's",
    )
    ensemble: EnsembleConfig | None = Field(
        None, description="weights of several teachers; by default those under 'teacher'"
    )
    on_policy: OnPolicyConfig | None = Field(None, description="train on the student's own answers")
    image_tokens: ImageTokensConfig | None = Field(
        None, description="leave out a part of the image tokens in training"
    )
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    steps: int | None = Field(None, ge=1, le=MOST, description="optimizer steps; or give epochs")
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="passes over the data; or give steps"
    )
    rounds: int = Field(
        1,
        ge=1,
        le=100,
        description="train the stage this many times in a row, as NAME-1, NAME-2, ...; data that "
        "ask the student are made again before each",
    )
    precision: Precision = Field(
        "float32",
        description="of matrix products; auto: bfloat16 if the device has hardware for it, "
        "else float32",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute layers in the backward pass to save memory"
    )

    @property
    def samples_all(self) -> bool:
        """Whether all answers are sampled from the student, so that records need none."""
        return self.on_policy is not None and self.on_policy.lmbda == 1

    @field_validator("train", mode="before")
    @classmethod
    def _named_groups(cls, value: Any) -> Any:
        return {"groups": value} if isinstance(value, list) else value

    @field_validator("convert")
    @classmethod
    def _of_any_stage(cls, value: list[AnyConversionConfig]) -> list[AnyConversionConfig]:
        for config in value:
            if config.changes_processor:
                raise ValueError(
                    f"{config.kind!r} changes the processor, which all stages of a student share "
                    "-- put it into student.convert"
                )
        return value

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"{BOTH}give either 'steps' or 'epochs'")
        names = [o.name or o.kind for o in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError("two objectives have the same name -- give each a 'name'")
        if taken := (STEP_METRICS | VALIDATION_METRICS) & {*names}:
            raise ValueError(
                f"an objective has the name of a metric, {min(taken)!r} -- give it another name"
            )
        return self
