"""The model card: metadata for the Hub, and in words what the student is and how it was made."""

import math
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmkd.recipe import HUB, ModelConfig, ReleaseConfig, SourceConfig, StageConfig, TeacherConfig
from mmkd.release.dtype import Rounded, stored_dtype
from mmkd.release.papers import papers
from mmkd.release.scrub import file_name
from mmkd.release.source import Source
from mmkd.report.metrics import COST, Column
from mmkd.report.rundata import Scores, student_size
from mmkd.report.summary import describe_stage
from mmkd.report.tables import Scored, Table, compact, format_value, make_tables, scored_models
from mmkd.report.use import snippet

HERE = Path(__file__).parent
TASK = "image-text-to-text"
THIS = "this student"


class StageRow(NamedTuple):
    """One stage as the card shows it."""

    name: str
    objectives: str
    train: str
    data: str
    steps: int
    records: int
    lr: float


def make_card(source: Source, settings: ReleaseConfig) -> ModelCard:
    """The card. Everything in it comes from the run and from `settings`."""
    table = score_table(source)
    parameters, size = student_size(source.student) or (0, 0)
    trained = stored_dtype(source.student)
    dtype = settings.dtype or trained
    if dtype != trained:
        weights = source.student.glob("*.safetensors")
        size = sum(Rounded(path, dtype).size for path in weights)
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        cell=cell, within_link=within_link, compact=compact, heading=heading, task=task
    )
    address = settings.repo or "path/to/this/folder"
    text = environment.get_template("card.md").render(
        title=title(source, settings),
        snippet=snippet(address, needs_code=source.needs_code),
        settings=settings,
        license=license_text(settings),
        datasets=datasets(source, settings),
        source=source,
        parameters=parameters,
        size=size,
        dtype=dtype,
        trained=trained,
        teacher=teacher_text(source),
        start=start_text(source),
        stages=stage_rows(source),
        changes=[line.strip() for line in source.member.changes],
        papers=papers(source.recipe),
        table=table,
        rows=[[c, *(format_value(r.values.get(c.key), c.unit) for r in table.rows)]
              for c in table.columns],
        versions=source.run.provenance.get("versions", {}),
        seeds=len(scored_seeds(source)),
        drawn=any(c.key[0].startswith("scenes_") for c in table.columns),
        local=sorted((source.results or {}).get("data", {})),
        gaps=gaps(source.results or {}),
    )  # fmt: skip
    return ModelCard(f"---\n{metadata(source, settings).to_yaml()}\n---\n\n{text}")


def title(source: Source, settings: ReleaseConfig) -> str:
    """The repository's name, or the run's."""
    return settings.repo.split("/")[1] if settings.repo else source.name


def metadata(source: Source, settings: ReleaseConfig) -> ModelCardData:
    """What the Hub reads of the card."""
    bases, results = base_models(source), evaluation_results(source)
    # Left out, the Hub would take several for the parts of a merge.
    relation: Any = {"base_model_relation": "finetune"} if bases else {}
    return ModelCardData(
        **relation,
        base_model=bases or None,
        datasets=datasets(source, settings) or None,
        language=settings.language or None,
        license=settings.license,
        license_name=settings.license_name,
        license_link=settings.license_link,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["mmkd", *(["distillation"] if source.taught else []), *settings.tags],
        model_name=title(source, settings) if results else None,  # of the model-index
        eval_results=results or None,
    )


def base_models(source: Source) -> list[str]:
    """Hub ids of the models that the student comes from: its start, and its teachers."""
    teachers = source.recipe.teachers if source.taught else []
    names = [config.model for config in (source.recipe.student, *teachers)]
    return list(dict.fromkeys(name for name in names if name and source.on_hub(name)))


def datasets(source: Source, settings: ReleaseConfig) -> list[str]:
    """Hub ids of the data: those that the recipe reads, and those that `settings` name."""
    recipe = source.recipe
    parts = [part for stage in recipe.stages for part in recipe.stage_data(stage).parts]
    read = [part.train.removeprefix(HUB) for part in parts if part.train.startswith(HUB)]
    return list(dict.fromkeys([*read, *settings.datasets]))


def license_text(settings: ReleaseConfig) -> str:
    """The license's name, as a link where `settings` have one."""
    name = settings.license_name or settings.license
    if name is None:
        return "not stated; those of the models above and of the data still hold"
    return f"[{cell(name)}]({settings.license_link})" if settings.license_link else cell(name)


def evaluation_results(source: Source) -> list[EvalResult]:
    """The headline scores of these very weights, as lmms-eval gives them."""
    results = source.results or {}
    limit = results.get("limit")
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=task,
            dataset_name=task,
            dataset_args={"limit": limit} if limit else None,
            metric_type=metric,
            metric_name=column.name,
            metric_value=round(value, 4),
        )
        for column in score_table(source).columns
        for task, metric in [column.key]
        if task != COST
        and math.isfinite(value := results["scores"].get(task, {}).get(metric, math.nan))
    ]


def gaps(results: dict[str, Any]) -> list[str]:
    """Tasks without scores, and documents that the student could not be asked about."""
    lost = results.get("failed", {})
    failed = [f"Task `{cell(name)}` failed and has no scores." for name in lost]
    counts = {name: said["documents"] for name, said in results.get("unanswered", {}).items()}
    unanswered = [
        f"The student could not be asked about {count:,} of the documents of `{cell(name)}`; they "
        "count as wrong."
        for name, count in counts.items()
    ]
    return failed + unanswered


def score_table(source: Source) -> Table:
    """The teacher, this student, where there are several seeds their mean, and the majority."""
    if source.results is None:
        return Table("Scores", [], [])
    models = [model for model in scored_models(source.run) if model.role == "teacher"]
    seeds = scored_seeds(source)
    models.append(Scored(THIS, "student", {0: seeds[source.member.seed]}))
    if len(seeds) > 1:
        models.append(Scored(f"{len(seeds)} seeds", "student", seeds))
    return make_tables(models).main


def scored_seeds(source: Source) -> dict[int, Scores]:
    """What each evaluated seed of this student scored."""
    same = (m for m in scored_models(source.run) if m.role == "student")
    model = next(m for m in same if m.label == source.member.group)
    return {seed: scores for seed, scores in model.seeds.items() if set(scores) != {COST}}


def stage_rows(source: Source) -> list[StageRow]:
    """The stages in order."""
    processes = source.run.provenance.get("machine", {}).get("processes", 1)
    rows = []
    for stage, log in zip(source.recipe.stages, source.member.stages, strict=True):
        rows.append(
            StageRow(
                name=stage.name,
                objectives=_objectives(stage),
                train=stage.train.words,
                data=", ".join(map(_data_name, source.recipe.stage_data(stage).parts)),
                steps=log.steps or 0,
                records=stage.batch.records_per_step(processes),
                lr=stage.optimizer.lr,
            )
        )
    return rows


def _data_name(part: SourceConfig) -> str:
    """A source's name: its own, the Hub's, or its file's without the path."""
    on_hub = part.name is None and part.train.startswith(HUB)
    return part.train.removeprefix(HUB) if on_hub else file_name(part.name or part.train)


def _objectives(stage: StageConfig) -> str:
    text = describe_stage(stage.model_dump())
    if stage.on_policy is None:
        return text
    corrected = ", with corrections of the teacher" if stage.on_policy.correct else ""
    return f"{text}; {stage.on_policy.lmbda:.0%} of the answers sampled from the student{corrected}"


def model_text(source: Source, config: ModelConfig | None) -> str:
    """Where a model came from, without a path."""
    if config is None:
        return "none"
    if isinstance(config, TeacherConfig) and config.source == "self":
        return "the student itself, as it was before each stage"
    if config.config is not None:
        return f"random weights of a {config.config['model_type']} model"
    if config.model is None:
        return "a model whose outputs were stored"
    if not source.on_hub(config.model):
        return "a local model"
    return f"[{cell(config.model)}](https://huggingface.co/{within_link(config.model)})"


def teacher_text(source: Source) -> str:
    """What taught the student, several teachers by their names too."""
    teachers = source.recipe.teachers if source.taught else []
    if not teachers and source.taught:
        return "the student itself, as it was after an earlier stage"
    if len(teachers) < 2:
        return model_text(source, teachers[0] if teachers else None)
    return "; ".join(f"{t.name}: {model_text(source, t)}" for t in teachers)


def start_text(source: Source) -> str:
    """What the student was before it was converted and trained."""
    student, teachers = source.recipe.student, source.recipe.teachers if source.taught else []
    same = [t.name for t in teachers if student.model and student.model == t.model]
    if not same:
        return model_text(source, student)
    return "the teacher itself" if len(teachers) == 1 else f"the teacher {same[0]} itself"


def cell(value: Any) -> str:
    """Text that stays within its cell of a Markdown table, and is no link, code or HTML."""
    text = " ".join(str(value).split()).replace("\\", "&#92;").replace("|", "\\|")
    for mark, entity in (("<", "&lt;"), ("[", "&#91;"), ("]", "&#93;"), ("`", "&#96;")):
        text = text.replace(mark, entity)
    return text


def within_link(value: str) -> str:
    """A Hub id as part of a link's address, which it cannot end."""
    return quote(str(value), safe="/")


def task(column: Column) -> str:
    """lmms-eval's name of what was asked; empty for costs."""
    return f"`{cell(column.key[0])}`" if column.key[0] != COST else ""


def heading(column: Column) -> str:
    """A metric's name, with its unit and where less is better."""
    unit = " %" if column.is_share else ""
    lower = column.better == "lower" and column.key[0] != COST
    return f"{column.name}{unit}{' (lower is better)' if lower else ''}"
