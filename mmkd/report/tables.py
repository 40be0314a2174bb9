"""Tables of scores: one row per model, mean ± standard deviation over seeds, best student marked.

The standard deviation is that of a sample (n - 1). A single seed has none.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, Literal

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from mmkd.report.metrics import (
    COST,
    COSTS,
    HEADLINE,
    VQA_MAJORITY,
    VQA_OVERALL,
    Column,
    Key,
    Unit,
    headline_columns,
    vqa_kinds,
)
from mmkd.report.rundata import Run, Scores, ran_as_long, student_size
from mmkd.report.sizes import compared
from mmkd.runtime.progress import console
from mmkd.runtime.run_folder import TEACHER

Role = Literal["teacher", "student", "stage", "baseline", "difference"]


@dataclass(frozen=True)
class Value:
    """A mean over `n` seeds; `std` is None for one seed."""

    mean: float
    std: float | None = None
    n: int = 1

    @classmethod
    def of(cls, values: Sequence[float]) -> "Value":
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    label: str
    role: Role
    values: dict[Key, Value]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows and columns, before they are drawn in the terminal or on the page."""

    title: str
    columns: list[Column]
    rows: list[Row]
    task: str = ""

    @property
    def of_differences(self) -> bool:
        return any(r.role == "difference" for r in self.rows)

    def best(self, column: Column) -> set[str]:
        """Labels of the best students; empty if there is only one or no direction is better."""
        found = {
            r.label: r.values[column.key].mean
            for r in self.rows
            if r.role == "student" and column.key in r.values
        }
        if column.better is None or len(set(found.values())) < 2:
            return set()
        target = max(found.values()) if column.better == "higher" else min(found.values())
        return {label for label, mean in found.items() if math.isclose(mean, target)}


@dataclass(frozen=True)
class Tables:
    """The tables of a run.

    Attributes:
        main: headline metrics and costs.
        kinds: accuracy by question kind, one table a VQA task.
        differences: the recipe's student minus each comparable variant.
    """

    main: Table
    kinds: list[Table] = field(default_factory=list)
    differences: Table | None = None


@dataclass(frozen=True)
class Scored:
    """All evaluations of one row: `scores` and costs of each seed."""

    label: str
    role: Role
    seeds: dict[int, Scores]

    def row(self, columns: Iterable[Column]) -> Row:
        values = {}
        for column in columns:
            task, metric = column.key
            found = [s[task][metric] for s in self.seeds.values() if metric in s.get(task, {})]
            if found:
                values[column.key] = Value.of(found)
        scored = sum(set(s) != {COST} for s in self.seeds.values())
        count = scored or len(self.seeds)
        return Row(self.label, self.role, values, f"{count} seeds" if count > 1 else "")


def scored_models(run: Run) -> list[Scored]:
    """The teacher, then the students in the recipe's order, each over its seeds and after the
    students of its earlier stages if these were scored."""
    found: list[Scored] = []
    if run.teacher:
        found.append(Scored(TEACHER, "teacher", {0: _with_costs(run.teacher)}))
    for group in run.groups:
        found += _stages(run, group)
        seeds: dict[int, Scores] = {}
        for member in (m for m in run.members if m.group == group):
            if member.label in run.results:
                seeds[member.seed] = _with_costs(run.results[member.label])
            elif size := student_size(member.student):
                cost = dict(zip(("parameters", "weights_bytes"), size, strict=True))
                seeds[member.seed] = {COST: cost}
        if seeds:
            found.append(Scored(group, "student", seeds))
    known = {TEACHER, *(m.label for m in run.members)}
    found += [
        Scored(label, "student", {0: _with_costs(results)})
        for label, results in run.results.items()
        if label.partition("@")[0] not in known
    ]
    return found


def _stages(run: Run, group: str) -> list[Scored]:
    """The students of the earlier stages of one student, if they were scored."""
    members = [m for m in run.members if m.group == group]
    found = []
    for stage in dict.fromkeys(s.name for m in members for s in m.stages):
        labels = {m.seed: f"{m.label}@{stage}" for m in members}
        seeds = {
            seed: _with_costs(run.results[label])
            for seed, label in labels.items()
            if label in run.results
        }
        if seeds:
            found.append(Scored(f"{group} after {stage}", "stage", seeds))
    return found


def _with_costs(results: dict[str, Any]) -> Scores:
    costs = {c.key[1]: results[c.key[1]] for c in COSTS if results.get(c.key[1]) is not None}
    return {**results.get("scores", {}), COST: costs}


def build_tables(run: Run) -> Tables:
    """All tables of a run."""
    models = scored_models(run)
    tables = make_tables(models)
    return Tables(tables.main, tables.kinds, _difference_table(run, models, tables.main.columns))


def make_tables(models: Sequence[Scored]) -> Tables:
    """The headline table and the tables by question kind."""
    metrics = metrics_by_task(models)
    columns = [c for task, names in metrics.items() for c in headline_columns(task, names)]
    known_costs = {m for model in models for s in model.seeds.values() for m in s.get(COST, {})}
    columns += [c for c in COSTS if c.key[1] in known_costs]
    columns, sizes = compared(columns, [model.seeds for model in models])
    models = [replace(model, seeds=s) for model, s in zip(models, sizes, strict=True)]
    rows = [model.row(columns) for model in models]
    majority = {
        (task, VQA_OVERALL): value
        for task in metrics
        if (value := _first(models, (task, VQA_MAJORITY))) is not None
    }
    if majority:
        rows.append(Row("majority answer", "baseline", majority))
    kinds = [_kind_table(task, names, models) for task, names in metrics.items()]
    return Tables(Table("Scores", columns, rows), [k for k in kinds if k])


def metrics_by_task(models: Sequence[Scored]) -> dict[str, list[str]]:
    """{task: metrics} of all models. Tasks with headline metrics come first, in a fixed order."""
    found: dict[str, dict[str, None]] = {}
    for scores in (s for model in models for s in model.seeds.values()):
        for task, values in scores.items():
            if task != COST:
                found.setdefault(task, {}).update(dict.fromkeys(values))
    tasks = [*(t for t in HEADLINE if t in found), *(t for t in found if t not in HEADLINE)]
    return {task: list(found[task]) for task in tasks}


def _first(models: Sequence[Scored], key: Key) -> Value | None:
    """A value that is equal for all models, such as a baseline."""
    task, metric = key
    for scores in (s for model in models for s in model.seeds.values()):
        if metric in scores.get(task, {}):
            return Value(scores[task][metric])
    return None


def _kind_table(task: str, metrics: list[str], models: Sequence[Scored]) -> Table | None:
    columns, majority = [], {}
    for kind in ["", *vqa_kinds(metrics)]:
        prefix = f"vqa_{kind}_" if kind else "vqa_"
        baseline = _first(models, (task, f"{prefix}majority_accuracy"))
        if baseline is None or baseline.mean == 0:  # a limit left out all questions of this kind
            continue
        column = Column((task, f"{prefix}accuracy"), "", kind or "all kinds")
        columns.append(column)
        majority[column.key] = baseline
    if not columns:
        return None
    rows = [model.row(columns) for model in models if model.role != "stage"]
    rows = [r for r in rows if r.values]
    rows.append(Row("majority answer", "baseline", majority))
    return Table(f"{task}: accuracy by kind of question", columns, rows, task)


def comparable(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two members differ in label, teacher, objectives and conversions only, so that they
    were trained on the same batches."""
    return _budget(a) == _budget(b)


def _budget(recipe: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in recipe.items() if k not in ("label", "name", "teacher")}
    kept["student"] = {k: v for k, v in recipe.get("student", {}).items() if k != "convert"}
    stages = recipe.get("stages", [])
    return kept | {
        "stages": [{**s, "objectives": None, "convert": None, "teacher": None} for s in stages]
    }


def _difference_table(
    run: Run, models: Sequence[Scored], columns: Sequence[Column]
) -> Table | None:
    quality = [c for c in columns if c.key[0] != COST]
    by_label = {model.label: model for model in models if model.role == "student"}
    rows = []
    for other in run.groups[1:]:
        first = run.groups[0]
        seeds = _comparable_seeds(run, first, other)
        if first in by_label and other in by_label and seeds:
            row = _difference(by_label[first], by_label[other], seeds, quality)
            rows += [row] if row.values else []
    return Table("Differences, in points", quality, rows) if rows else None


def _comparable_seeds(run: Run, first: str, other: str) -> list[int]:
    a = {m.seed: m for m in run.members if m.group == first}
    b = {m.seed: m for m in run.members if m.group == other}
    return [
        seed
        for seed in a
        if seed in b
        and comparable(a[seed].recipe, b[seed].recipe)
        and ran_as_long(a[seed], b[seed])
        and _same_questions(run, a[seed].label, b[seed].label)
    ]


def _same_questions(run: Run, a: str, b: str) -> bool:
    both = (run.results.get(a), run.results.get(b))
    return all(both) and len({r.get("limit") for r in both if r}) == 1


def _difference(a: Scored, b: Scored, seeds: list[int], columns: Sequence[Column]) -> Row:
    values = {}
    for column in columns:
        task, metric = column.key
        pairs = [(a.seeds[s].get(task, {}), b.seeds[s].get(task, {})) for s in seeds]
        deltas = [x[metric] - y[metric] for x, y in pairs if metric in x and metric in y]
        if deltas:
            values[column.key] = Value.of(deltas)
    note = f"paired over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    return Row(f"{a.label} − {b.label}", "difference", values, note)


def format_value(value: Value | None, unit: Unit, *, sign: bool = False) -> str:
    """A value as text: 71.2 ± 1.3, 2.4×, 3.2 M, 12.6 MB; sizes have no spread."""
    if value is None:
        return "–"
    if unit in ("count", "bytes"):
        return compact(value.mean, "B" if unit == "bytes" else "")
    scale = 100 if unit == "percent" else 1
    mean = scale * value.mean
    digits = 1 if unit in ("percent", "points", "times") else _digits(mean)
    text = f"{mean:{'+' if sign else ''},.{digits}f}".replace("-", "−")
    text += "×" if unit == "times" else ""
    if value.std is None:
        return text
    return f"{text} ± {scale * value.std:,.{digits}f}"


def _digits(number: float) -> int:
    size = abs(number)
    return 0 if size >= 100 else 1 if size >= 10 else 3


def compact(number: float, suffix: str = "") -> str:
    """1234567 as 1.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{0 if scaled >= 100 else 1}f} {unit}{suffix}"
    return f"{number:.0f} {suffix}".strip()


def print_scores(scores: dict[str, Scores]) -> None:
    """Print {label: {task: {metric: value}}}: headline metrics, then kinds of questions."""
    several = len(scores) > 1
    models = [
        Scored(label, "teacher" if label == TEACHER and several else "student", {0: found})
        for label, found in scores.items()
    ]
    print_tables(make_tables(models))


def print_tables(tables: Tables) -> None:
    """Print all tables in the terminal."""
    if not tables.main.columns:
        console.print("no scores yet", highlight=False)
        return
    for table in [tables.main, tables.differences, *tables.kinds]:
        if table is not None:
            print_table(table)


def print_table(table: Table) -> None:
    """Print a table in the terminal. If it is too wide, it is transposed, with as many models side
    by side as fit."""
    whole = _drawn(table)
    if _fits(whole):
        console.print(whole)
        return
    rows, title = table.rows, table.title
    while rows:
        parts = (_on_its_side(table, rows[:n], title) for n in range(len(rows), 1, -1))
        part = next(filter(_fits, parts), _on_its_side(table, rows[:1], title))
        console.print(part)
        rows, title = rows[len(part.columns) - 1 :], f"{table.title}, continued"


def _fits(drawn: RichTable) -> bool:
    unbounded = console.options.update(max_width=10_000)
    return console.measure(drawn, options=unbounded).maximum <= console.width


def _frame(title: str) -> RichTable:
    return RichTable(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )


def _drawn(table: Table) -> RichTable:
    """Models as rows."""
    drawn = _frame(table.title)
    drawn.add_column("")
    for column in table.columns:
        drawn.add_column(Text(_heading(table, column, "\n")), justify="right", no_wrap=True)
    for row in table.rows:
        cells = (_cell(table, row, c) for c in table.columns)
        drawn.add_row(_named(row, "  "), *cells, style=_STYLES.get(row.role, ""))
    return drawn


def _on_its_side(table: Table, rows: Sequence[Row], title: str) -> RichTable:
    """Some models as columns, for narrow terminals."""
    drawn = _frame(title)
    drawn.add_column("", no_wrap=True)
    for row in rows:
        style = _STYLES.get(row.role, "")
        drawn.add_column(_named(row, "\n"), justify="right", style=style)
    for i, column in enumerate(table.columns):
        ends = i + 1 < len(table.columns) and table.columns[i + 1].group != column.group
        cells = (_cell(table, row, column) for row in rows)
        drawn.add_row(Text(_heading(table, column, " ")), *cells, end_section=ends)
    return drawn


def _heading(table: Table, column: Column, space: str) -> str:
    unit = " %" if column.is_share and not table.of_differences else ""
    return f"{column.group}{space}{column.title}{unit}".strip()


def _named(row: Row, space: str) -> Text:
    name = Text(row.label)
    return name.append(f"{space}{row.note}", style="dim") if row.note else name


_STYLES = {"teacher": "dim", "baseline": "dim italic"}


def _cell(table: Table, row: Row, column: Column) -> Text:
    text = format_value(row.values.get(column.key), column.unit, sign=row.role == "difference")
    best = table.best(column)
    if row.role == "student" and row.label in best:
        return Text(f"{text} *", style="bold green")
    return Text(f"{text}  " if best else text)  # keeps the digits of a column in line
