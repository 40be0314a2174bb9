"""Read, merge, override and check recipes. Each mistake is reported in one line."""

from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mmkd.errors import HINT, RecipeError, nearest
from mmkd.objectives import OBJECTIVES
from mmkd.recipe.answer_checks import CHECKS
from mmkd.recipe.conversions import CONVERSIONS, LAYER_SELECTION_TAGS
from mmkd.recipe.making import MakeConfig
from mmkd.recipe.merge import merged, with_key
from mmkd.recipe.models import Recipe, StudentConfig
from mmkd.recipe.paths import resolved, resolved_override
from mmkd.recipe.release import ReleaseConfig
from mmkd.recipe.renamed import Path as KeyPath
from mmkd.recipe.renamed import rename, rename_override
from mmkd.redact import find_secret_within
from mmkd.runtime.fields import wanted
from mmkd.runtime.formats import FormatError, parse_yaml
from mmkd.runtime.registry import Registry

M = TypeVar("M", bound=BaseModel)
SHOWN: dict[type, str] = {dict: "a mapping", list: "a list"}
REGISTRIES: dict[int | str, Registry[Any]] = {
    "objectives": OBJECTIVES,
    "convert": CONVERSIONS,
    "checks": CHECKS,
}
"""Whose classes the entries of a list are settings of, by the list's key."""


def load_recipe(source: str | Path | dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """Read, merge, override and check a recipe.

    Args:
        source: YAML file, or an already loaded mapping.
        overrides: `key.path=value`, values in YAML; list items by index (`stages.0.steps=5`).

    Old names of keys (`mmkd.recipe.renamed`) are replaced, with a note in the log.

    Raises:
        RecipeError: in one line, the file, the key and the hint.
    """
    where = str(source) if not isinstance(source, dict) else "recipe"
    if isinstance(source, dict):
        raw, folder = _with_new_names(source, where), None
    else:
        raw, folder = _load_file(Path(source), ()), Path(source).parent
    for override in overrides or []:
        override = _override_with_new_names(override)
        if folder is not None:
            override = resolved_override(override, folder, Recipe)
        raw = _override(raw, override)
    return _validate(Recipe, raw, where)


def load_written(raw: dict[str, Any]) -> Recipe:
    """Check a recipe that an earlier version of mmkd may have written. Old names of keys are
    replaced without a note, because the user did not write them.

    Raises:
        RecipeError: in one line, the key and the hint.
    """
    return load_recipe(rename(raw, report=lambda note: None))


def load_student(raw: dict[str, Any], overrides: list[str] | None = None) -> StudentConfig:
    """Read the settings of a student without a recipe, as `mmkd convert` needs them.

    Raises:
        RecipeError: in one line, the key and the hint.
    """
    raw = _with_new_names(raw, "student", ("student",))
    for override in overrides or []:
        raw = _override(raw, _override_with_new_names(override, ("student",)))
    return _validate(StudentConfig, raw, "student")


def load_release(raw: dict[str, Any], overrides: list[str] | None = None) -> ReleaseConfig:
    """Read the settings of a release without a recipe, as `mmkd release` needs them.

    Raises:
        RecipeError: in one line, the key and the hint.
    """
    for override in overrides or []:
        raw = _override(raw, override)
    return _validate(ReleaseConfig, raw, "release")


def load_make(raw: dict[str, Any], where: str) -> MakeConfig:
    """Read an entry of `make` without a recipe, as `mmkd data pairs` needs it.

    Raises:
        RecipeError: in one line, the key and the hint.
    """
    return _validate(MakeConfig, raw, where)


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _load_file(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    where = str(path)
    if not _is_file(path):
        raise RecipeError("no such recipe file", where=where, hint="check the path")
    if path.resolve() in parents:
        raise RecipeError("'extends' goes in a circle", where=where, hint="break the circle")
    try:
        raw = parse_yaml(path.read_bytes())
    except FormatError as error:
        raise RecipeError(f"not YAML: {error}", where=where, hint="fix the syntax") from error
    if not isinstance(raw, dict):
        raise RecipeError("a recipe is a mapping of keys", where=where, hint="see configs/")
    base = raw.pop("extends", None)
    if not isinstance(base, str | None):
        raise RecipeError(
            f"got {_shown(base)}", where=f"{where}: extends", hint="name one recipe file"
        )
    raw = resolved(_with_new_names(raw, where), path.parent, Recipe)
    if base is None:
        return raw
    below = _load_file(path.parent / base, (*parents, path.resolve()))
    try:
        return merged(below, raw)
    except ValueError as error:
        key, _, what = str(error).partition(": ")
        raise RecipeError(
            what, where=f"{where}: {key}", hint=f"write what {base} and this file give together"
        ) from error


def _with_new_names(raw: dict[str, Any], where: str, path: KeyPath = ()) -> dict[str, Any]:
    try:
        return dict(rename(raw, path))
    except ValueError as error:
        key, _, said = str(error).partition(": ")
        what, _, hint = said.partition(HINT)
        raise RecipeError(what, where=f"{where}: {key}", hint=hint) from error


def _override_with_new_names(override: str, path: KeyPath = ()) -> str:
    try:
        return rename_override(override, path)
    except ValueError as error:
        what, _, hint = str(error).partition(": ")[2].partition(HINT)
        raise RecipeError(what, where=override, hint=hint) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for a disk
        return False


def _shown(value: Any) -> str:
    """A value in a message, shortened."""
    known = SHOWN.get(type(value))
    text = known or (str(value).lower() if isinstance(value, bool) else repr(value))
    return text if len(text) <= 200 else f"{text[:200]}..."


def _override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError("an override is written key.path=value", where=override, hint="add '='")
    try:
        return with_key(raw, key, parse_yaml(text))
    except FormatError as error:
        what = f"the value is no YAML: {error}"
        raise RecipeError(what, where=override, hint="quote the value") from error
    except ValueError as error:
        raise RecipeError(str(error), where=override, hint="check the key and the value") from error


def _validate(form: type[M], raw: dict[str, Any], where: str) -> M:
    if (found := find_secret_within(raw)) is not None:
        key, what = found
        raise RecipeError(
            f"it seems to be {what}, and recipes are copied into reports and releases",
            where=f"{where}: {key}",
            hint="take it out; tokens come from 'hf auth login' or variables such as HF_TOKEN",
        )
    try:
        return form.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in _without_tags(raw, first["loc"])) or "recipe"
        said = first["msg"].removeprefix("Value error, ")
        # The hint is the last part: a value in front of it may hold anything.
        message, hint = said.rsplit(HINT, 1) if HINT in said else (said, "")
        if first["type"] == "extra_forbidden":
            message = "unknown key"
            known = _added_keys(raw, first["loc"]) or _known_keys(form, first["loc"])
            hint = nearest(str(first["loc"][-1]), known)
        elif first["type"] == "missing":
            message, hint = "this key is missing", "add it"
        elif first["type"] == "union_tag_not_found":
            message, hint = "the key 'kind' is missing", "add it"
        elif first["type"] == "union_tag_invalid":
            context = first["ctx"]
            kind = context["discriminator"].strip("'")
            message = f"unknown {kind} {_shown(context['tag'])}"
            known = [k.strip().strip("'") for k in context["expected_tags"].split(",")]
            hint = nearest(str(context["tag"]), known)
        elif not hint:
            given = first["input"]
            hint = wanted(first)
            message = f"got {_shown(given)}"
        raise RecipeError(message, where=f"{where}: {key}", hint=hint or None) from error


def _without_tags(raw: Any, location: tuple[int | str, ...]) -> list[int | str]:
    """The path of keys in the YAML, without the union tags that pydantic adds."""
    path: list[int | str] = []
    node = raw
    for part in location:
        if part in LAYER_SELECTION_TAGS:
            continue
        if isinstance(node, dict) and part not in node and part == node.get("kind"):
            continue
        path.append(part)
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    return path


def _added_keys(raw: Any, location: tuple[int | str, ...]) -> list[str]:
    """Keys that may stand where the unknown one does, in settings of a class from outside; none
    if the unknown key is elsewhere."""
    node = raw
    for place, part in enumerate(location[:-1]):
        above = location[place - 1] if place else ""
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            return []
        if above in REGISTRIES and isinstance(node, dict):
            kind = node.get("kind")
            added = REGISTRIES[above].settings_of(kind) if isinstance(kind, str) else None
            return [] if added is None else _known_keys(added, location[place + 1 :])
    return []


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
