"""`mmkd data check`: what is wrong with the data of a recipe or a file, before training starts."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from mmkd.commands.check_twins import TwinOptions, find_twins, records_key, twin_sides
from mmkd.commands.find_twins import wanted_texts
from mmkd.commands.twins_report import print_twins
from mmkd.data.bounds import scaled_edge
from mmkd.data.check import PLACES, Findings, Look, check_source
from mmkd.data.encoder import Encoder
from mmkd.data.fingerprints import Wanted
from mmkd.data.mixture import Mixture
from mmkd.data.records import Records
from mmkd.data.truncation import needs_answers, no_answer_left
from mmkd.errors import DataError, RecipeError
from mmkd.making.used import check_made
from mmkd.modeling.loading import load_processor
from mmkd.recipe import DataConfig, Recipe, SourceConfig, StageConfig, load_recipe
from mmkd.runtime.progress import console
from mmkd.students import converted_processor

RECIPES = (".yaml", ".yml")
SAMPLED = 256
UNCUT = 2**30


def check_data(
    target: str, images: str | None, look: Look, workers: int, twins: TwinOptions | None = None
) -> dict[str, Any]:
    """Look through all data of a recipe, or through one source.

    Args:
        target: a recipe, or what `data.train` may be.
        images: the folder of a source's images.
        look: what for.
        workers: processes.
        twins: how to look for twins of images; None for not at all.

    Returns:
        What was found, as JSON.

    Raises:
        MmkdError: the recipe, a processor or a single source cannot be read at all.
    """
    recipe = processor = teacher_processor = None
    if Path(target).suffix in RECIPES:
        if images is not None:
            raise RecipeError(
                "--images is for a file, a recipe names its own",
                where=target,
                hint="leave --images out",
            )
        recipe = load_recipe(target)
        check_made(recipe, _data(recipe))
        processor = converted_processor(recipe.student)
        teacher = recipe.teacher
        if teacher is not None and teacher.source == "live":  # all others need the student's
            teacher_processor = load_processor(teacher)
        look = replace(look, edges=_edges(processor, teacher_processor))
    sources = _sources(recipe) if recipe else [SourceConfig(train=target, images=images)]
    sides = []
    if twins is not None:
        sides = twin_sides(twins, recipe, _data(recipe) if recipe else [], sources, target)
        look = replace(look, fingerprints=Wanted(wanted_texts(sides)))
    started = time.perf_counter()
    found: list[Findings] = []
    unreadable: list[DataError] = []
    for source in sources:
        try:
            asked = replace(look, answers=_needs_answers(recipe, source))
            found.append(check_source(source, asked, workers))
        except DataError as error:
            if len(sources) == 1:
                raise
            unreadable.append(error)
    same = None
    if twins is not None and not unreadable:
        same = find_twins(twins, _data(recipe) if recipe else [], found, sides)
    seconds = time.perf_counter() - started
    bad = sum(f.bad for f in found)
    tokens = []
    if recipe and not unreadable:
        tokens = list(_tokens(recipe, processor, teacher_processor))
    lost = any(t["without answer"] for t in tokens)
    twice = same is not None and same["training"]["records to leave out"]
    return {
        "target": target,
        "good": bad == 0 and not (unreadable or lost or twice),
        "unreadable": [str(error) for error in unreadable],
        "records": sum(f.records for f in found),
        "pictures": sum(f.pictures for f in found),
        "bad": bad,
        "seconds": round(seconds, 3),
        "sources": [_as_json(f) for f in found],
        "tokens": tokens,
        **({} if twins is None else {"twins": same}),
    }


def _edges(*processors: Any) -> tuple[int, ...]:
    """The lengths that processors scale shorter edges of images to; None for no processor."""
    found = {scaled_edge(p) for p in processors if p is not None}
    return tuple(sorted(edge for edge in found if edge is not None))


def _stages(recipe: Recipe) -> list[tuple[StageConfig, DataConfig]]:
    """All stages with all records of their data, those of the assistant first."""
    first = recipe.assistant
    before = [(s, s.data or first.data or recipe.data) for s in first.stages] if first else []
    stages = [*before, *((stage, recipe.stage_data(stage)) for stage in recipe.stages)]
    return [(stage, data.without_selection()) for stage, data in stages]


def _data(recipe: Recipe) -> list[DataConfig]:
    """The data sets that a stage reads, each once."""
    return list({data.model_dump_json(): data for _, data in _stages(recipe)}.values())


def _sources(recipe: Recipe) -> list[SourceConfig]:
    """The sources of all data sets, each once whatever its share."""
    found: dict[str, SourceConfig] = {}
    for part in (p for data in _data(recipe) for p in [*data.parts, *data.validation_parts]):
        found.setdefault(records_key(part), part)
    return list(found.values())


def _needs_answers(recipe: Recipe | None, source: SourceConfig) -> bool:
    """Whether a stage that reads a source, or a validation, needs answers."""
    if recipe is None:
        return True
    return any(
        source in data.validation_parts
        or (source in data.parts and not s.samples_all and any(map(needs_answers, s.objectives)))
        for s, data in _stages(recipe)
    )


def _as_json(found: Findings) -> dict[str, Any]:
    problems = sorted(found.problems.values(), key=lambda p: -p.records)
    return {
        "name": found.source.label,
        "train": found.source.train,
        "records": found.records,
        "pictures": found.pictures,
        "bad": found.bad,
        "problems": [
            {
                "kind": p.kind,
                "records": p.records,
                "share": p.records / found.records,
                "places": p.places,
                "hint": p.hint,
            }
            for p in problems
        ],
    }


def _tokens(
    recipe: Recipe, processor: Any, teacher_processor: Any | None
) -> Iterator[dict[str, Any]]:
    """For each data set, how long some of its records are before they are cut at `max_length`, and
    which of them lose their whole answer, for the student or for the teacher."""
    for data in _data(recipe):
        records = Records(data)
        stages = [stage for stage, own in _stages(recipe) if own == data]
        objectives = [o for stage in stages for o in stage.objectives]
        whole, cut = (
            Encoder.of(
                objectives,
                data.model_copy(update={"max_length": limit, "on_bad_record": "stop"}),
                processor,
                teacher_processor=teacher_processor,
                records=records,
            )
            for limit in (UNCUT, data.max_length)
        )
        found = {i: whole.length(i) for i in Mixture(records, recipe.seed).sample(SAMPLED)}
        lengths = [n for n in found.values() if n]  # 0: a bad record, counted already
        lost = [i for i, n in found.items() if n and cut.loses_answer(i)]
        if lengths:
            marks = torch.tensor(lengths).double().quantile(torch.tensor([0.5, 0.95]).double())
            yield {
                "data": ", ".join(part.label for part in data.parts),
                "sampled": len(lengths),
                "median": round(float(marks[0])),
                "95 %": round(float(marks[1])),
                "longest": max(lengths),
                "max_length": data.max_length,
                "cut": sum(n > data.max_length for n in lengths) / len(lengths),
                "without answer": len(lost),
                "places": [records.where(i) for i in lost[:PLACES]],
            }


def print_check(found: dict[str, Any]) -> None:
    """A table of problems for each source that has any, the first places, and the whole."""
    for source in found["sources"]:
        if source["problems"]:
            console.print(_table(source))
            for place in (place for p in source["problems"] for place in p["places"]):
                console.print(escape(place), highlight=False, soft_wrap=True)
    if "twins" in found:
        print_twins(found["twins"])
    for tokens in found["tokens"]:
        console.print(
            f"{escape(tokens['data'])}: of {tokens['sampled']} records the median has "
            f"{tokens['median']:,} tokens, 95 % have at most {tokens['95 %']:,}, the longest "
            f"{tokens['longest']:,}; {100 * tokens['cut']:.1f} % are cut at max_length "
            f"{tokens['max_length']:,}",
            highlight=False,
            soft_wrap=True,
        )
        if tokens["without answer"]:
            error = no_answer_left(tokens["max_length"])
            for place in tokens["places"]:
                console.print(escape(f"{place}: {error.what}"), highlight=False, soft_wrap=True)
    for message in found["unreadable"]:
        console.print(escape(message), highlight=False, soft_wrap=True)
    rate = found["records"] / max(found["seconds"], 1e-9)
    console.print(
        f"{found['records']:,} records, {found['pictures']:,} images, {found['seconds']:.1f} s "
        f"({rate:,.0f} records a second): {_verdict(found)}",
        highlight=False,
        soft_wrap=True,
    )


def _verdict(found: dict[str, Any]) -> str:
    bad, parts = found["bad"], []
    if bad:
        parts.append(f"{bad:,} bad ({_percent(bad / found['records'])})")
    if lost := sum(tokens["without answer"] for tokens in found["tokens"]):
        sampled = sum(tokens["sampled"] for tokens in found["tokens"])
        parts.append(
            f"{lost:,} of {sampled:,} sampled records lose their whole answer -- raise "
            "data.max_length, use smaller images, or drop them"
        )
    own = (found.get("twins") or {}).get("training", {})
    if twice := own.get("records to leave out"):
        parts.append(f"{twice:,} training records have twins in held-out records or tasks")
    if found["unreadable"]:
        unreadable = f"{len(found['unreadable'])} of the sources cannot be read"
        parts = [*(parts or ["all good"]), unreadable]
    return "; ".join(parts or ["all good"])


def _table(source: dict[str, Any]) -> Table:
    table = Table(title=escape(source["train"]))
    table.add_column("problem")
    table.add_column("records", justify="right")
    table.add_column("share", justify="right")
    table.add_column("how to fix it")
    for problem in source["problems"]:
        share = _percent(problem["share"])
        hint = escape(problem["hint"] or "")
        table.add_row(escape(problem["kind"]), f"{problem['records']:,}", share, hint)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %" if share >= 5e-5 or share == 0 else "< 0.01 %"
