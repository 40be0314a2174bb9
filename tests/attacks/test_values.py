"""Every key of a recipe has bounds. Values outside of them are refused."""

import math
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from mmkd.objectives.settings import SETTINGS
from mmkd.recipe import Recipe
from mmkd.runtime.fields import TEXT, Bounded, ProseKey, _kinds

STAGE: dict[str, Any] = {"name": "s", "steps": 1, "objectives": [{"kind": "ce"}]}
DATA = {"train": "a.json"}
GOOD: dict[str, dict[str, Any]] = {
    "Recipe": {"name": "r", "student": {"model": "m"}, "data": DATA, "stages": [STAGE]},
    "StageConfig": STAGE,
    "DataConfig": DATA,
    "HeldOutConfig": {"share": 0.5},
    "ImageSizeConfig": {"split": True},
    "ModelConfig": {"model": "m"},
    "TeacherConfig": {"model": "m"},
    "StudentConfig": {"model": "m"},
    "SamplesConfig": {"images": "folder"},
    "EvaluateConfig": {"tasks": ["pope"]},
    "ValidationConfig": {"keep": "best"},
    "EngineConfig": {"kind": "deepspeed"},
    "TrainConfig": {"groups": ["all"]},
    "MambaConfig": {"kind": "mamba", "layers": "all"},
    "AssistantConfig": {"student": {"model": "x"}, "stages": [STAGE]},
    "EnsembleConfig": {"normalize": True},
    "MoeConfig": {"kind": "moe", "experts": 4096},
    "SourceConfig": {"train": "hub:a/b", "stream": 9},
    "RobustSelection": {"kind": "robust", "scores": "x", "model": "x", "keep": 0.5},
    "DifferenceSelection": {"kind": "difference", "scores": "x", "large": "x", "small": "y"},
    "StageTeacherConfig": {"name": "x"},
    "MakeConfig": {"pictures": "x", "prompts": ["x"], "out": "x.jsonl"},
    "RationaleConfig": {"out": "x.jsonl"},
    "ContextConfig": {"system": "x"},
    "ObjectQuestionsConfig": {"existence": {}},
    "JudgeConfig": {"kind": "judge", "by": ["x"]},
    "ServerConfig": {"server": "http://x/v1", "model": "x"},
}
NUMBERS: list[Any] = [
    True,
    False,
    math.inf,
    -math.inf,
    math.nan,
    1e300,
    -1e300,
    10**18,
    -(10**18),
    "many",
    {},
]
TEXTS = [
    "x" * (TEXT + 1),
    "a\0b",
    "a\x1b[2Jb",
    "a\u2028b",
    "a\u202eb",
    "a\ud800b",
    1,
    True,
    [1],
    {},
]


def models() -> list[type[BaseModel]]:
    """All settings that a recipe has."""
    found: dict[str, type[BaseModel]] = {}
    todo: list[type[BaseModel]] = [Recipe, *SETTINGS]
    while todo:
        model = todo.pop()
        if model.__name__ not in found:
            found[model.__name__] = model
            for field in model.model_fields.values():
                todo += inner_models(field.annotation)
    return list(found.values())


def inner_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in get_args(annotation) for m in inner_models(part)]


def good(model: type[BaseModel]) -> dict[str, Any]:
    if model.__name__ in GOOD:
        return GOOD[model.__name__]
    required = {k: f.annotation for k, f in model.model_fields.items() if f.is_required()}
    return {k: example(annotation) for k, annotation in required.items()}


def example(annotation: Any) -> Any:
    if str(get_origin(annotation)) == "typing.Literal":
        return get_args(annotation)[0]
    return {int: 1, str: "x"}.get(annotation, [1])


def wrapped(annotation: Any, value: Any) -> Any:
    """A value as a key takes it: alone, or in a list."""
    kinds = [get_origin(a) or a for a in (annotation, *get_args(annotation))]
    if dict in kinds:
        return {"a": [value]}
    if tuple in kinds:
        return [value, 0.5]
    return [value] if list in kinds else value


INFINITE = ("AlmConfig", "temperature")
"""The one number that may be infinite."""
KEYS = [
    (model, name, hostile)
    for model in models()
    for name in model.model_fields
    for wanted, values in (({int, float}, NUMBERS), ({str}, TEXTS))
    for hostile in values
    if _kinds(model, name) & wanted and Any not in _kinds(model, name)
    if (model.__name__, name) != INFINITE or hostile != math.inf
]


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_the_good_settings_are_good(model):
    assert issubclass(model, Bounded)
    model.model_validate(good(model))


@pytest.mark.parametrize(("model", "name"), sorted({(m, n) for m, n, _ in KEYS}, key=str))
def test_a_key_refuses_what_is_past_its_bounds(model, name):
    for _, _, hostile in [k for k in KEYS if k[:2] == (model, name)]:
        field = model.model_fields[name]
        value = wrapped(field.annotation, hostile)
        with pytest.raises(ValidationError) as caught:
            model.model_validate({**good(model), name: value})
        first = caught.value.errors()[0]
        assert name in first["loc"] or repr(name) in first["msg"], (hostile, first)


def test_prose_may_have_lines():
    assert any(ProseKey in _kinds(m, n) for m in models() for n in m.model_fields)


def test_every_number_of_the_schema_has_two_bounds():
    def walk(node: Any, path: str) -> list[str]:
        if isinstance(node, list):
            return [p for i, n in enumerate(node) for p in walk(n, f"{path}.{i}")]
        if not isinstance(node, dict):
            return []
        found = [p for key, n in node.items() for p in walk(n, f"{path}.{key}")]
        if node.get("type") in ("integer", "number") and not {"enum", "const"} & {*node}:
            low = {"minimum", "exclusiveMinimum"} & {*node}
            high = {"maximum", "exclusiveMaximum"} & {*node}
            found += [] if low and high else [path]
        return found

    assert walk(Recipe.model_json_schema(), "") == []
