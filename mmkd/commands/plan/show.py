"""Prints a plan: tables that fit the terminal, or for a study a few lines for each student."""

import textwrap
from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from mmkd.commands.plan.made import made_lines
from mmkd.errors import MmkdError
from mmkd.recipe import StageTeacherConfig, TrainConfig
from mmkd.runtime.progress import console, say

BENCH = "`mmkd bench` times the steps of a stage on this machine; plans then show hours"


def human(value: float, unit: str = "") -> str:
    for limit, letter in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if value >= limit:
            return f"{value / limit:.2f} {letter}{unit}"
    return f"{value:.0f} {unit}".strip()


def print_plan(plan: dict[str, Any], *, verbose: bool = False) -> None:
    """Print what a run would do.

    Args:
        plan: the result of `make_plan`.
        verbose: print tables of every student that differs from the others in more than its seed.
            Otherwise, several students get a few lines each.
    """
    if plan["teacher"]:
        say(f"teacher: {human(plan['teacher']['parameters'])} parameters")
    students = _students(plan)
    for labels in students:
        member = plan["members"][labels[0]]
        if not member["stages"]:
            raise MmkdError("the recipe has no stages")
        if verbose or len(students) == 1:
            for table in _tables(f"{plan['name']}: {labels[0]}", member):
                console.print(table)
    if len(plan["members"]) > 1:
        _print_study(plan, students)
    for line in made_lines(plan["made"]):
        say(line)
    say(f"in all: {_total(plan['total'])}")
    for warning in plan["warnings"]:
        say(f"warning: {warning}")
    for note in plan["notes"]:
        say(f"note: {note}")
    if plan["total"]["seconds"] is None:
        say(BENCH)
    if len(students) > 1 and not verbose:
        say("--verbose shows every stage of every student")


def _students(plan: dict[str, Any]) -> list[list[str]]:
    """Labels of the members. Members that differ in their seed only are in one group."""
    groups: list[list[str]] = []
    for label, member in plan["members"].items():
        for group in groups:
            first = plan["members"][group[0]]
            if (first["differs"], first["stages"]) == (member["differs"], member["stages"]):
                group.append(label)
                break
        else:
            groups.append([label])
    return groups


def _print_study(plan: dict[str, Any], students: list[list[str]]) -> None:
    """Print how each student differs and what it costs."""
    say(f"{plan['name']}: {len(students)} students, {len(plan['members'])} trainings")
    for labels in students:
        members = [plan["members"][label] for label in labels]
        seeds = ", ".join(str(m["seed"]) for m in members)
        name = labels[0].removesuffix(f"-seed{members[0]['seed']}")
        say(f"  {name}" + (f", seeds {seeds}" if len(labels) > 1 else ""))
        for override in members[0]["differs"] or ["the recipe itself"]:
            _say_wrapped(override)
        peak = max(stage["memory_bytes"]["total"] for stage in members[0]["stages"])
        each = " each" if len(labels) > 1 else ""
        _say_wrapped(f"{_total(members[0]['total'])}{each}; {human(peak, 'B')} of memory")
        shared = members[0]["shared_stages"]
        if shared:
            names = ", ".join(stage["stage"] for stage in members[0]["stages"][:shared])
            _say_wrapped(f"{names} shared with an earlier student, trained once")


def _say_wrapped(text: str) -> None:
    for line in textwrap.wrap(
        text,
        width=max(console.width, 40),
        initial_indent="    ",
        subsequent_indent="      ",
        break_long_words=False,
        break_on_hyphens=False,
    ):
        say(line)


def _total(total: dict[str, Any]) -> str:
    words = [
        f"{total['steps']:,} steps",
        f"{human(total['tokens'])} tokens",
        human(total["flops"], "FLOP"),
    ]
    if total["seconds"] is not None:
        words.append(f"{_hours(total['seconds'])} of training")
    return ", ".join(words)


def _hours(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds / 3600:,.2f} hours"


def _tables(title: str, member: dict[str, Any]) -> Iterator[Table]:
    """Tables with a column for each stage. Stages that do not fit go to a further table, so that no
    word is broken."""
    stages = member["stages"]
    columns = [[str(read(stage)) for read in _ROWS.values()] for stage in stages]
    names = [stage["stage"] for stage in stages]
    widths = [
        max(len(word) for cell in (name, *cells) for word in cell.split() or [""])
        for name, cells in zip(names, columns, strict=True)
    ]
    room = console.width - max(map(len, _ROWS)) - 4
    first = 0
    while first < len(stages):
        last = first + 1
        while last < len(stages) and sum(w + 2 for w in widths[first : last + 1]) <= room:
            last += 1
        table = Table(title=title, box=box.SIMPLE, padding=(0, 1), pad_edge=False)
        table.add_column("", no_wrap=True)
        for name, width in zip(names[first:last], widths[first:last], strict=True):
            table.add_column(name, justify="right", min_width=min(width, room), overflow="fold")
        for row, label in enumerate(_ROWS):
            cells = [column[row] for column in columns[first:last]]
            if any(cells):
                table.add_row(label, *cells)
        yield table
        first = last


_ROWS: dict[str, Any] = {
    "objectives": lambda s: " + ".join(_objective(o) for o in s["settings"]["objectives"]),
    "trains": lambda s: TrainConfig(**s["settings"]["train"]).words,
    "parameters": lambda s: human(s["parameters"]),
    "  a token meets": lambda s: human(s["active_parameters"]),
    "trainable": lambda s: f"{human(s['trainable'])} ({100 * s['trainable_share']:.0f} %)",
    "optimizer": lambda s: "{kind} lr {lr:g}".format(**s["settings"]["optimizer"]),
    "schedule": lambda s: s["settings"]["schedule"]["kind"],
    "engine": lambda s: f"{_engine(s['settings']['engine'])}, {s['settings']['precision']}",
    "teacher": lambda s: _teacher(s["settings"]["teacher"]),
    "teacher's weights": lambda s: s["teacher_placement"] or "",
    "records": lambda s: f"{s['records']:,}" if s["records"] else "not built yet",
    "records per step": lambda s: s["records_per_step"],
    "steps (epochs)": lambda s: f"{s['steps']:,}" + (f" ({s['epochs']:g})" if s["records"] else ""),
    "tokens per step": lambda s: human(s["tokens_per_step"]),
    "  supervised": lambda s: human(s["supervised_tokens_per_step"]),
    "  of images": lambda s: human(s["vision_tokens_per_step"]),
    "  of all steps": lambda s: human(s["tokens"]),
    "FLOPs per step": lambda s: human(s["flops_per_step"]["total"], "FLOP"),
    "  of the teacher": lambda s: human(
        sum(v for k, v in s["flops_per_step"].items() if k.startswith("teacher")), "FLOP"
    ),
    "  of all steps ": lambda s: human(s["flops"], "FLOP"),
    "time, by mmkd bench": lambda s: _hours(s["seconds"]),
    "memory, estimated": lambda s: human(s["memory_bytes"]["total"], "B"),
    "  there is": lambda s: _fits(s["memory_bytes"]["total"], s["device_memory_bytes"]),
    "  activations": lambda s: human(s["memory_bytes"]["activations"], "B"),
    "  in addition, on the CPU": lambda s: human(s["memory_bytes"]["cpu"], "B"),
}


def _teacher(settings: dict[str, Any] | None) -> str:
    """The teacher that a stage names."""
    return "" if settings is None else StageTeacherConfig(**settings).words


def _fits(needed: int, there: int) -> str:
    return human(there, "B") + (", too little" if needed > there else "")


def _engine(settings: dict[str, Any]) -> str:
    if settings["kind"] == "torch":
        return "torch"
    stage = settings["zero"]
    return "deepspeed" if stage is None else f"deepspeed, ZeRO {stage}"


def _objective(settings: dict[str, Any]) -> str:
    region = settings.get("region", "response")
    name = settings["kind"] if region == "response" else f"{settings['kind']}@{region}"
    return name if settings["weight"] == 1 else f"{settings['weight']:g} {name}"
