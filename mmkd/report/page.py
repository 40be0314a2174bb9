"""The HTML page: one self-contained file. Jinja escapes all texts from a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mmkd.report.calibration import calibration_panels
from mmkd.report.decoding import decoding_table
from mmkd.report.experts import load_tables
from mmkd.report.glossary import glossary
from mmkd.report.made import made_rows
from mmkd.report.metrics import Column, all_columns
from mmkd.report.plots import SERIES, stage_panels
from mmkd.report.rundata import Run
from mmkd.report.samples import choose_samples, held_out_answers, sample_labels, trained_on
from mmkd.report.summary import (
    describe_stage,
    held_out_notes,
    provenance_rows,
    summary,
    warnings,
)
from mmkd.report.tables import (
    Row,
    Table,
    Tables,
    Value,
    format_value,
    metrics_by_task,
    scored_models,
)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """One score as the page shows it."""

    text: str
    spread: str
    style: str


@dataclass(frozen=True)
class Bar:
    """One model's accuracy on one kind of question."""

    label: str
    series: str
    percent: float
    text: str


@dataclass(frozen=True)
class Kind:
    """One kind of question: one bar per model, and the accuracy of a constant answer."""

    name: str
    majority: float
    bars: list[Bar]


def render(run: Run, tables: Tables) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(cell=cell, spans=spans, starts=starts, colour=colour(run))
    return environment.get_template("page.html").render(
        run=run,
        css=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        summary=summary(run, tables),
        warnings=warnings(run),
        tables=tables,
        glossary=glossary(tables.main.columns),
        kinds=[(table.task, kinds(run, table)) for table in tables.kinds],
        has_majority=any(r.role == "baseline" for r in tables.main.rows),
        has_chair=any("chair" in c.key[1] for c in tables.main.columns),
        one_seed=all(len({m.seed for m in run.members if m.group == g}) == 1 for g in run.groups),
        calibration=[
            (kind, [(p.title, Markup(p.svg)) for p in panels])
            for kind, panels in calibration_panels(run).items()
        ],
        decoding=decoding_table(run),
        every_metric=every_metric(run),
        stages=[(s.stage, [(p.title, Markup(p.svg)) for p in s.panels]) for s in stage_panels(run)],
        validated=held_out_notes(run),
        experts=load_tables(run),
        made=made_rows(run),
        students=students(run),
        samples=choose_samples(run),
        held_out=held_out_answers(run),
        trained_on=trained_on(run),
        sample_labels=sample_labels(run),
        provenance=provenance_rows(run),
    )


def colour(run: Run) -> Any:
    """A function from a row's label to the name of its colour in page.css."""

    def name(label: str) -> str:
        groups = run.groups
        return f"series-{groups.index(label) % SERIES}" if label in groups else "teacher"

    return name


def cell(table: Table, row: Row, column: Column) -> Cell:
    """A score as text, with its style: best student, gain or loss."""
    value = row.values.get(column.key)
    text = format_value(value, column.unit, sign=row.role == "difference")
    text, _, spread = text.partition(" ± ")
    spread = spread and f"± {spread}"
    if row.role == "student" and row.label in table.best(column):
        return Cell(text, spread, "best")
    if row.role == "difference" and value and column.better and _beyond_spread(value):
        gain = (value.mean > 0) == (column.better == "higher")
        return Cell(text, spread, "gain" if gain else "loss")
    if value is None and row.role == "baseline":
        return Cell("", "", "")
    return Cell(text, spread, "none" if value is None else "")


def _beyond_spread(value: Value) -> bool:
    return value.std is not None and abs(value.mean) > value.std


def spans(table: Table) -> list[tuple[str, int]]:
    """Groups of neighbouring columns, for the table's upper heading."""
    found: list[tuple[str, int]] = []
    for column in table.columns:
        if found and found[-1][0] == column.group:
            found[-1] = (column.group, found[-1][1] + 1)
        else:
            found.append((column.group, 1))
    return found


def starts(table: Table, index: int) -> str:
    """The class of a column that begins a group."""
    columns = table.columns
    first = index == 0 or columns[index].group != columns[index - 1].group
    return " starts" if first and len(spans(table)) > 1 else ""


def kinds(run: Run, table: Table) -> list[Kind]:
    """The bars of one table by kind of question."""
    baseline = next(r for r in table.rows if r.role == "baseline")
    name = colour(run)
    found = []
    for column in table.columns:
        bars = [
            Bar(
                row.label,
                name(row.label),
                100 * value.mean,
                format_value(value, column.unit),
            )
            for row in table.rows
            if row.role != "baseline" and (value := row.values.get(column.key))
        ]
        found.append(Kind(column.title, 100 * baseline.values[column.key].mean, bars))
    return found


def every_metric(run: Run) -> Table:
    """All metrics of all tasks, models as rows. The page transposes it."""
    models = scored_models(run)
    metrics = metrics_by_task(models)
    columns = [c for task, names in metrics.items() for c in all_columns(task, names)]
    return Table("All metrics", columns, [model.row(columns) for model in models])


def students(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """(label, [(stage, objectives)]) for each student; seeds are merged."""
    found = []
    for group in run.groups:
        member = next(m for m in run.members if m.group == group)
        stages = [(s.name, describe_stage(s.config)) for s in member.stages]
        found.append((group, stages))
    return found
