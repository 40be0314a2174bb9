"""Check numerically that packing does not leak information between sequences."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.data.encoder import Encoder
from mmkd.data.packing import Packing, bins_of
from mmkd.data.records import Records
from mmkd.errors import DataError, RecipeError
from mmkd.modeling.capture import capture
from mmkd.teachers import LiveTeacher

RECORDS = 3
LOOKED_AT = 64  # number of records that are searched for images
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
ROUGH = 5e-2  # for 16-bit dtypes


@torch.no_grad()
def check_packing(
    encoder: Encoder,
    student: PreTrainedModel,
    teachers: Sequence[LiveTeacher],
    device: torch.device,
) -> None:
    """Run some records packed into two rows, and one by one, and compare final hidden states. Every
    rank must call it.

    Args:
        encoder: of the stage.
        student: with all weights on this process.
        teachers: all live teachers, with any placement.
        device: of this rank.

    Raises:
        RecipeError: the final hidden states of a model differ.
    """
    apart, together = copy.copy(encoder), copy.copy(encoder)
    apart.store = together.store = None
    records = _with_pictures(encoder.records)
    apart.pack = None
    alone = apart.encode(records)
    lengths = alone.inputs["attention_mask"].sum(1).tolist()  # including a filler
    together.pack = sum(sorted(lengths)[-2:])
    packing = Packing(alone.inputs["attention_mask"].bool(), bins_of(lengths, together.pack))
    batches = alone.to(device), together.encode(records).to(device)

    torch.nn.Module.to(student, device)
    training = student.training
    student.eval()
    _compare(student, packing, *(capture(student, b.inputs).hidden for b in batches))
    student.train(training)
    for teacher in teachers:
        _compare(teacher.model, packing, *(teacher.own_signals(b).hidden for b in batches))


def _with_pictures(records: Records) -> list[int]:
    """Some records, first those with images. In a small data set, records are repeated."""

    def without(index: int) -> bool:
        try:
            return not records[index].images
        except DataError:
            return True

    first = sorted(range(min(LOOKED_AT, len(records))), key=without)
    return (first * RECORDS)[:RECORDS]


def _compare(model: PreTrainedModel, packing: Packing, alone: Tensor, packed: Tensor) -> None:
    source = packing.source.to(alone.device)
    expected = alone.flatten(0, 1)[source[source >= 0]].float()
    found = packed[source >= 0].float()
    distance = float((found - expected).norm() / expected.norm())
    if not distance < TOLERANCE.get(alone.dtype, ROUGH):
        raise RecipeError(
            f"{type(model).__name__} does not isolate packed records from each other "
            f"(hidden states differ by {distance:.1e})",
            where="batch.pack",
            hint="set it to null; group_by_length reduces padding without packing",
        )
