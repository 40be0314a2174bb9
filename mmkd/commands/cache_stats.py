"""`mmkd cache stats`: how large a teacher's cache is, how fast it reads, how far it is off."""

import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from mmkd.cache import Store
from mmkd.commands.build_cache import needed, reading_stages
from mmkd.data.batch import covered_rows
from mmkd.data.encoder import Encoder
from mmkd.errors import RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.loading import load_model
from mmkd.objectives import Signals
from mmkd.ops import Head, HeadLoss, SparseRows, head_losses
from mmkd.recipe import ModelConfig, Recipe
from mmkd.runtime import distributed
from mmkd.runtime.progress import Bar, console
from mmkd.students import converted_processor, student_at
from mmkd.teachers import place_teacher

READ = 512


def stats(store: Store) -> dict[str, Any]:
    """Size, what the rest holds, and rows read and decoded a second, one record after another."""
    keys = store.keys
    some = keys[:: max(len(keys) // READ, 1)]
    for key in some:  # the disk and the checksums are not what is timed
        store.get(key, "")
    started = time.perf_counter()
    rests = [store.codec.decode(store.get(key, ""))[2] for key in some]
    seconds = time.perf_counter() - started
    rest = torch.cat(rests).exp()
    return {
        "folder": str(store.folder),
        "records": len(store),
        "tokens": store.rows,
        "bytes": store.size,
        "bytes_per_token": store.size / max(store.rows, 1),
        "vocabulary": store.codec.vocabulary,
        "k": store.codec.k,
        "regions": store.manifest["regions"],
        "hidden": store.hidden,
        "rest_mass": float(rest.mean()),
        "tokens_read_per_second": len(rest) / seconds,
    }


@torch.no_grad()
def compare(store: Store, recipe: Recipe, student: str | None, records: int) -> dict[str, Any]:
    """KL of a student from the teacher itself and from the cache, over the first records.

    Args:
        store: of the recipe's teacher.
        recipe: with the teacher's model.
        student: a model folder, or None for the recipe's student before its first stage.
        records: how many.
    """
    stage = next((s for s in reading_stages(recipe) if needed(s, hidden=True)), None)
    if recipe.teacher is None or recipe.teacher.model is None or stage is None:
        raise RecipeError(
            "there is no teacher to compare with", where="teacher", hint="add 'model'"
        )
    device = distributed.choose_device(stage.engine.device)
    teacher = place_teacher(load_model(recipe.teacher), recipe.teacher.placement, device)
    model = student_at(recipe, 0) if student is None else load_model(ModelConfig(model=student))
    torch.nn.Module.to(model, device)
    processor = converted_processor(recipe.student)
    encoder = Encoder.of(stage.objectives, recipe.stage_data(stage), processor, store=store)
    count, size = min(records, len(encoder.records)), stage.batch.size
    sums, tokens, difference = torch.zeros(2, dtype=torch.float64), 0, 0.0
    with Bar("compare", -(-count // size)) as bar:
        for first in range(0, count, size):
            batch = encoder.encode(list(range(first, min(first + size, count)))).to(device)
            rows = covered_rows(batch.targets, store.manifest["regions"]).flatten()
            theirs, mine = teacher.signals(batch), capture(model, batch.inputs)
            assert batch.stored is not None
            whole = _by_row(mine, theirs, rows, store.codec.vocabulary)
            kept = _by_row(mine, batch.stored, rows, store.codec.vocabulary)
            sums += torch.stack([whole.sum(), kept.sum()]).cpu()
            difference += float((whole - kept).abs().sum())
            tokens += len(whole)
            bar.advance()
    full, stored = (sums / tokens).tolist()
    return {
        "student": student or "the recipe's, before its first stage",
        "compared_tokens": tokens,
        "kl": full,
        "kl_stored": stored,
        "mean_absolute_difference": difference / tokens,
        "difference_of_kl": difference / tokens / full,
    }


def _by_row(student: Signals, teacher: Signals | SparseRows, rows: Tensor, width: int) -> Tensor:
    """KL of each row, float64."""
    head = Head(student.hidden.flatten(0, 1), student.head_weight, student.head_bias)
    theirs: Head | SparseRows
    if isinstance(teacher, SparseRows):
        theirs = teacher
    else:
        theirs = Head(teacher.hidden.flatten(0, 1), teacher.head_weight, teacher.head_bias)
    found = []
    for row in rows.nonzero()[:, 0].tolist():
        mask = torch.zeros_like(rows)
        mask[row] = True
        _, value = head_losses(head, [HeadLoss("kl", mask, vocab_size=width)], theirs)
        found.append(value[0].double())
    return torch.stack(found)


def _hidden(kept: dict[str, Any] | None) -> str:
    return "none" if kept is None else f"{', '.join(kept['regions'])}, {kept['width']} numbers each"


def print_stats(found: dict[str, Any]) -> None:
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for label, text in (
        ("cache", Path(found["folder"]).name),
        ("records", f"{found['records']:,}"),
        ("tokens", f"{found['tokens']:,}"),
        ("of regions", ", ".join(found["regions"])),
        ("hidden states of", _hidden(found["hidden"])),
        ("size", f"{found['bytes'] / 1e6:,.1f} MB"),
        ("bytes a token", f"{found['bytes_per_token']:.1f}"),
        ("tokens kept", f"{found['k']} of {found['vocabulary']:,}"),
        ("mass of the rest, mean", f"{100 * found['rest_mass']:.3f} %"),
        ("read, one core", f"{found['tokens_read_per_second']:,.0f} tokens/s"),
    ):
        table.add_row(label, text)
    if "kl" in found:
        table.add_row("student", found["student"])
        table.add_row("KL from the teacher", f"{found['kl']:.6f}")
        table.add_row("KL from the cache", f"{found['kl_stored']:.6f}")
        table.add_row("mean distance, of KL", f"{100 * found['difference_of_kl']:.3f} %")
    console.print(table)
