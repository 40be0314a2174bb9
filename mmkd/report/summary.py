"""A summary of a run in a few sentences. All numbers come from the run's files."""

from collections.abc import Sequence
from typing import Any

from mmkd.report.decoding import decoding_sentence
from mmkd.report.metrics import COST, VQA_OVERALL, Column
from mmkd.report.rundata import MemberLog, Run, StageLog
from mmkd.report.tables import Row, Tables, compact, format_value
from mmkd.report.weights import other_weights

_SETTINGS = {
    "loss": "loss",
    "reference": "reference",
    "temperature": "T",
    "beta": "β",
    "alpha": "α",
    "debias": "debias",
    "region": "region",
}
_UNSAID = {"temperature": 1.0, "region": "response"}


def summary(run: Run, tables: Tables) -> list[str]:
    """A few sentences: models, training, state, main result."""
    found = [_models(run, tables), _training(run), *_result(tables), decoding_sentence(run)]
    return [_unbroken(sentence) for sentence in found if sentence]


def _unbroken(sentence: str) -> str:
    """Keep a mean and its spread on one line."""
    return sentence.replace(" ± ", "\u00a0±\u00a0")


def warnings(run: Run) -> list[str]:
    """Warnings about the numbers on the page."""
    found = [_unfinished(m) for m in run.members if not m.done]
    waiting = run.expected - len(run.members)
    if waiting:
        found.append(f"Not begun: {waiting} of {run.expected} students.")
    wanted = run.recipe.get("evaluate") or {}
    scored = [m for m in run.members if m.label in run.results]
    if wanted.get("tasks") and len(scored) < run.expected:
        found.append(f"Evaluated so far: {len(scored)} of {run.expected} students.")
    answered = [m for m in run.members if _complete(run.answers.get(m.label))]
    if wanted.get("samples") and len(answered) < run.expected:
        found.append(f"Sample answers so far: {len(answered)} of {run.expected} students.")
    limits = {r.get("limit") for r in run.results.values()}
    if limits - {None}:
        text = " or ".join(
            "all" if x is None else f"the first {x}" for x in sorted(limits, key=str)
        )
        found.append(f"Scores are of {text} questions per task only.")
    return [*found, *evaluation_warnings(run)]


def _complete(answers: dict[str, Any] | None) -> bool:
    return answers is not None and len(answers["answers"]) == answers["expected"]


def evaluation_warnings(run: Run) -> list[str]:
    """Warnings about scores of other weights, tasks without scores, and documents that models could
    not be asked about."""
    found = [
        f"{label}: its scores are of other weights than the run holds now; run the recipe "
        "again to score these weights."
        for label in other_weights(run)
    ]
    for label, results in run.results.items():
        for task, reason in results.get("failed", {}).items():
            found.append(f"{label}: task {task} has no scores ({reason}).")
        for task, said in results.get("unanswered", {}).items():
            count = said["documents"]
            documents = "1 document" if count == 1 else f"{count:,} documents"
            counts = "counts" if count == 1 else "count"
            found.append(
                f"{label}: {documents} of task {task} could not be asked about and {counts} as "
                f"wrong; the first is document {said['first']} ({said['reason']})."
            )
    return found


def held_out_notes(run: Run) -> list[str]:
    """Notes on the losses on held-out records, and on the students that were chosen by them."""
    stages = [(m, s) for m in run.members for s in m.stages if s.validations]
    if not stages:
        return []
    counts = sorted({int(s.validations[-1].get("records", 0)) for _, s in stages})
    counted = " or ".join(f"{count:,}" for count in counts)
    kept = [text for member, stage in stages if (text := _kept(member, stage))]
    found = [f"Dots are means over {counted} held-out records that the stage does not train on."]
    if kept:
        found.append(f"The student of the best step on them is kept: {', '.join(kept)}.")
    found += [
        f"Teacher hacking, {member.label}, stage {stage.name}, by {name}: {sign}."
        for member, stage in stages
        for name, sign in stage.hacking.items()
    ]
    return found


def _kept(member: MemberLog, stage: StageLog) -> str:
    """kd-seed0 step 400 of 600 of stage mimic (loss 1.23)."""
    if stage.kept is None:
        return ""
    metric = (stage.config.get("validation") or {}).get("metric", "loss")
    value = next((v.get(metric) for v in stage.validations if v["step"] == stage.kept), None)
    said = "" if value is None else f" ({metric} {value:.4g})"
    return f"{member.label} step {stage.kept:,} of {len(stage.lines):,} of {stage.name}{said}"


def describe_stage(stage: dict[str, Any]) -> str:
    """ce + kl; teacher: tuned."""
    text, teacher = describe_objectives(stage["objectives"]), stage.get("teacher")
    if not isinstance(teacher, dict):
        return text
    earlier = teacher.get("stage")
    name = teacher.get("name") if earlier is None else f"the student after stage {earlier}"
    return f"{text}; teacher: {name}"


def describe_objectives(objectives: Sequence[dict[str, Any]]) -> str:
    """0.5 × ce + kl (T = 2)."""
    return " + ".join(_describe(o) for o in objectives)


def _describe(objective: dict[str, Any]) -> str:
    weight = objective.get("weight", 1.0)
    text = str(objective.get("name") or objective.get("kind"))
    settings = [
        f"{short} = {value:g}" if isinstance(value, int | float) else f"{short} = {value}"
        for key, short in _SETTINGS.items()
        if (value := objective.get(key)) is not None and value != _UNSAID.get(key)
    ]
    text += f" ({', '.join(settings)})" if settings else ""
    sources = objective.get("sources")
    if isinstance(sources, list) and sources:
        text += f" on {', '.join(map(str, sources))}"
    return text if weight == 1 else f"{weight:g} × {text}"


def _row(tables: Tables, role: str) -> Row | None:
    return next((r for r in tables.main.rows if r.role == role), None)


def _parameters(row: Row | None) -> float | None:
    value = row.values.get((COST, "parameters")) if row else None
    return value.mean if value else None


def _models(run: Run, tables: Tables) -> str:
    teacher, student = _row(tables, "teacher"), _row(tables, "student")
    large, small = _parameters(teacher), _parameters(student)
    teachers = [run.recipe.get("teacher") or {}, *run.recipe.get("more_teachers", [])]
    own = "the student before each stage"
    sources = [own if t.get("source") == "self" else t.get("model") for t in teachers]
    source, *further = [s for s in sources if s] or [None]
    others = f" Further teachers: {', '.join(further)}." if further else ""
    count = "one student" if len(run.groups) == 1 else f"{len(run.groups)} students"
    size = f" of {compact(small)} parameters" if small else ""
    sizes = {_parameters(r) for r in tables.main.rows if r.role == "student"}
    if len(sizes) > 1:
        size = f", the first{size}"
    if large and small:
        times = f", {_compared(large / small)}" if len(sizes) == 1 else ""
        return (
            f"A teacher of {compact(large)} parameters ({source}) and {count}{size}{times}.{others}"
        )
    taught = f" The teacher is {source}.{others}" if source else " No teacher."
    return f"{count.capitalize()}{size}.{taught}"


def _compared(ratio: float) -> str:
    return f"{ratio:.1f} times smaller" if ratio >= 1 else f"{1 / ratio:.1f} times as large"


def _training(run: Run) -> str:
    if not run.members:
        return "Nothing was trained yet."
    seeds = sorted({m.seed for m in run.members})
    named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    first = run.members[0]
    steps = _steps(first)
    stages = "one stage" if len(first.stages) == 1 else f"{len(first.stages)} stages"
    tokens = sum(s.total("supervised_tokens") for s in first.stages)
    said = f" ({compact(tokens)} supervised tokens)" if tokens else ""
    # Stages that members share were trained once.
    times = {s.file: _seconds(s) for m in run.members for s in m.stages}
    seconds = sum(times.values())
    alike = len({_steps(m) for m in run.members}) == 1
    done = all(m.done for m in run.members) and len(run.members) == run.expected
    trained, so_far = ("trained", "") if done else ("has trained", " so far")
    who = "It" if len(run.members) == 1 else "Each student" if alike else first.label
    return (
        f"{who} {trained} for {steps:,} steps{so_far}{said} in {stages}; {named}. "
        f"All training together took {duration(seconds)}."
    )


def _seconds(stage: StageLog) -> float:
    """Seconds of a stage's steps and validations."""
    return stage.total("seconds") + sum(v.get("seconds", 0.0) for v in stage.validations)


def _steps(member: MemberLog) -> int:
    return sum(len(stage.lines) for stage in member.stages)


def duration(seconds: float) -> str:
    """12 s, 34 min, 5.6 h; the unit stays with its number."""
    if seconds < 120:
        return f"{seconds:.{0 if seconds >= 10 else 1}f}\u00a0s"
    if seconds < 7200:
        return f"{seconds / 60:.0f}\u00a0min"
    return f"{seconds / 3600:.1f}\u00a0h"


def _result(tables: Tables) -> list[str]:
    """A sentence on the VQA score, or on the first other quality metric."""
    columns = [c for c in tables.main.columns if c.key[0] != COST]
    column = next((c for c in columns if c.key[1] == VQA_OVERALL), columns[0] if columns else None)
    if column is None:
        return []
    unit = "\u00a0%" if column.is_share else ""
    rows = [r for r in tables.main.rows if column.key in r.values]
    said = ", ".join(
        f"{r.label} {format_value(r.values[column.key], column.unit)}{unit}" for r in rows
    )
    return [f"{column.name}: {said}.", *_difference(tables, column)]


def _difference(tables: Tables, column: Column) -> list[str]:
    if tables.differences is None:
        return []
    found = []
    for row in tables.differences.rows:
        if value := row.values.get(column.key):
            text = format_value(value, column.unit, sign=True)
            points = " points" if column.is_share else ""
            found.append(f"{row.label}: {text}{points} ({row.note}).")
    return found


def _unfinished(member: MemberLog) -> str:
    for stage in member.stages:
        if not stage.done:
            at = int(stage.lines[-1]["step"]) if stage.lines else 0
            of = f" of {stage.steps:,}" if stage.steps else ""
            return f"{member.label} is not finished: step {at:,}{of} of stage {stage.name}."
    return ""


def provenance_rows(run: Run) -> list[tuple[str, str]]:
    """Name and value of everything that the run depended on."""
    found = run.provenance
    machine, git = found.get("machine") or {}, found.get("git") or {}
    rows = [("command", " ".join(map(str, found.get("command", []))))]
    rows.append(("seeds", ", ".join(map(str, found.get("seeds", [])))))
    changed = " with local changes" if git.get("changed") else ""
    rows.append(("code", f"{git['commit']}{changed}" if git.get("commit") else ""))
    rows += [(f"structure of {group}", "; ".join(lines)) for group, lines in _changes(run).items()]
    rows.append(("machine", _machine(machine)))
    rows.append(("versions", ", ".join(f"{k} {v}" for k, v in found.get("versions", {}).items())))
    rows += [(f"data {name}", str(facts)) for name, facts in found.get("data", {}).items()]
    rows += [
        (f"selection of {name}", "; ".join(map(_selection, chosen)))
        for name, chosen in found.get("selections", {}).items()
    ]
    rows += [(f"evaluation of {label}", _evaluation(r)) for label, r in run.results.items()]
    return [(name, value) for name, value in rows if value]


def _changes(run: Run) -> dict[str, list[str]]:
    """Descriptions of conversions, by label of the students."""
    return {m.group: [line.strip() for line in m.changes] for m in run.members}


def _selection(facts: dict[str, Any]) -> str:
    """What a selection has kept, with a checksum."""
    kept, records, length = (facts.get(key, 0) for key in ("kept", "records", "length"))
    repeated = f", {length:,} with repeats" if length > kept else ""
    checksum = facts.get("sha256_of_indices", "")
    return f"{facts.get('kind')}: {kept:,} of {records:,} records{repeated}, sha256 {checksum}"


def _machine(machine: dict[str, Any]) -> str:
    gpus = ", ".join(machine.get("gpus") or [])
    parts = [
        machine.get("processor"),
        f"{machine['cpus']} CPUs" if machine.get("cpus") else None,
        f"{machine['threads']} torch threads" if machine.get("threads") else None,
        f"GPUs: {gpus}" if gpus else None,
        machine.get("system"),
    ]
    return ", ".join(str(part) for part in parts if part)


def _evaluation(results: dict[str, Any]) -> str:
    limit = results.get("limit")
    seconds = results.get("seconds")
    parts = [
        str(results.get("model", "")),
        f"lmms-eval {results['lmms_eval']}" if results.get("lmms_eval") else None,
        f"{results.get('dtype')} on {results.get('device')}",
        f"batches of {results['batch_size']}" if results.get("batch_size") else None,
        f"first {limit} questions per task" if limit else "all questions",
        duration(seconds) if seconds is not None else None,
    ]
    return ", ".join(part for part in parts if part)
