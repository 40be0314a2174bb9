"""docs/reference.md: every key of a recipe, from the models that read it.

python -m scripts.reference
"""

import json
from pathlib import Path
from typing import Any

from mmkd.recipe import Recipe
from mmkd.runtime.files import write_text
from mmkd.runtime.progress import console

OUT = Path(__file__).parents[1] / "docs" / "reference.md"
INTRO = """# Recipe reference

Look up here every key of a recipe, with its type, default and meaning. [Concepts](concepts.md)
explains how the parts work together. A key without a default is required. Unknown keys are errors.
Every number also has an upper bound; the page shows those below 100,000, and the JSON schema that
`mmkd recipe schema` prints shows all. `python -m scripts.reference` writes this page from the code
that reads a recipe.
"""
CONVERSIONS, OBJECTIVES, CHECKS = "Conversions", "Objectives", "Checks of answers"
SELECTIONS, FORMS = "Selections", "Forms"
GROUPS = {
    CONVERSIONS: "Entries of `convert`, by `kind`. You can add "
    "[your own](extending.md#a-conversion).",
    OBJECTIVES: "Entries of `objectives`, by `kind`. You can add "
    "[your own](extending.md#an-objective).",
    CHECKS: "Entries of `checks`, by `kind`. A check without settings may be written as its kind.",
    SELECTIONS: "Values of `select`, by `kind`. [Selecting records](selection.md) explains them.",
    FORMS: "Mappings that a key accepts in addition to other values.",
}
# Keys whose entries say their kind.
KINDS = {
    "convert": CONVERSIONS,
    "objectives": OBJECTIVES,
    "loss": OBJECTIVES,
    "checks": CHECKS,
    "select": SELECTIONS,
}
WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false"}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
MOST_TOLD = 10**5
"""Bounds from here on only keep out what no machine can compute: the page leaves them out."""
HEAD = ["| key | type | default | meaning |", "|---|---|---|---|"]
Schema = dict[str, Any]


class Reference:
    """The page: a section for each mapping, after the one that names it first.

    Args:
        schema: a JSON schema whose mappings are in `$defs`.
    """

    def __init__(self, schema: Schema):
        self.definitions: dict[str, Schema] = schema["$defs"]
        self.titles: dict[str, str] = {}
        self.sections: list[str] = []
        self.groups: dict[str, list[str]] = {title: [] for title in GROUPS}
        self._write(self.sections, "## The recipe", schema, "")

    def text(self) -> str:
        """The whole page."""
        grouped = [
            part
            for title, sections in self.groups.items()
            for part in (f"## {title}\n\n{GROUPS[title]}\n", *sections)
        ]
        return "\n".join([INTRO, *self.sections, *grouped])

    def _write(self, into: list[str], heading: str, model: Schema, path: str) -> None:
        place = len(into)
        into.append("")  # mappings that it names come after it
        told = heading.startswith("###")
        keys = [
            (key, schema)
            for key, schema in model["properties"].items()
            if not (told and key == "kind")  # the heading says it
        ]
        rows = []
        for key, schema in keys:
            inner = f"{path}.{key}".removeprefix(".")
            default = "" if key in model.get("required", []) else _default(schema)
            words = (f"`{key}`", self._type(schema, inner, into), default, self._about(schema))
            rows.append(f"| {' | '.join(words)} |".replace("  ", " "))
        into[place] = "\n".join([f"{heading}\n", _sentence(model), "", *HEAD, *rows, ""])

    def _type(self, schema: Schema, path: str, into: list[str]) -> str:
        """A value's type in words; mappings that it names get their sections."""
        schema = _given(schema)
        choices = _choices(schema)
        if "discriminator" in schema:
            return self._kinds(schema, path)
        if len(choices) > 1:
            return " or ".join(self._type(s, "", self.groups[FORMS]) for s in choices)
        (value,) = choices
        if value is not schema:
            return self._type(value, path, into)
        if "$ref" in schema:
            return self._mapping(schema, path, into)
        if "enum" in schema or "const" in schema:
            values = schema.get("enum", [schema.get("const")])
            return ", ".join(f"`{json.dumps(v).strip(chr(34))}`" for v in values)
        if schema["type"] == "array":
            return self._list(schema, path, into)
        if schema["type"] == "object":
            values = schema.get("additionalProperties")
            values = next(iter(schema.get("patternProperties", {}).values()), values)
            typed = isinstance(values, dict)
            return f"names to {self._type(values, path, into)}" if typed else "mapping"
        told = {key: schema[key] for key in LIMITS if abs(schema.get(key, MOST_TOLD)) < MOST_TOLD}
        limits = [f"{LIMITS[key]} {value}" for key, value in told.items()]
        return " ".join([WORDS[schema["type"]], " and ".join(limits)]).strip()

    def _list(self, schema: Schema, path: str, into: list[str]) -> str:
        if "prefixItems" in schema:
            return f"list of {len(schema['prefixItems'])} numbers"
        least = ", one or more" if schema.get("minItems") else ""
        return f"list of {self._type(schema['items'], path, into)}{least}"

    def _mapping(self, schema: Schema, path: str, into: list[str]) -> str:
        name, model = self._definition(schema)
        if name not in self.titles:
            self.titles[name] = path or f"by {next(iter(model['properties']))}"
            level = "##" if into is self.sections else "###"
            self._write(into, f"{level} {self.titles[name]}", model, path)
        return _link(self.titles[name])

    def _kinds(self, schema: Schema, path: str) -> str:
        group = KINDS[path.rpartition(".")[2]]
        for choice in schema["oneOf"]:
            name, model = self._definition(choice)
            if name not in self.titles:
                kind = model["properties"]["kind"]
                names = kind.get("enum") or [kind["const"]]
                self.titles[name] = ", ".join(names)
                self._write(self.groups[group], f"### {self.titles[name]}", model, names[0])
        return _link(group)

    def _about(self, schema: Schema) -> str:
        """What a key is for: its own words, else those of the mapping that it takes."""
        inner = schema.get("items", schema)
        named = [s for s in _choices(inner) if "$ref" in s]
        if "description" not in schema and len(named) == 1:
            return _sentence(self._definition(named[0])[1])
        return schema.get("description", "").replace("|", "\\|")

    def _definition(self, schema: Schema) -> tuple[str, Schema]:
        name = schema["$ref"].rpartition("/")[2]
        return name, self.definitions[name]


def _given(schema: Schema) -> Schema:
    """What a value is if it is not none, where that is one schema."""
    inner = [s for s in schema.get("anyOf", []) if s.get("type") != "null"]
    return inner[0] if len(inner) == 1 and "discriminator" in inner[0] else schema


def _choices(schema: Schema) -> list[Schema]:
    """What a value may be, apart from none."""
    inner = schema.get("anyOf") or schema.get("oneOf")
    if inner is None:
        return [] if schema.get("type") == "null" else [schema]
    return [s for choice in inner for s in _choices(choice)]


def _default(schema: Schema) -> str:
    default = schema["default"]
    if isinstance(default, dict) and default:
        return f"`{default['kind']}`" if "kind" in default else "its defaults"
    return "none" if default is None else f"`{json.dumps(default)}`"


def _sentence(model: Schema) -> str:
    """A mapping's description without line breaks."""
    return " ".join(model["description"].split())


def _link(title: str) -> str:
    kept = (c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")
    return f"[{title}](#{''.join(kept)})"


def reference() -> str:
    """The page's text."""
    return Reference(Recipe.model_json_schema()).text()


if __name__ == "__main__":
    write_text(OUT, reference())
    console.print(f"wrote {OUT}", highlight=False, soft_wrap=True)
