"""The table of decoding times: the cost of a token after contexts of several lengths."""

from statistics import fmean

from mmkd.report.metrics import Column, Unit
from mmkd.report.rundata import Run, Scores
from mmkd.report.tables import Scored, Table, compact
from mmkd.runtime.run_folder import TEACHER

# Times are not ranked, because they differ between equal models too.
KINDS: list[tuple[str, str, Unit]] = [
    ("milliseconds", "ms", "number"),
    ("speed", "speed", "times"),
    ("cache_bytes", "cache", "bytes"),
]


def decoding_table(run: Run) -> Table | None:
    """The teacher first, then the students, each over its seeds; None if nothing was timed."""
    models = _timed_models(run)
    seeds = [scores for model in models for scores in model.seeds.values()]
    contexts = sorted({context for scores in seeds for context in scores}, key=int)
    known = {name for scores in seeds for values in scores.values() for name in values}
    columns = [
        Column((context, name), f"{int(context):,} tokens", title, None, unit)
        for context in contexts
        for name, title, unit in KINDS
        if name in known
    ]
    if not columns:
        return None
    title = f"Decoding after {columns[0].group}" if len(contexts) == 1 else "Decoding"
    return Table(title, columns, [model.row(columns) for model in models])


def decoding_sentence(run: Run) -> str:
    """A comparison of the first student with the teacher after the longest context; "" unless both
    were timed."""
    models = {model.role: model for model in reversed(_timed_models(run))}
    if "teacher" not in models or "student" not in models:
        return ""
    teacher, student = models["teacher"].seeds[0], models["student"]
    both = [c for c in teacher if all(c in scores for scores in student.seeds.values())]
    if not both:
        return ""
    context = max(both, key=int)

    def mean(kind: str) -> float:
        return fmean(scores[context][kind] for scores in student.seeds.values())

    held = teacher[context]["cache_bytes"]
    return (
        f"After {int(context):,} tokens {student.label} decodes {mean('speed'):.1f} times as fast "
        f"as the teacher, and its cache takes {compact(mean('cache_bytes'), 'B')} instead of "
        f"{compact(held, 'B')}."
    )


def _timed_models(run: Run) -> list[Scored]:
    teacher = run.decoding.get(TEACHER, []) if run.is_teacher(TEACHER) else []
    base = {row["context"]: row["milliseconds"] for row in teacher}
    found = [Scored(TEACHER, "teacher", {0: _values(teacher, base)})] if teacher else []
    for group in run.groups:
        seeds = {
            m.seed: _values(run.decoding[m.label], base)
            for m in run.members
            if m.group == group and m.label in run.decoding
        }
        if seeds:
            found.append(Scored(group, "student", seeds))
    return found


def _values(rows: list[dict[str, float]], teacher: dict[float, float]) -> Scores:
    """{context: {kind: value}}, with a speed if the teacher was timed at the same context."""
    found = {}
    for row in rows:
        context, taken = row["context"], row["milliseconds"]
        values = {"milliseconds": taken, "cache_bytes": row["cache_bytes"]}
        if context in teacher:
            values["speed"] = teacher[context] / taken
        found[str(context)] = values
    return found
