"""The models of `mmkd data score`: teachers of a recipe, its first student, and folders."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from mmkd.cache import processor_hash
from mmkd.errors import RecipeError, nearest
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import ModelConfig, Recipe, TeacherConfig
from mmkd.runtime.fields import NAME, NAMED
from mmkd.runtime.hashes import weights_hash
from mmkd.students import converted_processor, student_at
from mmkd.teachers import LiveTeacher
from mmkd.teachers.placement import place_teacher

STUDENT = "student"
OPTION = "--model"


@dataclass(frozen=True)
class ScoredModel:
    """A model that scores records.

    Attributes:
        name: in the columns of the file.
        source: folder or Hub id, or a description.
        request: everything that determines the model, as JSON.
        processor: makes its processor.
        load: loads it on a device.
        spread: its weights may be sharded, so that all processes must run it together.
    """

    name: str
    source: str
    request: dict[str, Any]
    processor: Callable[[], Any]
    load: Callable[[torch.device], LiveTeacher]
    spread: bool = False


def scored_models(recipe: Recipe, names: Sequence[str]) -> list[ScoredModel]:
    """The models that score records.

    Args:
        recipe: with a teacher and a student.
        names: names of teachers, `student`, or NAME=FOLDER; none for all teachers of the recipe
            that have weights, and the student.

    Raises:
        RecipeError: there is no such model, or two have the same name.
    """
    known = {t.name: _teacher(t) for t in recipe.teachers if t.source != "self" and _has_weights(t)}
    if STUDENT in known and (not names or STUDENT in names):
        raise RecipeError(
            f"a teacher and the student have the name {STUDENT!r}",
            where="teacher.name",
            hint="give the teacher another name",
        )
    known.setdefault(STUDENT, _student(recipe))
    found = [_named(name, known) for name in names] if names else list(known.values())
    if len({model.name for model in found}) != len(found):
        raise RecipeError(
            "two models have the same name", where=OPTION, hint="write NAME=FOLDER with other names"
        )
    return found


def _has_weights(teacher: TeacherConfig) -> bool:
    return teacher.model is not None or teacher.config is not None


def _named(said: str, known: dict[str, ScoredModel]) -> ScoredModel:
    name, equals, folder = said.partition("=")
    if not equals:
        if name not in known:
            raise RecipeError(f"no model {name!r}", where=OPTION, hint=nearest(name, list(known)))
        return known[name]
    if not re.match(NAMED, name) or len(name) > NAME or not folder:
        raise RecipeError(
            f"got {said!r}",
            where=OPTION,
            hint="write NAME=FOLDER, with letters, digits, _ and - in the name",
        )
    return _from(name, ModelConfig(model=folder))


def _from(name: str, config: ModelConfig, **facts: Any) -> ScoredModel:
    return ScoredModel(
        name,
        config.model or "random weights",
        {**_facts(config), **facts},
        lambda: load_processor(config),
        lambda device: LiveTeacher(load_model(config), device),
    )


def _facts(config: ModelConfig) -> dict[str, Any]:
    return {**config.model_dump(mode="json"), "weights": weights_hash(config.model)}


def _teacher(config: TeacherConfig) -> ScoredModel:
    return ScoredModel(
        config.name,
        config.model or "random weights",
        {
            "weights": weights_hash(config.model),
            **config.model_dump(mode="json", exclude={"weight", "sources", "source", "cache"}),
        },
        lambda: load_processor(config),
        lambda device: place_teacher(load_model(config), config.placement, device),
        spread=True,
    )


def _student(recipe: Recipe) -> ScoredModel:
    """The student before the first stage, with the conversions before it."""
    config, changes = recipe.student, [c.model_dump(mode="json") for c in recipe.stages[0].convert]

    def load(device: torch.device) -> LiveTeacher:
        student: PreTrainedModel = student_at(recipe, 0)
        return LiveTeacher(student, device)

    made = bool(changes or config.convert)
    return ScoredModel(
        STUDENT,
        (config.model or "random weights") + (", converted" if made else ""),
        {**_facts(config), "seed": recipe.seed, "converted": changes},
        lambda: converted_processor(config),
        load,
    )


def tokenizer_hash(processor: Any) -> str:
    """A hash of the tokens of a processor's tokenizer."""
    words = sorted(processor.tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def request_of(model: ScoredModel, processor: Any) -> dict[str, Any]:
    """Everything that determines a model's scores of given records, as JSON."""
    return {"name": model.name, "model": model.request, "processor": processor_hash(processor)}
