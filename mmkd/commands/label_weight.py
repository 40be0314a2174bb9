"""`mmkd label-weight`: how much the data's labels should weigh against the teacher.

Two students are run over held-out records: one was trained with `ce` alone, the other with `kl`
alone. With q1(y) and q2(y) their probabilities of the true answer tokens, the label weight is

    a = argmin over [0, 1] of -sum log(a q1(y) + (1 - a) q2(y)).

What is exact: at temperature 1, a ce + (1 - a) kl has the value of KL(a 1[y] + (1 - a) p || q) up
to a constant, and so its gradient, where p is the teacher. What is an estimate: the mixture of the
two students' distributions stands in for the student that would be trained with these weights. This
is in the spirit of Borup & Andersen (arXiv 2102.13088), who have a closed form of the weight on
validation data for kernel ridge regression, where the student of a mixture is the mixture of the
students.
"""

from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.commands.held_out import answer_batches, held_out_records
from mmkd.data.alignment import same_processor
from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.vocabulary import check_head, same_vocabulary, token_count
from mmkd.errors import CheckpointError, DataError
from mmkd.evaluation.calibration import answer_rows, inputs_as
from mmkd.modeling.capture import capture, check_supported
from mmkd.modeling.loading import load_model, load_processor
from mmkd.ops import token_logps
from mmkd.ops.mixture_weight import fit_mixture_weight, mixture_nll
from mmkd.recipe import ModelConfig, Recipe
from mmkd.runtime import distributed
from mmkd.runtime.progress import console
from mmkd.training.validation import chosen

PLACES = 4
"""Decimals of weights in the recipe's lines."""
AT_BOUND = {
    0.0: "The minimum is at 0: on these records, the student of the labels improves no mixture. "
    "Train with kl alone, or give more records.",
    1.0: "The minimum is at 1: on these records, the student of the teacher improves no mixture. "
    "Train with ce alone, or give more records.",
}


def label_weight(
    recipe: Recipe,
    labels: str,
    teacher: str,
    *,
    data: str | None = None,
    images: str | None = None,
    records: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """The weight of `ce`, against `kl`, with the best mixture of two students on held-out records.

    Args:
        recipe: gives the held-out records, and the students' `dtype`.
        labels: folder or Hub id of a student that was trained with `ce` alone.
        teacher: of a student that was trained with `kl` alone.
        data: held-out records, written as in `data.train`; None takes `data.validation`.
        images: folder that image paths of `data` are relative to; None takes the recipe's.
        records: largest number of records, evenly spread; None takes all.
        batch_size: records per forward pass.
        device: where the students run.

    Returns:
        `weight`, of the labels; `nll`, the mean negative log-likelihood of an answer token under
        each student and the mixture; the students, the data, and numbers of records and tokens.

    Raises:
        RecipeError: no records are held out.
        CheckpointError: a student cannot be loaded, or their tokenizers or processors differ.
        DataError: a record is bad, or the students are equal on all answer tokens.
    """
    held_out, settings = held_out_records(recipe, data, images)
    like = recipe.student
    how = {"dtype": like.dtype, "attn_implementation": like.attn_implementation}
    named = {"labels": labels, "teacher": teacher}
    sources = {name: ModelConfig(model=model, **how) for name, model in named.items()}
    encoder = Encoder(held_out, shared_processor(sources), settings)
    indices = chosen(encoder, records)
    logps = answer_logps(sources, encoder, indices, batch_size, distributed.choose_device(device))
    pair = (logps["labels"], logps["teacher"])
    try:
        weight = fit_mixture_weight(*pair)
    except ValueError as error:
        raise DataError(
            f"there is no best weight: {error}",
            where=f"{labels} and {teacher}",
            hint="give two students that were trained differently, one with ce and one with kl",
        ) from error
    shares = {"labels": 1.0, "teacher": 0.0, "mixture": weight}
    return {
        "labels": labels,
        "teacher": teacher,
        "data": encoder.records.name,
        "records": len(indices),
        "tokens": len(pair[0]),
        "weight": weight,
        "nll": {name: mixture_nll(*pair, share) for name, share in shares.items()},
    }


def shared_processor(sources: dict[str, ModelConfig]) -> Any:
    """The processor of two students.

    Args:
        sources: of both.

    Raises:
        CheckpointError: one cannot be loaded, or tokenizers or processors differ.
    """
    first, second = (load_processor(source) for source in sources.values())
    if not same_vocabulary(first.tokenizer, second.tokenizer):
        differing = "tokenizers"
    elif not same_processor(first, second):
        differing = "processors"
    else:
        return first
    raise CheckpointError(
        f"the students have different {differing}",
        where=" and ".join(str(source.model) for source in sources.values()),
        hint="give two students of the same recipe",
    )


@torch.no_grad()
def answer_logps(
    sources: dict[str, ModelConfig],
    encoder: Encoder,
    indices: list[int],
    batch_size: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Log-probabilities of the true answer tokens under several models, each [N] on the CPU.

    Args:
        sources: the models, by name.
        encoder: of the records, with the processor of all models.
        indices: of the records.
        batch_size: records per forward pass.
        device: where the models run, all at the same time.

    Raises:
        CheckpointError: a model cannot be loaded, or is not supported.
        DataError: a record is bad, or none has an answer.
    """
    encoder.encode(indices[:1])  # a bad first record is refused before the weights are loaded
    vocabulary = token_count(encoder.processor.tokenizer)
    models = {}
    for name, source in sources.items():
        model = load_model(source)
        check_supported(model, str(source.model))
        check_head(model, encoder.processor.tokenizer, str(source.model))
        models[name] = torch.nn.Module.to(model, device)
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    for batch in answer_batches(encoder, indices, batch_size, device, "students"):
        for name, model in models.items():
            found[name].append(_logps(model, batch, vocabulary).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def _logps(model: PreTrainedModel, batch: Batch, vocabulary: int) -> Tensor:
    """Log-probabilities [N] of the true answer tokens of a batch."""
    signals = capture(model, inputs_as(batch, model.dtype))
    hidden, true = answer_rows(signals, batch.targets)
    return token_logps(
        hidden, signals.head_weight, true, bias=signals.head_bias, vocab_size=vocabulary
    )


def recipe_lines(weight: float) -> str:
    """The lines of a recipe with a label weight. An objective of weight 0 is left out.

    Args:
        weight: of the labels, in [0, 1].
    """
    labels = round(weight, PLACES)
    shares = {"ce": labels, "kl": round(1 - labels, PLACES)}
    if 1.0 in shares.values():
        shares = {kind: share for kind, share in shares.items() if share}
    lines = [f"  - {{kind: {kind}, weight: {share:g}}}" for kind, share in shares.items()]
    return "\n".join(["objectives:", *lines])


def print_label_weight(found: dict[str, Any]) -> None:
    """Print what `label_weight` has found."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "trained with", "weight", "NLL"):
        left = name in ("", "trained with")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    weight, nll = found["weight"], found["nll"]
    table.add_row("labels", "ce", f"{weight:.4f}", f"{nll['labels']:.4f}")
    table.add_row("teacher", "kl", f"{1 - weight:.4f}", f"{nll['teacher']:.4f}")
    table.add_row("mixture", "", "", f"{nll['mixture']:.4f}")
    lines = [f"labels: {found['labels']}", f"teacher: {found['teacher']}"]
    lines.append(
        f"{found['tokens']:,} answer tokens of {found['records']:,} records of {found['data']}"
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    if weight in AT_BOUND:
        console.print(f"Warning: {AT_BOUND[weight]}", highlight=False, markup=False)
    console.print("Lines of the recipe, at temperature 1:", highlight=False)
    console.print(recipe_lines(weight), highlight=False, markup=False)
