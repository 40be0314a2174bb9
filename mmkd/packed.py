"""Whether a model keeps packed records apart: seen, not assumed."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.packing import Packing, bins_of
from mmkd.errors import RecipeError
from mmkd.signals import capture
from mmkd.teachers import LiveTeacher

RECORDS = 3
WHOLE = 10**9  # tokens of a row: all records lie in one
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
ROUGH = 5e-2  # in 16 bit


@torch.no_grad()
def check_packing(
    encoder: Encoder, student: PreTrainedModel, teacher: LiveTeacher | None, device: torch.device
) -> None:
    """Run some records packed and alone; every rank calls it.

    Args:
        encoder: of the stage.
        student: whole on this process.
        teacher: placed in any way, or None.
        device: of this rank.

    Raises:
        RecipeError: a model's final hidden states differ.
    """
    apart, together = copy.copy(encoder), copy.copy(encoder)
    apart.pack, together.pack = None, WHOLE
    apart.store = together.store = None
    records = list(range(min(RECORDS, len(encoder.records))))
    alone, packed = (e.encode(records).to(device) for e in (apart, together))
    torch.nn.Module.to(student, device)
    training = student.training
    student.eval()
    one, other = (capture(student, b.inputs).hidden for b in (alone, packed))
    _compare(student, one, other, alone)
    student.train(training)
    if teacher is not None:
        one, other = (teacher.own_signals(b).hidden for b in (alone, packed))
        _compare(teacher.model, one, other, alone)


def _compare(model: PreTrainedModel, alone: Tensor, packed: Tensor, batch: Batch) -> None:
    attention = batch.inputs["attention_mask"].bool().cpu()  # [B, T], a filler's row with it
    packing = Packing(attention, bins_of(attention.sum(1).tolist(), WHOLE))
    source = packing.source.to(alone.device)
    expected = alone.flatten(0, 1)[source[source >= 0]].float()
    found = packed[source >= 0].float()
    distance = float((found - expected).norm() / expected.norm())
    if not distance < TOLERANCE.get(alone.dtype, ROUGH):
        raise RecipeError(
            f"{type(model).__name__} does not keep packed records apart "
            f"(hidden states differ by {distance:.1e})",
            where="batch.pack",
            mend="set it to null: records of alike length share a micro-batch all the same",
        )
