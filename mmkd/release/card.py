"""The model card: metadata for the Hub, and in words what the student is and how it was made."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mmkd.recipe import ModelConfig, ReleaseConfig, StageConfig, TeacherConfig
from mmkd.release.papers import papers
from mmkd.release.scrub import file_name
from mmkd.release.source import Source
from mmkd.report.metrics import COST, Column
from mmkd.report.rundata import Scores, student_size
from mmkd.report.summary import describe_objectives
from mmkd.report.tables import Scored, Table, compact, format_value, make_tables, scored_models

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
    """The card; everything in it comes from the run and from `settings`."""
    table = score_table(source)
    parameters, size = student_size(source.student) or (0, 0)
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cell=cell, compact=compact, heading=heading)
    text = environment.get_template("card.md").render(
        title=title(source, settings),
        address=settings.repo or "path/to/this/folder",
        settings=settings,
        source=source,
        parameters=parameters,
        size=size,
        teacher=model_text(source, source.recipe.teacher),
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
    )  # fmt: skip
    return ModelCard(f"---\n{metadata(source, settings).to_yaml()}\n---\n\n{text}")


def title(source: Source, settings: ReleaseConfig) -> str:
    """The repository's name, or the run's."""
    return settings.repo.split("/")[1] if settings.repo else source.name


def metadata(source: Source, settings: ReleaseConfig) -> ModelCardData:
    """What the Hub reads of the card."""
    return ModelCardData(
        base_model=base_models(source) or None,
        datasets=settings.datasets or None,
        language=settings.language or None,
        license=settings.license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["mmkd", *(["distillation"] if source.taught else []), *settings.tags],
        model_name=title(source, settings),
        eval_results=evaluation_results(source) or None,
    )


def base_models(source: Source) -> list[str]:
    """Hub ids of the models that the student comes from: its start, and its teacher."""
    teacher = source.recipe.teacher if source.taught else None
    names = [config.model for config in (source.recipe.student, teacher) if config]
    return list(dict.fromkeys(name for name in names if name and source.on_hub(name)))


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
                data=", ".join(
                    file_name(p.name or p.train) for p in source.recipe.stage_data(stage).parts
                ),
                steps=log.steps or 0,
                records=stage.batch.records_per_step(processes),
                lr=stage.optimizer.lr,
            )
        )
    return rows


def _objectives(stage: StageConfig) -> str:
    text = describe_objectives([o.model_dump() for o in stage.objectives])
    if stage.on_policy is None:
        return text
    return f"{text}; {stage.on_policy.lmbda:.0%} of the answers sampled from the student"


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
    return f"[{config.model}](https://huggingface.co/{config.model})"


def start_text(source: Source) -> str:
    """What the student was before it was converted and trained."""
    student, teacher = source.recipe.student, source.recipe.teacher
    if source.taught and teacher is not None and student.model and student.model == teacher.model:
        return "the teacher itself"
    return model_text(source, student)


def cell(value: Any) -> str:
    """Text that stays within its cell of a Markdown table, and is no HTML."""
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")


def heading(column: Column) -> str:
    """A metric's name, with its unit and where less is better."""
    unit = " %" if column.unit == "percent" else ""
    lower = column.better == "lower" and column.key[0] != COST
    return f"{column.name}{unit}{' (lower is better)' if lower else ''}"
