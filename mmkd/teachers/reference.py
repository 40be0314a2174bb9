"""The reference model of preference objectives, which gives log-probabilities of answers.

It runs in every step, or once before the first step. In the second case its log-probabilities are
stored in the stage's folder, under a hash of its weights and of the records' texts and images.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.schema import Record
from mmkd.data.stream import BatchStream
from mmkd.errors import AGAIN, DataError, RecipeError, StoppedError
from mmkd.objectives import Objective, Preference, Signals, TeacherSignals, answer_logps
from mmkd.ops import CHUNK_BYTES
from mmkd.recipe.context import StageContext
from mmkd.runtime import distributed
from mmkd.runtime.files import writing
from mmkd.runtime.interrupt import asked, deferred
from mmkd.runtime.progress import Bar
from mmkd.teachers.live import LiveTeacher
from mmkd.teachers.teacher_set import TeacherSet

FILE = "reference.safetensors"
UNFINISHED = "reference.unfinished.safetensors"
KEY, DONE = "key", "batches"


class LiveReference:
    """Runs the reference model on every batch.

    Args:
        model: the frozen reference model.
        vocabulary: number of tokens that it shares with the student; None for all.
        once: compute and store its log-probabilities before the first step.
        memory: bytes for the logits of a chunk of rows.
        name: name of the teacher, if a teacher of the stage is the reference.
    """

    def __init__(
        self,
        model: LiveTeacher,
        vocabulary: int | None,
        *,
        once: bool = False,
        memory: int = CHUNK_BYTES,
        name: str | None = None,
    ):
        self.model, self.vocabulary, self.once, self.memory = model, vocabulary, once, memory
        self.name = name

    def logps(self, batch: Batch, asked: Mapping[str, TeacherSignals] | None = None) -> Tensor:
        """Log-probability of each sequence's answer, [B].

        Args:
            batch: of preference pairs.
            asked: signals of the stage's teachers on the batch, by name. If the reference is one
                of them, it does not run again.
        """
        found = (asked or {}).get(self.name or "")
        if isinstance(found, Signals) and batch.alignment is None:
            return answer_logps(found, batch.targets, self.vocabulary, self.memory)
        return self.model.answer_logps(batch, self.vocabulary, self.memory)


@dataclass(frozen=True)
class StoredReference:
    """Stored log-probabilities of the two answers of each record, [2] by index of the record."""

    found: dict[int, Tensor]

    def logps(self, batch: Batch, asked: Mapping[str, TeacherSignals] | None = None) -> Tensor:
        """Log-probability of each sequence's answer, [B]; arguments as in `LiveReference`."""
        pairs = torch.stack([self.found[i] for i in batch.indices])  # [B / 2, 2]
        return pairs.T.flatten().to(batch.targets.input_ids.device)


Reference = LiveReference | StoredReference


def reference_name(reference: Reference | None) -> str | None:
    """Name of the teacher that is the reference and runs on every batch; None if there is none."""
    return reference.name if isinstance(reference, LiveReference) else None


def choose_reference(
    objectives: Sequence[Objective], teachers: TeacherSet, own: Callable[[], LiveTeacher]
) -> LiveReference | None:
    """The reference model of a stage's preference objectives; None if there is none.

    Args:
        objectives: of the stage.
        teachers: of the stage.
        own: makes a teacher from the student as it is before the stage.

    Raises:
        RecipeError: the reference is the teacher, and no teacher runs.
    """
    wanted = [o for o in objectives if isinstance(o, Preference) and o.config.reference != "none"]
    if not wanted:
        return None
    settings = wanted[0].config
    teacher = own() if settings.reference == "self" else teachers.primary_model
    if teacher is None:
        raise RecipeError(
            "the reference of the preference objective is the teacher, and there is no teacher",
            where=f"objective {wanted[0].name}",
            hint="add 'teacher' to the recipe, or set reference to self or none",
        )
    return LiveReference(
        teacher,
        wanted[0].shared_vocabulary,
        once=settings.reference_logps == "once",
        memory=wanted[0].head_memory,
        name=next((n for n, t in teachers.members.items() if t is teacher), None),
    )


def store(
    reference: LiveReference,
    stream: BatchStream,
    steps: int,
    folder: Path,
    autocast: Callable[[], AbstractContextManager],
) -> StoredReference:
    """Compute and store log-probabilities for all records of a stage. Every rank must call it.

    If the folder has a file for the same reference and records, it is read instead. An interrupted
    computation is resumed.

    Args:
        reference: runs on this process's share of the records.
        stream: of the stage.
        steps: number of steps of the stage.
        folder: of the stage, for `reference.safetensors`.
        autocast: returns the context manager in which the model runs.
    """
    indices = stream.seen(steps)
    key = _key(reference, stream.encoder, indices)
    path = folder / FILE
    known = _read(path, key)
    if distributed.all_agree(known is not None):
        assert known is not None
        return StoredReference(known)
    batches = distributed.equal_shares(indices, stream.batch.size)
    unfinished = path.with_name(UNFINISHED)
    cut = f"{key} {stream.world_size} {stream.batch.size}"  # these determine the batches
    found = _read(unfinished, cut) or {}
    done = _read_done(unfinished) if distributed.all_agree(bool(found)) else 0
    found = found if done else {}
    new: dict[int, list[float]] = {}
    device = reference.model.device
    with deferred(), Bar("reference", len(batches), done=done, quiet=stream.rank > 0) as bar:
        for number, part in enumerate(batches[done:], done + 1):
            if part or reference.model.spread:
                batch = stream.encoder.encode(part or indices[:1]).to(device)
                with torch.no_grad(), autocast():
                    pairs = reference.logps(batch).float().unflatten(0, (2, -1)).T.tolist()
                new |= zip(batch.indices, pairs, strict=True) if part else {}
            bar.advance()
            if number < len(batches) and asked(device):
                found |= _of_all_ranks(new)
                if stream.rank == 0:
                    _write(unfinished, {KEY: cut, DONE: str(number)}, found)
                distributed.barrier()
                what = f"the reference's pass stopped at batch {number} of {len(batches)}"
                raise StoppedError(what, hint=AGAIN)
        found = dict(sorted((found | _of_all_ranks(new)).items()))
        if stream.rank == 0:
            _write(path, {KEY: key}, found)
            unfinished.unlink(missing_ok=True)
        distributed.barrier()
    return StoredReference(found)


def _of_all_ranks(pairs: dict[int, list[float]]) -> dict[int, Tensor]:
    lines = distributed.gather([json.dumps(pair) for pair in pairs.items()])
    return {index: torch.tensor(pair) for index, pair in map(json.loads, lines)}


def _write(path: Path, facts: dict[str, str], found: dict[int, Tensor]) -> None:
    tensors = {"index": torch.tensor(list(found)), "logps": torch.stack(list(found.values()))}
    with writing(path) as partial:
        save_file(tensors, partial, metadata=facts)


def _read(path: Path, key: str) -> dict[int, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get(KEY) != key:
                return None
            indices, logps = file.get_tensor("index"), file.get_tensor("logps")
    except (OSError, SafetensorError):
        return None
    return dict(zip(indices.tolist(), logps, strict=True))


def _read_done(path: Path) -> int:
    """Number of batches per rank that an interrupted computation has finished."""
    with safe_open(path, "pt") as file:
        return int(file.metadata()[DONE])


def _key(reference: LiveReference, encoder: Encoder, indices: Sequence[int]) -> str:
    """A hash of the reference's weights, the settings of the encoder, and the records."""
    seen = hashlib.sha256()
    _add_weights(seen, reference.model)
    processor = (encoder.teacher or encoder).processor
    said = [processor.chat_template, str(processor.to_dict()), encoder.config.max_length]
    seen.update(json.dumps([*said, reference.vocabulary]).encode())
    for index in indices:
        try:
            _add_record(seen, encoder, encoder.records[index], index)
        except DataError as error:  # a bad record, which the recipe may skip
            seen.update(str(error).encode())
    return seen.hexdigest()


def _add_weights(seen: Any, teacher: LiveTeacher) -> None:
    for name, tensor in teacher.tensors():
        seen.update(name.encode())
        seen.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _add_record(seen: Any, encoder: Encoder, record: Record, index: int) -> None:
    seen.update(json.dumps([index, record.messages, record.rejected]).encode())
    for picture in encoder.records.pictures(record):
        seen.update(picture.tobytes())


def check_reference(context: StageContext) -> None:
    """Check that all preference objectives of a stage have the same reference.

    Raises:
        RecipeError: they have different references.
    """
    settings = [o.config for o in context.objectives if isinstance(o, Preference)]
    if len({(s.reference, s.reference_logps) for s in settings}) > 1:
        raise RecipeError(
            "two preference objectives have different references",
            where=context.where,
            hint="give both the same reference, or use two stages",
        )
