"""What models make for a run, and when (`make`)."""

from collections.abc import Sequence
from typing import Any

from mmkd.errors import MmkdError
from mmkd.making.questions import open_questions
from mmkd.making.state import is_made
from mmkd.making.used import made_before, made_for
from mmkd.recipe import MakeConfig, Recipe, read_entry
from mmkd.runs.members import Member


def plan_made(members: Sequence[Member]) -> list[dict[str, Any]]:
    """A row for each file that models make before the first stage, and for each entry that they
    make before later stages: "entry", "before" (names of stages; [] before the first one), "by",
    "judges", "reads" (the entry whose records are asked about, or None), "questions" and "answers"
    (None if they are not known yet), and "made" (whether it is up to date)."""
    found: dict[Any, dict[str, Any]] = {}
    for member in members:
        recipe = member.recipe
        for name, config in made_before(recipe).items():
            found.setdefault(config.out, _row(recipe, name) | {"made": is_made(recipe, name)})
        for index, stage in enumerate(recipe.stages):
            for name, config in made_for(recipe, index).items():
                key = (name, config.model_dump_json())
                row = found.setdefault(key, _row(recipe, name) | {"made": False})
                if stage.name not in row["before"]:
                    row["before"].append(stage.name)
    return list(found.values())


def _row(recipe: Recipe, name: str) -> dict[str, Any]:
    config = recipe.make[name]
    questions = _questions(config, f"make.{name}")
    return {
        "entry": name,
        "before": [],
        "by": config.by,
        "judges": [model for model in config.models if model not in config.by],
        "reads": read_entry(config, recipe.make),
        "questions": questions,
        "answers": None if questions is None else questions * config.sampling.n,
    }


def _questions(config: MakeConfig, where: str) -> int | None:
    """Number of questions; None if they are not there yet, or depend on what a model lists."""
    if config.objects is not None:
        return None
    try:
        return len(open_questions(config, where))
    except MmkdError:
        return None


def made_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line of text for each row of `plan_made`."""
    return [f"data: {row['entry']}, {_what(row)}, {_when(row)}" for row in rows]


def _what(row: dict[str, Any]) -> str:
    by = ", ".join(row["by"]) + (f" (judge {', '.join(row['judges'])})" if row["judges"] else "")
    if row["before"] and row["reads"] is not None:
        return f"answers by {by} to the questions of {row['reads']}"
    if row["questions"] is None:
        return f"answers by {by}"
    return f"{row['questions']:,} questions, {row['answers']:,} answers by {by}"


def _when(row: dict[str, Any]) -> str:
    if row["before"]:
        again = "; made again before each" if row["before"][1:] else ""
        return f"before {', '.join(row['before'])}{again}"
    return "made already" if row["made"] else "before the first stage"
