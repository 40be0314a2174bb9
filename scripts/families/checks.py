"""A verdict for each column of docs/families.md."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mmkd.data.batch import Batch
from mmkd.errors import MmkdError
from mmkd.modeling.capture import capture, check_supported
from mmkd.recipe import MambaConfig, MoeConfig
from mmkd.students import convert
from scripts.families.bench import SAID, CheckError, Workbench, hidden, same


@dataclass(frozen=True)
class Verdict:
    """How a check ended.

    Attributes:
        word: works, refused (by mmkd, in words) or fails.
        reason: one line where it does not work.
    """

    word: str
    reason: str = ""


def teacher(bench: Workbench) -> None:
    """Its distributions over responses and image tokens teach a student of the family."""
    metrics = bench.step(bench.stage(bench.make(1), "one", "other", teacher=bench.make(0)))
    if not all(metrics[name] > 0 for name in ("ce", "kl", "jsd")):
        raise CheckError(f"the losses are {metrics}")


def _trained_and_written(bench: Workbench, conversions: Sequence[Any] = (), **train: Any) -> None:
    """One step changes the student, and its folder loads as the student that was trained."""
    student = bench.make(0)
    convert(student, conversions)
    batch = bench.batch("one", "other")
    before = hidden(student, batch)
    student.train()
    stage = bench.stage(student, "one", "other", **train)
    bench.step(stage)
    after = hidden(student, batch)
    if torch.equal(before, after):
        raise CheckError("a step changes nothing")
    loaded = bench.written(stage, student)
    same("the loaded student's hidden states", hidden(loaded, batch), after, 1e-5)


def dense(bench: Workbench) -> None:
    """A student as the family has it."""
    _trained_and_written(bench)


def sparse(bench: Workbench) -> None:
    """Feed-forward networks become experts."""
    _trained_and_written(bench, [MoeConfig(kind="moe", experts=2, top_k=1, layers="all")])


def hybrid(bench: Workbench) -> None:
    """Attention of the second decoder layer becomes Mamba-2."""
    _trained_and_written(bench, [MambaConfig(kind="mamba", layers=[1])])


def lora(bench: Workbench) -> None:
    """Adapters train and are merged into the folder's weights."""
    groups = ["vision", "connector", "language_model"]
    _trained_and_written(bench, train={"lora": {"groups": groups, "rank": 2}})


def packing(bench: Workbench) -> None:
    """Packed records have the losses and the gradient that they have apart."""
    kinds = ("one", "none", "other")
    found = [
        bench.step(bench.stage(bench.make(1), *kinds, teacher=bench.make(0), batch=batch))
        for batch in ({"pack": 4096}, {})
    ]
    for name in ("ce", "kl", "jsd", "grad_norm"):
        same(name, *(torch.tensor(metrics[name]) for metrics in found))


def _records(bench: Workbench, *kinds: str) -> None:
    """Responses are marked to the token, no record's place in a batch changes what the model makes
    of it, and its length is known without its images."""
    encoder = bench.encoder(*kinds)
    batch = encoder.encode(list(range(len(kinds))))
    _responses(bench, batch)
    together = hidden(bench.model, batch).split(batch.targets.attention.sum(1).tolist())
    for row, kind in enumerate(kinds):
        alone = encoder.encode([row])
        same(f"hidden states of record {kind!r} alone", hidden(bench.model, alone), together[row])
        _looked_at(bench, alone, kind)
        length = int(alone.targets.attention.sum())
        if encoder.length(row) != length:
            raise CheckError(f"{kind!r} has {length} tokens, {encoder.length(row)} are foreseen")
    bench.step(bench.stage(bench.make(0), *kinds))


def _responses(bench: Workbench, batch: Batch) -> None:
    tokenizer = bench.processor.tokenizer
    for row, kind in enumerate(batch.ids):
        ids = batch.targets.input_ids[row][batch.targets.response[row]]
        said = tokenizer.decode(ids, skip_special_tokens=True)
        if said.split() != " ".join(SAID).split() and said.strip() != "".join(SAID):
            raise CheckError(f"the response of {kind!r} is marked as {said!r}")


def _looked_at(bench: Workbench, batch: Batch, kind: str) -> None:
    """Image tokens are the places where what enters the decoder is not an embedding of a word."""
    with torch.no_grad():
        entering = capture(bench.model, batch.inputs).embeddings
        words = bench.model.get_input_embeddings()(batch.inputs["input_ids"])
    replaced = (entering - words).abs().amax(-1) > 1e-6
    if not torch.equal(replaced, batch.targets.vision):
        marked, seen = int(batch.targets.vision.sum()), int(replaced.sum())
        raise CheckError(f"{kind!r}: {seen} image tokens, {marked} are marked")


def several(bench: Workbench) -> None:
    """A batch with a record of two images and a record of one."""
    _records(bench, "several", "one")


def without(bench: Workbench) -> None:
    """A record without an image, alone and in a batch with another that has one."""
    _records(bench, "none", "one")


def frames(bench: Workbench) -> None:
    """A video's frames as a record's images."""
    _records(bench, "frames")


def image_cache(bench: Workbench) -> None:
    """What the image processor makes of an image is the same from the disk."""
    folder = str(bench.folder / "pictures")
    want = bench.batch("one", "other").inputs
    for _ in range(2):  # filled, then read
        got = bench.batch("one", "other", image_cache=folder).inputs
        for name, value in want.items():
            same(name, got[name].float(), value.float(), 0)


CHECKS: dict[str, Callable[[Workbench], None]] = {
    "teacher": teacher,
    "dense": dense,
    "MoE": sparse,
    "hybrid": hybrid,
    "LoRA": lora,
    "packing": packing,
    "several images": several,
    "no image": without,
    "video frames": frames,
    "image cache": image_cache,
}


def verdicts(member: Any, folder: Path) -> dict[str, Verdict]:
    """Every check of one family of the zoo.

    Raises:
        ImportError: its processor wants a package that is not there.
    """
    if member.processor is None:
        found = verdict(lambda: check_supported(member.make(), "student"))
        return dict.fromkeys(CHECKS, found)
    reloads = all(find_spec(package) for package in member.needs)
    bench = Workbench(member.make, member.processor(), folder, reloads=reloads)
    return {column: verdict(partial(check, bench)) for column, check in CHECKS.items()}


def verdict(check: Callable[[], None]) -> Verdict:
    """Run one check."""
    try:
        check()
    except MmkdError as error:
        return Verdict("refused", re.sub(r" \(hidden states differ by .*\)$", "", error.what))
    except CheckError as error:
        return Verdict("fails", str(error))
    except Exception as error:
        return Verdict("fails", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Verdict("works")
