"""The recipe: what a user writes, and the one place that knows defaults.

A recipe is YAML. `extends: other.yaml` (relative to the file) merges over another recipe, dotted
`key.path=value` overrides come last, unknown keys are errors that name the nearest known one.
Paths in a recipe are relative to the working directory.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from mmkd.errors import RecipeError
from mmkd.objectives import AnyObjectiveConfig

M = TypeVar("M", bound=BaseModel)
Precision = Literal["float32", "bfloat16", "auto"]


class Strict(BaseModel):
    """Base of all parts of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


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
        if (self.model is None) == (self.config is None):
            raise ValueError("give either 'model' (folder or Hub id) or 'config' (random weights)")
        if self.config is not None and self.processor is None:
            raise ValueError("a model from 'config' needs 'processor', a folder or Hub id")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("'config' needs 'model_type', such as llava or qwen2_5_vl")
        return self

    @property
    def processor_source(self) -> str:
        return self.processor or self.model or ""


class TeacherConfig(ModelConfig):
    """The frozen model that signals come from."""

    source: Literal["live"] = Field("live", description="live: resident beside the student")


class LayersConversion(Strict):
    """Keep a subset of the layers, in the given order; the width stays."""

    kind: Literal["layers"]
    decoder: list[int] | None = Field(None, description="decoder layers to keep; all if left out")
    vision: list[int] | None = Field(None, description="vision layers to keep; all if left out")


class MlpConversion(Strict):
    """Keep a part of the neurons of every MLP, those with the largest weights."""

    kind: Literal["mlp"]
    decoder: int | None = Field(None, ge=1, description="neurons per decoder layer to keep")
    vision: int | None = Field(None, ge=1, description="neurons per vision layer to keep")


class Every(Strict):
    """Every n-th layer: 0, n, 2n, ..., or the last of each n."""

    every: int = Field(ge=1)
    first: bool = Field(True, description="the first of each n; false: the last")


class Head(Strict):
    """The first layers."""

    head: int = Field(ge=0)


class Tail(Strict):
    """The last layers."""

    tail: int = Field(ge=0)


Layers = list[Annotated[int, Field(ge=0)]]
# Tags for errors to name one form of a placement, not every form that it is not.
_FORMS = {"every": "Every", "head": "Head", "tail": "Tail"}


def _form(value: Any) -> str:
    if isinstance(value, Every | Head | Tail):
        return type(value).__name__
    if isinstance(value, dict):
        return next((tag for key, tag in _FORMS.items() if key in value), "Every")
    return "Layers"


Placement = Annotated[
    Annotated[Layers, Tag("Layers")]
    | Annotated[Every, Tag("Every")]
    | Annotated[Head, Tag("Head")]
    | Annotated[Tail, Tag("Tail")],
    Discriminator(_form),
]
MambaInit = Literal["default", "inherit", "mimic", "exact"]


class MambaConversion(Strict):
    """Attention of some decoder layers becomes a Mamba-2 mixer, seeded from it.

    What is left out of the mixer's form is what the init wants (`mmkd.students.mamba.FORMS`).
    """

    kind: Literal["mamba"]
    keep_attention: Placement | None = Field(None, description="layers that keep their attention")
    layers: Placement | None = Field(None, description="layers that become Mamba")
    init: MambaInit = "mimic"
    d_conv: int | None = Field(None, ge=1, description="taps of the convolution")
    d_state: int | None = Field(None, ge=1, description="state size; the head size if left out")
    activation: Literal["silu", "none"] | None = None
    norm: Literal["head_rms", "none"] | None = None
    gate: Literal["silu", "none"] | None = None
    norm_before_gate: bool | None = None
    rope: bool | None = Field(None, description="rotate keys and queries as the attention did")
    state: Literal["query", "kv"] | None = Field(
        None, description="one state per query head, or one per key-value head"
    )

    @model_validator(mode="after")
    def _one_placement(self) -> "MambaConversion":
        if (self.keep_attention is None) == (self.layers is None):
            raise ValueError("give either 'keep_attention' or 'layers'")
        return self


Conversion = Annotated[
    LayersConversion | MlpConversion | MambaConversion, Field(discriminator="kind")
]


class StudentConfig(ModelConfig):
    """The model that is trained, and how its structure changes before the first stage."""

    convert: list[Conversion] = []


class DataConfig(Strict):
    """Records to train on: LLaVA conversations or chat messages, json, jsonl or parquet."""

    train: str = Field(description="file of records")
    images: str | None = Field(None, description="folder that image paths are relative to")
    max_length: int = Field(2048, ge=8, description="longest sequence in tokens, images included")
    on_bad_sample: Literal["stop", "skip"] = "stop"
    workers: int = Field(0, ge=0, description="processes that prepare batches ahead")


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


class BatchConfig(Strict):
    """One optimizer step sees size x accumulate x processes records."""

    size: int = Field(8, ge=1, description="records per process and micro-step")
    accumulate: int = Field(1, ge=1, description="micro-steps per optimizer step")


class CheckpointConfig(Strict):
    """When a stage saves what it needs to resume."""

    every: int = Field(200, ge=1, description="steps")
    keep: int = Field(1, ge=1, description="newest checkpoints that stay on disk")


class EngineConfig(Strict):
    """What runs forward, backward and step."""

    kind: Literal["torch"] = "torch"
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")


class StageConfig(Strict):
    """One training run: what trains, on which data, against which objectives."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    train: list[str] = Field(["all"], description="groups of parameters by name")
    data: DataConfig | None = Field(None, description="the recipe's data if left out")
    objectives: list[AnyObjectiveConfig] = Field(min_length=1)
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
    decode: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="context lengths at which decoding is timed, with the cache's size"
    )


class Recipe(Strict):
    """A whole run: teacher, student, data, stages, evaluation."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    label: str = Field("student", pattern=r"^[A-Za-z0-9_-]+$", description="name in the tables")
    seed: int = Field(42, ge=0)
    output_dir: str = Field("runs", description="the run is written to output_dir/name")
    teacher: TeacherConfig | None = None
    student: StudentConfig
    data: DataConfig
    stages: list[StageConfig] = Field(min_length=1)
    evaluate: EvaluateConfig | None = None
    variants: dict[str, list[str]] = Field(
        {}, description="label -> overrides; each is trained beside the recipe, from the same start"
    )
    seeds: list[int] = Field([], description="train everything once per seed; [seed] if left out")

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [s.name for s in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("two stages have the same name")
        if self.label in self.variants:
            raise ValueError(f"a variant has the recipe's own label {self.label!r}")
        return self

    def stage_data(self, stage: StageConfig) -> DataConfig:
        return stage.data or self.data


def load_recipe(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """Read, merge, override and check a recipe.

    Args:
        source: YAML file, or an already loaded mapping.
        overrides: `key.path=value`, values in YAML; list items by index (`stages.0.steps=5`).

    Raises:
        RecipeError: in one line, the file, the key and the mend.
    """
    where = str(source) if not isinstance(source, dict) else "recipe"
    raw = dict(source) if isinstance(source, dict) else _load_file(Path(source), ())
    for override in overrides or []:
        raw = _override(raw, override)
    return _validate(Recipe, raw, where)


def load_student(raw: dict[str, Any], overrides: list[str] | None = None) -> StudentConfig:
    """A student alone, as `mmkd convert` makes one: overridden and checked like a recipe's.

    Raises:
        RecipeError: in one line, the key and the mend.
    """
    for override in overrides or []:
        raw = _override(raw, override)
    return _validate(StudentConfig, raw, "student")


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _load_file(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    where = str(path)
    if not path.is_file():
        raise RecipeError("no such recipe file", where=where, mend="check the path")
    if path.resolve() in parents:
        raise RecipeError("'extends' goes in a circle", where=where, mend="break the circle")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"not YAML: {reason}", where=where, mend="mend the syntax") from error
    if not isinstance(raw, dict):
        raise RecipeError("a recipe is a mapping of keys", where=where, mend="see configs/")
    base = raw.pop("extends", None)
    if base is None:
        return raw
    below = _load_file(path.parent / str(base), (*parents, path.resolve()))
    merged = OmegaConf.merge(OmegaConf.create(below), OmegaConf.create(raw))
    return OmegaConf.to_container(merged, resolve=True)  # type: ignore[return-value]


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError("an override is written key.path=value", where=override, mend="add '='")
    try:
        config = OmegaConf.create(raw)
        OmegaConf.update(config, key, yaml.safe_load(text), merge=False, force_add=True)
        return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]
    except (OmegaConfBaseException, yaml.YAMLError, IndexError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(reason, where=override, mend="check the key and the value") from error


def _validate(form: type[M], raw: dict[str, Any], where: str) -> M:
    try:
        return form.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in _without_tags(raw, first["loc"])) or "recipe"
        mend = None
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "unknown key"
            mend = _nearest(str(first["loc"][-1]), _known_keys(form, first["loc"]))
        elif first["type"] == "missing":
            message, mend = "this key is missing", "add it"
        elif first["type"] == "union_tag_invalid":
            context = first["ctx"]
            message = f"unknown {context['discriminator']} '{context['tag']}'"
            known = [k.strip().strip("'") for k in context["expected_tags"].split(",")]
            mend = _nearest(str(context["tag"]), known)
        elif "input" in first and not isinstance(first["input"], (dict, list)):
            message = f"{message}, got {first['input']!r}"
        raise RecipeError(message, where=f"{where}: {key}", mend=mend) from error


def _without_tags(raw: Any, location: tuple[int | str, ...]) -> list[int | str]:
    """The path of keys in the YAML, without the union tags that pydantic adds."""
    path: list[int | str] = []
    node = raw
    for part in location:
        if part in ("Layers", *_FORMS.values()):
            continue
        if isinstance(node, dict) and part not in node and part == node.get("kind"):
            continue
        path.append(part)
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    return path


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def _known_keys(form: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Keys that may stand where the unknown one does."""
    model = form
    for part in location[:-1]:
        candidates = (
            _models_in(model.model_fields[part].annotation)
            if (isinstance(part, str) and part in model.model_fields)
            else None
        )
        if candidates is None:
            continue
        model = candidates[0]
        for candidate in candidates:
            if any(p in _tags(candidate) for p in location):
                model = candidate
    return list(model.model_fields)


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind else ()


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in get_args(annotation) for m in _models_in(argument)]
