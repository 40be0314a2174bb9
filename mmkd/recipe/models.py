"""The parts of a recipe with their defaults."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from mmkd.errors import RecipeError, nearest
from mmkd.objectives import AnyObjectiveConfig
from mmkd.recipe.base import Strict
from mmkd.recipe.conversions import Conversion
from mmkd.recipe.sources import DataConfig

Precision = Literal["float32", "bfloat16", "auto"]
TeacherPlacement = Literal["auto", "replicated", "sharded", "offload"]


class ModelConfig(Strict):
    """Where a model comes from: a folder or Hub id, or an architecture with random weights."""

    model: str | None = Field(None, description="folder or Hub id")
    config: dict[str, Any] | None = Field(
        None, description="a Hugging Face config (with model_type) to start from random weights"
    )
    processor: str | None = Field(None, description="folder or Hub id; the model's own if left out")
    revision: str | None = Field(None, description="commit, tag or branch on the Hub")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    trust_remote_code: bool = Field(False, description="run Python code that the model brings")

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        self._check_source()
        return self

    def _check_source(self) -> None:
        if (self.model is None) == (self.config is None):
            raise ValueError("give either 'model' (folder or Hub id) or 'config' (random weights)")
        if self.config is not None and self.processor is None:
            raise ValueError("a model from 'config' needs 'processor', a folder or Hub id")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("'config' needs 'model_type', such as llava or qwen2_5_vl")

    @property
    def processor_source(self) -> str:
        return self.processor or self.model or ""


class CacheConfig(Strict):
    """A teacher's output distributions on disk."""

    folder: str
    k: int = Field(34, ge=1, description="tokens kept of each distribution, and the rest's mass")
    hidden: bool = Field(
        False, description="keep final hidden states too, for relation and affinity, in 16 bits"
    )


class TeacherConfig(ModelConfig):
    """The frozen model that signals come from."""

    name: str = Field(
        "teacher", pattern=r"^[A-Za-z0-9_-]+$", description="of one of several, in metrics"
    )
    weight: float = Field(1.0, gt=0, description="of one of several: factor of its objectives")
    sources: list[str] = Field(
        [], description="names of the data sources that it is asked about; all if left out"
    )

    source: Literal["live", "cache", "self"] = Field(
        "live",
        description="live: resident beside the student; cache: read from what `mmkd cache` stored; "
        "self: the student as it was before the stage, with adapters the student without them",
    )
    cache: CacheConfig | None = Field(None, description="where `mmkd cache` stores, and how much")
    placement: TeacherPlacement = Field(
        "auto",
        description="replicated: whole on every process; sharded: spread over them; offload: on "
        "the CPU, each layer fetched when it runs (both need DeepSpeed); auto: by size",
    )

    def _check_source(self) -> None:
        if self.source == "self":
            if self.model is not None or self.config is not None:
                raise ValueError("'source: self' is the student itself: leave 'model' out")
            return
        if self.source == "live" or self.model is not None or self.config is not None:
            super()._check_source()
        if self.source == "cache" and self.cache is None:
            raise ValueError("'source: cache' needs 'cache', with the folder of what was stored")


class StudentConfig(ModelConfig):
    """The model that is trained, and how its structure changes before the first stage."""

    convert: list[Conversion] = Field([], description="changes of its structure, in order")


class OptimizerConfig(Strict):
    """Weight decay is not applied to vectors (norms and biases)."""

    kind: Literal["adamw", "adam", "sgd", "adafactor"] = "adamw"
    lr: float = Field(2e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    max_grad_norm: float = Field(1.0, ge=0, description="0 switches clipping off")


class ScheduleConfig(Strict):
    """Learning rate over the steps of a stage."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    decay: float = Field(0.2, ge=0, lt=1, description="share of the steps at the end, for wsd")
    min_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate / lr")


SIZE = 8


class BatchConfig(Strict):
    """One optimizer step sees size x accumulate x processes records, or `total` on any number."""

    size: int = Field(SIZE, ge=1, description="records per process and micro-step")
    accumulate: int = Field(1, ge=1, description="micro-steps per optimizer step")
    group_by_length: bool = Field(
        True, description="put a step's records of alike length into one micro-batch"
    )
    pack: int | None = Field(
        None,
        ge=1,
        description="records of a micro-batch lie one behind another in rows of at most so many "
        "tokens, and none sees another",
    )
    total: int | None = Field(
        None, ge=1, description="records per optimizer step; in place of accumulate"
    )
    tokens: int | None = Field(
        None,
        ge=1,
        description="in place of size, with total: tokens of a micro-batch at most, padding too",
    )

    @model_validator(mode="after")
    def _one_count(self) -> "BatchConfig":
        if self.total is not None and self.accumulate != 1:
            raise ValueError("give either 'accumulate' or 'total'")
        if self.tokens is not None and self.size != SIZE:
            raise ValueError("give either 'size' or 'tokens'")
        if self.tokens is not None and self.total is None:
            raise ValueError("'tokens' needs 'total', the records of an optimizer step")
        return self

    def records_per_step(self, processes: int) -> int:
        """Records per optimizer step.

        Raises:
            RecipeError: `total` does not divide.
        """
        if self.total is None:
            return self.size * self.accumulate * processes
        least = processes * (self.size if self.tokens is None else 1)
        if self.total % least:
            size = "" if self.tokens is not None else f"size {self.size} x "
            raise RecipeError(
                f"total {self.total} is no multiple of {size}{processes} processes",
                where="stages.batch",
                mend="change one of them",
            )
        return self.total

    def micro_steps(self, processes: int) -> int | None:
        """Micro-steps per optimizer step; None where `tokens` decides it step by step."""
        if self.tokens is not None:
            return None
        return self.records_per_step(processes) // (self.size * processes)

    def micro_batch(self, length: float) -> float:
        """Records of a micro-batch, if they are of `length` tokens."""
        return self.size if self.tokens is None else max(1.0, self.tokens / length)


class CheckpointConfig(Strict):
    """When a stage saves what it needs to resume."""

    every: int = Field(200, ge=1, description="steps")
    keep: int = Field(1, ge=1, description="newest checkpoints that stay on disk")


class EngineConfig(Strict):
    """What runs forward, backward and step."""

    kind: Literal["torch", "deepspeed"] = "torch"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    zero: int | None = Field(
        None, ge=0, le=3, description="ZeRO stage of deepspeed; its file's, or 2, if left out"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="keep optimizer states (zero >= 1), or weights too (zero 3), on the CPU"
    )
    config: str | None = Field(None, description="a DeepSpeed file; the recipe fills in the rest")
    head_memory: int = Field(
        112, ge=1, description="MiB for the logits of a chunk of rows, and what is made of them"
    )
    head_backend: Literal["auto", "torch"] = Field(
        "auto", description="of losses on the head's output; auto: a Triton kernel on CUDA"
    )
    patience: float = Field(
        1800.0,
        gt=0,
        description="seconds that a process waits for the others before it gives up; the largest "
        "of all stages counts",
    )

    @model_validator(mode="after")
    def _of_deepspeed(self) -> "EngineConfig":
        given = [n for n in ("zero", "config") if getattr(self, n) is not None]
        given += ["offload"] * (self.offload != "none")
        if self.kind == "torch" and given:
            raise ValueError(f"{given[0]!r} is of kind deepspeed, and the engine's kind is torch")
        return self


class SamplingConfig(Strict):
    """How answers are sampled from a model."""

    max_new_tokens: int = Field(128, ge=1)
    temperature: float = Field(1.0, ge=0, description="0: the likeliest token always")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: all tokens")


class OnPolicyConfig(SamplingConfig):
    """A share of the responses is the student's own (GKD)."""

    lmbda: float = Field(0.5, ge=0, le=1, description="share of responses that it samples")


class LoraConfig(Strict):
    """Low-rank adapters beside the linear layers of some groups, whose own weights stay as they
    are."""

    groups: list[str] = Field(
        ["language_model"], min_length=1, description="the head gets one only by its own name"
    )
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1, description="adapters count alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what enters adapters")
    dora: bool = Field(False, description="train each output's scale apart (DoRA)")
    keep: bool = Field(
        False, description="write the adapters too, in peft's format, beside the merged student"
    )

    @model_validator(mode="after")
    def _head_without_dropout(self) -> "LoraConfig":
        if self.dropout and "head" in self.groups:
            raise ValueError("the head's adapter takes no dropout: its losses see weights only")
        return self


class TrainConfig(Strict):
    """What trains: groups of parameters, whole, and adapters. A list names groups."""

    groups: list[str] = Field([], description="groups of parameters that train whole")
    lora: LoraConfig | None = Field(None, description="adapters in place of more of them")

    @model_validator(mode="after")
    def _something(self) -> "TrainConfig":
        if not self.groups and self.lora is None:
            raise ValueError("nothing trains: name groups, or add 'lora'")
        return self

    @property
    def words(self) -> str:
        """What trains, for tables."""
        if self.lora is None:
            return ", ".join(self.groups)
        kind = "DoRA" if self.lora.dora else "LoRA"
        adapters = f"{kind} of rank {self.lora.rank} in {' + '.join(self.lora.groups)}"
        return ", ".join([*self.groups, adapters])


class StageConfig(Strict):
    """One training run: what trains, on which data, against which objectives."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    convert: list[Conversion] = Field([], description="changes of the student's structure before")
    train: TrainConfig = Field(
        TrainConfig(groups=["all"]), description="groups of parameters by name, or with adapters"
    )
    data: DataConfig | None = Field(None, description="the recipe's data if left out")
    objectives: list[AnyObjectiveConfig] = Field(min_length=1)
    on_policy: OnPolicyConfig | None = Field(None, description="train on the student's answers")
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    batch: BatchConfig = BatchConfig()
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    precision: Precision = Field(
        "float32", description="of matrix products; auto: bfloat16 where the device multiplies it"
    )
    activation_checkpointing: bool = False

    @field_validator("train", mode="before")
    @classmethod
    def _named_groups(cls, value: Any) -> Any:
        return {"groups": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one_length(self) -> "StageConfig":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either 'steps' or 'epochs'")
        names = [o.name or o.kind for o in self.objectives]
        if len(set(names)) != len(names):
            raise ValueError("two objectives have the same name: give each a 'name'")
        return self


class EvaluateConfig(Strict):
    """lmms-eval on the finished students and the teacher."""

    tasks: list[str] = Field(min_length=1)
    include: str | None = Field(None, description="folder of lmms-eval task files")
    batch_size: int = Field(32, ge=1)
    limit: int | None = Field(None, ge=1, description="documents per task")
    teacher: bool = Field(True, description="score the teacher too")
    every_stage: bool = Field(False, description="score what each stage made, not only the last")
    decode: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="context lengths at which decoding is timed, with the cache's size"
    )


TrackerName = Literal["tensorboard", "wandb", "trackio"]


def _trackers(value: Any) -> Any:
    """`none`, one name or a list of them, as a list."""
    names = value if isinstance(value, list) else [] if value in (None, "none") else [value]
    for name in names:
        if name not in get_args(TrackerName):
            raise ValueError(f"no tracker {name!r}, {nearest(str(name), get_args(TrackerName))}")
    return list(dict.fromkeys(names))


ReportTo = Annotated[
    list[TrackerName],
    BeforeValidator(
        _trackers, json_schema_input_type=TrackerName | Literal["none"] | list[TrackerName]
    ),
]


class ReleaseConfig(Strict):
    """How `mmkd release` publishes a finished student on the Hub."""

    repo: str | None = Field(
        None, pattern=r"^[\w.-]+/[\w.-]+$", description="repository on the Hub, such as me/student"
    )
    private: bool = Field(False, description="private; false leaves it to the Hub's own default")
    license: str | None = Field(None, description="the Hub's name for it, such as apache-2.0")
    datasets: list[str] = Field([], description="Hub ids of the data that it was trained on")
    language: list[str] = Field([], description="ISO 639 codes, such as en")
    tags: list[str] = Field([], description="tags beside mmkd and distillation")


class Recipe(Strict):
    """A whole run: teacher, student, data, stages, evaluation, release."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    label: str = Field("student", pattern=r"^[A-Za-z0-9_-]+$", description="name in the tables")
    seed: int = Field(42, ge=0)
    output_dir: str = Field("runs", description="the run is written to output_dir/name")
    report_to: ReportTo = Field(
        [], description="charts beside metrics.jsonl: tensorboard, wandb, trackio, a list or none"
    )
    teacher: TeacherConfig | None = Field(None, description="or a list of several")
    more_teachers: list[TeacherConfig] = Field([], description="the others of a list")
    student: StudentConfig
    data: DataConfig
    stages: list[StageConfig] = Field(min_length=1)
    evaluate: EvaluateConfig | None = None
    release: ReleaseConfig | None = None
    variants: dict[str, list[str]] = Field(
        {}, description="label -> overrides; each is trained beside the recipe, from the same start"
    )
    seeds: list[int] = Field([], description="train everything once per seed; [seed] if left out")

    @model_validator(mode="before")
    @classmethod
    def _several_teachers(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("teacher"), list):
            return raw
        first, *others = raw["teacher"] or [None]
        return {**raw, "teacher": first, "more_teachers": others}

    @property
    def teachers(self) -> list[TeacherConfig]:
        """All of them, the first one first."""
        return [] if self.teacher is None else [self.teacher, *self.more_teachers]

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if len({t.name for t in self.teachers}) != len(self.teachers):
            raise ValueError("two teachers have the same name: give each a 'name'")
        if self.more_teachers and any(t.source != "live" for t in self.teachers):
            raise ValueError("of several teachers each has to run ('source: live')")
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("two stages have the same name")
        if self.label in self.variants:
            raise ValueError(f"a variant has the recipe's own label {self.label!r}")
        return self

    def stage_data(self, stage: StageConfig) -> DataConfig:
        return stage.data or self.data
