"""`mmkd calibrate`: fit a teacher's temperature on held-out records.

The teacher runs once over the true answers of the records. The final hidden states of the tokens
are kept, and the passes over its head that fit the temperature need nothing else.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from mmkd.commands.held_out import answer_batches, held_out_records
from mmkd.data.encoder import Encoder
from mmkd.data.vocabulary import check_head, token_count
from mmkd.errors import DataError, RecipeError, nearest
from mmkd.evaluation.calibration import answer_rows, inputs_as
from mmkd.modeling.loading import load_model, load_processor
from mmkd.ops.calibration import Reliability, token_predictions
from mmkd.ops.temperature import NoMinimumError, fit_temperature
from mmkd.recipe import Recipe, TeacherConfig
from mmkd.report.calibration import reliability_table
from mmkd.runtime import distributed
from mmkd.runtime.progress import console
from mmkd.teachers.placement import place_teacher
from mmkd.training.validation import chosen


@dataclass(frozen=True)
class Rows:
    """The rows of a teacher that predict answer tokens.

    Attributes:
        hidden: [N, H], final hidden states in the teacher's dtype, on the CPU.
        targets: [N] int64, true tokens, on the CPU.
        head: weight [V, H] and bias [V] or None, on the teacher's device.
        vocabulary: number of the tokenizer's tokens.
        records: number of records.
    """

    hidden: Tensor
    targets: Tensor
    head: tuple[Tensor, Tensor | None]
    vocabulary: int
    records: int


def calibrate(
    recipe: Recipe,
    *,
    teacher: str | None = None,
    data: str | None = None,
    images: str | None = None,
    records: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """Fit the temperature of a recipe's teacher, and measure its calibration before and after.

    Args:
        recipe: the recipe.
        teacher: name of one of several teachers.
        data: held-out records, written as in `data.train`; None takes `data.validation`.
        images: folder that image paths of `data` are relative to; None takes the recipe's.
        records: largest number of records, evenly spread; None takes all.
        batch_size: records per forward pass.
        device: where the teacher runs.

    Raises:
        RecipeError: the recipe has no such teacher, no logits of it, or no held-out records.
        DataError: a record is bad, or no temperature fits.
    """
    config = choose_teacher(recipe, teacher)
    held_out, settings = held_out_records(recipe, data, images)
    encoder = Encoder(held_out, load_processor(config), settings)
    rows = collect(config, encoder, records, batch_size, distributed.choose_device(device))
    weight, bias = rows.head
    shared: dict[str, Any] = {"bias": bias, "vocab_size": rows.vocabulary}
    try:
        temperature = fit_temperature(rows.hidden, weight, rows.targets, **shared)
    except ValueError as error:
        right = not isinstance(error, NoMinimumError) or error.lowest
        raise DataError(
            f"no temperature fits: {error}",
            where=encoder.records.name,
            hint="give more records that the teacher was not trained on"
            if right
            else "its predictions are no better than chance: check its weights, processor and data",
        ) from error
    measured = {}
    for name, value in (("before", 1.0), ("after", temperature)):
        found = Reliability()
        found.add(token_predictions(rows.hidden, weight, rows.targets, temperature=value, **shared))
        measured[name] = found.facts()
    return {
        "teacher": config.model,
        "source": config.source,
        "data": encoder.records.name,
        "records": rows.records,
        "tokens": len(rows.targets),
        "temperature": temperature,
        **measured,
    }


def choose_teacher(recipe: Recipe, name: str | None) -> TeacherConfig:
    """One of a recipe's teachers, whose logits can be computed.

    Args:
        recipe: the recipe.
        name: of the teacher; needed if there are several.

    Raises:
        RecipeError: there is no such teacher, or no logits of it.
    """
    names = [t.name for t in recipe.teachers]
    if not names:
        raise RecipeError("there is no teacher to calibrate", where="teacher", hint="add 'model'")
    if name is None and len(names) > 1:
        raise RecipeError(
            f"there are {len(names)} teachers",
            where="teacher",
            hint=f"choose one with --teacher: {', '.join(names)}",
        )
    if name is not None and name not in names:
        raise RecipeError(f"no teacher {name!r}", where="--teacher", hint=nearest(name, names))
    config = recipe.teachers[0 if name is None else names.index(name)]
    if config.source == "self":
        raise RecipeError(
            "the teacher is the student before each stage, so its temperature changes",
            where="teacher.source",
            hint="calibrate a teacher with weights of its own",
        )
    if config.model is None:
        raise RecipeError(
            "the teacher has no trained weights, and a cache has no logits of other records",
            where="teacher",
            hint="add 'model', the folder or Hub id of the teacher",
        )
    return config


def collect(
    config: TeacherConfig,
    encoder: Encoder,
    most: int | None,
    batch_size: int,
    device: torch.device,
) -> Rows:
    """Run a teacher once over records, and keep the rows that predict answer tokens.

    Raises:
        DataError: a record is bad, or none has an answer.
        CheckpointError: the teacher cannot be loaded, or its processor does not match.
    """
    indices = chosen(encoder, most)
    encoder.encode(indices[:1])  # a bad first record is refused before the weights are loaded
    teacher = place_teacher(load_model(config), config.placement, device)
    check_head(teacher.model, encoder.processor.tokenizer, "teacher")
    hidden, targets = [], []
    for batch in answer_batches(encoder, indices, batch_size, device, "teacher"):
        signals = teacher.signals(replace(batch, inputs=inputs_as(batch, teacher.model.dtype)))
        states, true = answer_rows(signals, batch.targets)
        hidden.append(states.cpu())
        targets.append(true.cpu())
    return Rows(
        torch.cat(hidden),
        torch.cat(targets),
        (signals.head_weight, signals.head_bias),
        token_count(encoder.processor.tokenizer),
        len(indices),
    )


def recipe_lines(temperature: float, source: str) -> str:
    """The lines of a recipe that use a fitted temperature.

    Args:
        temperature: of the teacher.
        source: of the teacher. With a cache, only its stored tokens can have another temperature.
    """
    rest = "rest: drop, " if source == "cache" else ""
    return f"objectives:\n  - {{kind: kl, {rest}teacher_temperature: {temperature:.4g}}}"


def print_calibration(found: dict[str, Any]) -> None:
    """Print what `calibrate` has found."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "temperature", "NLL", "ECE %", "accuracy %", "confidence %"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, temperature in (("before", 1.0), ("after", found["temperature"])):
        facts = found[name]
        shares = [f"{100 * facts[key]:.2f}" for key in ("ece", "accuracy", "confidence")]
        table.add_row(name, f"{temperature:.4g}", f"{facts['nll']:.4f}", *shares)
    console.print(
        f"{found['tokens']:,} answer tokens of {found['records']:,} records of {found['data']}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    console.print(table)
    console.print(reliability_table("after", found["after"]))
    console.print("Lines of the recipe, for each divergence from this teacher:", highlight=False)
    console.print(
        recipe_lines(found["temperature"], found["source"]), highlight=False, markup=False
    )
