"""Curves of a run as inline SVG. The colours are defined in the page's style sheet."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mmkd.recipe import ANSWER_CE, STEP_METRICS, TEACHER_KL
from mmkd.report.experts import busiest
from mmkd.report.rundata import SHARE, MemberLog, Run, StageLog
from mmkd.runtime.teacher_hacking import FEWEST_ANSWERS

BUSIEST = "busiest_expert"
TITLES = {
    "loss": "total loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    BUSIEST: "busiest expert, times an even share",
    ANSWER_CE: "cross-entropy of held-out answers",
    TEACHER_KL: "KL to the teacher on held-out answers",
}
BESIDE = (ANSWER_CE, TEACHER_KL)  # measured on held-out records in addition to the objectives
DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
MOST_POINTS = 400
SERIES = 6  # colours in page.css: --series-0 ... --series-5
INK = "#010203"  # is replaced by the page's text colour
OF_TEACHER = "#000030"  # is replaced by the teacher's colour
_SIZE = (4.4, 2.3)  # inches; the page scales it


@dataclass(frozen=True)
class Curve:
    """One member's metric over the steps of one stage.

    Attributes:
        held_out: it was measured on held-out records, and is drawn with dots.
        kept: the step whose student is kept, drawn with a ring; None if it is the last step.
    """

    steps: list[float]
    values: list[float]
    series: int
    dash: int
    held_out: bool = False
    kept: int | None = None


@dataclass(frozen=True)
class Panel:
    """One metric of one stage, all members overlaid."""

    title: str
    svg: str


@dataclass(frozen=True)
class StagePanels:
    """All panels of the stages with one name."""

    stage: str
    panels: list[Panel]


def stage_panels(run: Run) -> list[StagePanels]:
    """Panels of every stage that has metrics, objectives first."""
    names = dict.fromkeys(s.name for m in run.members for s in m.stages)
    found = []
    for name in names:
        logs = [(m, s) for m in run.members for s in m.stages if s.name == name and s.lines]
        panels = [_panel(run, name, metric, logs) for metric in _metrics([s for _, s in logs])]
        panels += _against_teacher(run, name, logs)
        if panels:
            found.append(StagePanels(name, panels))
    return found


def _metrics(stages: Sequence[StageLog]) -> list[str]:
    keys = dict.fromkeys(key for stage in stages for line in stage.lines for key in line)
    objectives = [k for k in keys if k not in STEP_METRICS and not k.startswith(SHARE)]
    # With one objective of weight 1, the total is the same curve.
    total = ["loss"] if any(_has_total(stage) for stage in stages) else []
    sparse = [BUSIEST] if any(stage.loads for stage in stages) else []
    measured = {key for stage in stages for line in stage.validations for key in line}
    beside = sorted(
        (key for key in measured - keys.keys() if key.partition(".")[0] in BESIDE),
        key=lambda key: (BESIDE.index(key.partition(".")[0]), key),
    )
    beside = [key for key in beside if not _is_repeated(key, objectives, stages)]
    shares = [key for key in keys if key.startswith(SHARE)]
    shown = [m for m in (*total, "lr", "grad_norm") if m in keys]
    return objectives + beside + sparse + shares + shown


def _is_repeated(key: str, objectives: Sequence[str], stages: Sequence[StageLog]) -> bool:
    """Whether an objective has the same values on the held-out records."""
    lines = [line for stage in stages for line in stage.validations]
    return any(all(line.get(o) == line.get(key) for line in lines) for o in objectives)


def _has_total(stage: StageLog) -> bool:
    objectives = stage.config.get("objectives", [])
    return len(objectives) != 1 or objectives[0].get("weight", 1.0) != 1.0


def _panel(run: Run, stage: str, metric: str, logs: Sequence[tuple[MemberLog, StageLog]]) -> Panel:
    curves = []
    for member, log in logs:
        points = _points(log, metric)
        if points:
            steps, values = map(list, zip(*points, strict=True))
            curves.append(Curve(steps, values, *style_of(run, member)))
        measured = [v for v in log.validations if metric in v]
        if measured and metric not in ("lr", "grad_norm"):
            steps, values = [v["step"] for v in measured], [v[metric] for v in measured]
            style = style_of(run, member)
            curves.append(Curve(steps, values, *style, held_out=True, kept=log.kept))
    smooth = metric != "lr" and not metric.startswith(SHARE)
    name, _, teacher = metric.partition(".")
    if metric.startswith(SHARE):
        title: str | None = f"share of {metric.removeprefix(SHARE)}"
    else:
        title = f"{TITLES[name]}: {teacher}" if teacher and name in TITLES else TITLES.get(metric)
    return Panel(title or metric, draw(curves, smooth=smooth, salt=f"{stage}-{metric}"))


def _against_teacher(
    run: Run, stage: str, logs: Sequence[tuple[MemberLog, StageLog]]
) -> list[Panel]:
    """Cross-entropy of held-out answers over the KL to each teacher, in the order of the steps; a
    ring marks the step at which a sign of teacher hacking says to stop."""
    keys = dict.fromkeys(key for _, log in logs for line in log.validations for key in line)
    panels = []
    for name in (key for key in keys if key.partition(".")[0] == TEACHER_KL):
        paths = []
        for member, log in logs:
            lines = [v for v in log.validations if name in v and ANSWER_CE in v]
            if len(lines) >= FEWEST_ANSWERS:
                points = [line[name] for line in lines], [line[ANSWER_CE] for line in lines]
                sign = log.hacking.get(name)
                places = [line["step"] for line in lines]
                stop = places.index(sign.stop) if sign and sign.stop in places else None
                paths.append((*points, *style_of(run, member), stop))
        if paths:
            title = f"{TITLES[ANSWER_CE]} over the KL to the teacher"
            teacher = name.partition(".")[2]
            svg = draw_paths(paths, salt=f"{stage}-{name}-path")
            panels.append(Panel(f"{title}: {teacher}" if teacher else title, svg))
    return panels


def _points(log: StageLog, metric: str) -> list[tuple[float, float]]:
    if metric == BUSIEST:
        steps = [line["step"] for line in log.lines]
        return list(zip(steps, map(busiest, log.loads), strict=False))
    return [(line["step"], line[metric]) for line in log.lines if metric in line]


def style_of(run: Run, member: MemberLog) -> tuple[int, int]:
    """Colour by label, dash by seed."""
    seeds = [m.seed for m in run.members if m.group == member.group]
    return run.groups.index(member.group) % SERIES, seeds.index(member.seed) % len(DASHES)


def smoothed(values: Sequence[float], window: float) -> list[float]:
    """Exponential moving average with correction of the initial bias."""
    keep = 1 - 2 / (window + 1)
    total = weight = 0.0
    out = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        out.append(total / weight)
    return out


def draw(curves: Sequence[Curve], *, smooth: bool, salt: str) -> str:
    """The curves as an SVG element; `salt` makes ids unique if a page has several plots."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for curve in curves:
        colour, dash = series_colour(curve.series), DASHES[curve.dash]
        values = curve.values
        if curve.held_out:
            _draw_held_out(axes, curve, colour)
            continue
        if smooth and len(values) > 8:
            axes.plot(*_thin(curve.steps, values), color=colour, alpha=0.2, linewidth=0.8)
            values = smoothed(values, max(4.0, len(values) / 20))
        axes.plot(*_thin(curve.steps, values), color=colour, linewidth=1.6, linestyle=dash)
    style(axes, "step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=False)
    axes.yaxis.get_offset_text().set_color(INK)
    axes.yaxis.get_offset_text().set_fontsize(9)
    return to_svg(figure, salt)


def draw_paths(
    paths: Sequence[tuple[list[float], list[float], int, int, int | None]], *, salt: str
) -> str:
    """Paths of points as an SVG element, larger at the end.

    Args:
        paths: x, y, colour, dash, and the index of the point with a ring or None.
        salt: as in `draw`.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for xs, ys, series, dash, ring in paths:
        colour = series_colour(series)
        line: dict[str, Any] = {"color": colour, "linewidth": 0.9, "linestyle": DASHES[dash]}
        axes.plot(*_thin(xs, ys), marker="o", markersize=2.5, **line)
        axes.plot(xs[-1:], ys[-1:], "o", color=colour, markersize=5)
        if ring is not None:
            axes.plot(xs[ring], ys[ring], "o", color=colour, fillstyle="none", markersize=9)
    style(axes, "KL to the teacher")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return to_svg(figure, salt)


def series_colour(series: int) -> str:
    """The colour that `to_svg` replaces by that of a series in page.css."""
    return f"#0000{series + 16:02x}"


def _draw_held_out(axes: Axes, curve: Curve, colour: str) -> None:
    """Draw dots joined by a thin line, with a ring around the step that is kept."""
    steps, values = _thin(curve.steps, curve.values)
    axes.plot(
        steps,
        values,
        color=colour,
        linewidth=0.9,
        linestyle=DASHES[curve.dash],
        marker="o",
        markersize=3.5 if len(steps) <= 60 else 1.5,
    )
    if curve.kept in curve.steps:
        value = curve.values[curve.steps.index(curve.kept)]
        axes.plot([curve.kept], [value], "o", color=colour, fillstyle="none", markersize=9)


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    stride = max(1, -(-len(steps) // MOST_POINTS))
    last = [] if (len(steps) - 1) % stride == 0 else [len(steps) - 1]
    kept = [*range(0, len(steps), stride), *last]
    return [steps[i] for i in kept], [values[i] for i in kept]


def style(axes: Axes, x: str) -> None:
    """Style the axes of a plot; `x` is the label of the horizontal one."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.spines[["left", "bottom"]].set_alpha(0.35)
    axes.tick_params(colors=INK, labelsize=9, length=3, width=0.6)
    axes.grid(color=INK, alpha=0.1, linewidth=0.7)
    axes.set_xlabel(x, color=INK, fontsize=9, alpha=0.7)


def to_svg(figure: Figure, salt: str) -> str:
    """A figure as an SVG element; `salt` makes ids unique if a page has several plots."""
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = text.replace(INK, "currentColor").replace(OF_TEACHER, "var(--teacher)")
    return re.sub(r"#0000(1[0-9a-f])", lambda m: f"var(--series-{int(m[1], 16) - 16})", text)
