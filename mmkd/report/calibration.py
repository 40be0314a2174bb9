"""Reliability diagrams: the share of right predictions over their confidence, on the page and in
the terminal. Points on the diagonal are calibrated; below it, a model is too confident."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from mmkd.report.plots import INK, OF_TEACHER, SERIES, Panel, series_colour, style, to_svg
from mmkd.report.rundata import Run
from mmkd.runtime.progress import console
from mmkd.runtime.run_folder import TEACHER

KINDS = {"answers": "answers with options", "tokens": "next tokens"}
LARGEST, SMALLEST = 120.0, 6.0
"""Areas of the points of a bin with all predictions, and of one with hardly any, in points²."""
BAR = 20
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """The bins of one model; with several seeds, of all of them together.

    Attributes:
        colour: of the model in `mmkd.report.plots`.
        bins: (number of predictions, mean confidence, share of right ones), without empty bins.
    """

    colour: str
    bins: list[tuple[int, float, float]]


def calibration_panels(run: Run) -> dict[str, list[Panel]]:
    """Diagrams by kind of predictions: one per task, all models overlaid. Kinds and tasks that no
    model has are left out."""
    tasks = list(dict.fromkeys(t for r in run.results.values() for t in r.get("calibration", {})))
    found: dict[str, list[Panel]] = {}
    for kind, title in KINDS.items():
        drawn = [(task, _lines(run, task, kind)) for task in tasks]
        panels = [Panel(task, _draw(lines, f"{task}-{kind}")) for task, lines in drawn if lines]
        if panels:
            found[title] = panels
    return found


def _lines(run: Run, task: str, kind: str) -> list[Line]:
    labels = {TEACHER: ([TEACHER], OF_TEACHER)} if run.is_teacher(TEACHER) else {}
    for number, group in enumerate(run.groups):
        members = [m.label for m in run.members if m.group == group]
        labels[group] = (members, series_colour(number % SERIES))
    found = []
    for members, colour in labels.values():
        facts = [_facts(run.results.get(label, {}), task, kind) for label in members]
        bins = merged([f["bins"] for f in facts if f is not None])
        if bins:
            found.append(Line(colour, bins))
    return found


def _facts(results: Facts, task: str, kind: str) -> Facts | None:
    found: Facts | None = results.get("calibration", {}).get(task, {}).get(kind)
    return found


def merged(models: Sequence[Sequence[Facts]]) -> list[tuple[int, float, float]]:
    """The bins of several models together: number, mean confidence and share of right predictions,
    without empty bins. Models with another number of bins than the first are left out."""
    same = [bins for bins in models if len(bins) == len(models[0])]
    found = []
    for bins in zip(*same, strict=True):
        count = sum(b["count"] for b in bins)
        if count:
            confidence, accuracy = (
                sum(b["count"] * b[name] for b in bins) / count
                for name in ("confidence", "accuracy")
            )
            found.append((count, confidence, accuracy))
    return found


def _draw(lines: Sequence[Line], salt: str) -> str:
    figure = Figure(figsize=(3.4, 3.0), layout="constrained")
    figure.patch.set_alpha(0)
    axes: Axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.plot([0, 1], [0, 1], color=INK, alpha=0.35, linewidth=0.9, linestyle=(0, (4, 3)))
    for line in lines:
        counts, confidence, accuracy = zip(*line.bins, strict=True)
        sizes = [SMALLEST + (LARGEST - SMALLEST) * count / sum(counts) for count in counts]
        axes.plot(confidence, accuracy, color=line.colour, linewidth=1.2)
        axes.scatter(confidence, accuracy, s=sizes, color=line.colour, linewidths=0)
    style(axes, "confidence")
    axes.set_ylabel("share of right predictions", color=INK, fontsize=9, alpha=0.7)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=ticks, yticks=ticks)
    return to_svg(figure, salt)


def print_reliability(label: str, calibration: Mapping[str, Facts]) -> None:
    """Print the bins of each task in the terminal: of answers with options, or of next tokens for
    tasks without options.

    Args:
        label: of the model.
        calibration: as in `results.json`.
    """
    for task, kinds in calibration.items():
        kind = next((name for name in KINDS if name in kinds), None)
        if kind is not None:
            title = f"{label}, {task}: {KINDS[kind]}, ECE {100 * kinds[kind]['ece']:.1f} %"
            console.print(reliability_table(title, kinds[kind]))


def reliability_table(title: str, facts: Facts) -> RichTable:
    """The bins as a table with a bar each: filled up to the share of right predictions, with a
    mark at the confidence. Empty bins are left out."""
    drawn = RichTable(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    for name in ("confidence %", "number", "mean %", "right %"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("right █, confidence │", no_wrap=True)
    width = len(facts["bins"])
    for number, held in enumerate(facts["bins"]):
        if held["count"]:
            edges = f"{100 * number / width:.0f} to {100 * (number + 1) / width:.0f}"
            shares = [held["confidence"], held["accuracy"]]
            cells = [f"{100 * share:.1f}" for share in shares]
            drawn.add_row(edges, f"{held['count']:,}", *cells, _bar(*shares))
    return drawn


def _bar(confidence: float, accuracy: float) -> str:
    filled, mark = (min(BAR - 1, round(BAR * share)) for share in (accuracy, confidence))
    cells = ["█"] * filled + ["·"] * (BAR - filled)
    cells[mark] = "│"
    return "".join(cells)
