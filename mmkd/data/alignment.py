"""Align the tokens of student and teacher if their processors differ.

With the same vocabulary, the k-th response token of the student is the k-th response token of the
teacher. Image tokens are matched one by one if their numbers are equal; otherwise the teacher's
hidden states are interpolated to the student's grid of image tokens. Logits are linear in final
hidden states, so this also interpolates the logits. Responses with different vocabularies are
aligned in chunks: `mmkd.data.chunks`.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmkd.cache import processor_hash
from mmkd.data.vocabulary import shared_vocabulary
from mmkd.errors import CheckpointError, DataError, RecipeError
from mmkd.objectives import Region, Targets
from mmkd.recipe.context import StageContext

Grid = tuple[int, int]  # rows and columns of an image's tokens
ALIGNED: tuple[Region, ...] = ("response", "vision")
"""Regions whose tokens can be aligned between two processors."""


@dataclass(frozen=True)
class Alignment:
    """A sparse matrix that expresses student rows as weighted sums of teacher rows, with n entries.

    Attributes:
        student: [n] int64, rows of the student's [B * T].
        teacher: [n] int64, rows of the teacher's [B * T'].
        weights: [n] float32.
        shape: (B, T) of the student.
    """

    student: Tensor
    teacher: Tensor
    weights: Tensor
    shape: tuple[int, int]

    def __call__(self, x: Tensor) -> Tensor:
        """Map [B, T', D] of the teacher to [B, T, D], zeros for student tokens without a match."""
        terms = x.flatten(0, 1)[self.teacher] * self.weights[:, None].to(x.dtype)
        made = x.new_zeros(self.shape[0] * self.shape[1], x.shape[2])
        return made.index_add(0, self.student, terms).unflatten(0, self.shape)

    def to(self, device: torch.device) -> "Alignment":
        student, teacher, weights = (
            t.to(device) for t in (self.student, self.teacher, self.weights)
        )
        return Alignment(student, teacher, weights, self.shape)


def align(
    student: Targets,
    teacher: Targets,
    grids: list[list[tuple[Grid, Grid]]],
    ids: list[str],
    regions: Collection[Region] = ALIGNED,
) -> Alignment:
    """Align the tokens of a batch that two processors have encoded.

    Args:
        student, teacher: targets of the batch for each processor.
        grids: for each row and image, the student's and the teacher's grid of tokens.
        ids: of the records, for messages.
        regions: regions to align, a subset of `ALIGNED`.

    Raises:
        DataError: the tokens of a response differ, or image tokens do not form their grid.
    """
    nothing = torch.zeros(0, dtype=torch.long)
    terms = [(nothing, nothing, torch.zeros(0))]
    widths = student.attention.shape[1], teacher.attention.shape[1]
    for row, name in enumerate(ids):
        matched = []
        if "response" in regions:
            matched += _responses(student, teacher, row, name)
        if "vision" in regions:
            mine, theirs = (t.vision[row].nonzero()[:, 0] for t in (student, teacher))
            matched += _pictures(mine, theirs, grids[row], name)
        terms += [(s + row * widths[0], t + row * widths[1], w) for s, t, w in matched]
    rows, columns, weights = (torch.cat(part) for part in zip(*terms, strict=True))
    return Alignment(rows, columns, weights, (len(ids), widths[0]))


def _responses(
    student: Targets, teacher: Targets, row: int, name: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Pairs of student and teacher rows that predict the same response token."""
    mine, theirs = (t.response[row].nonzero()[:, 0] for t in (student, teacher))
    shorter = min(len(mine), len(theirs))  # a sequence may be cut at max_length
    mine, theirs = mine[:shorter], theirs[:shorter]
    if not torch.equal(student.input_ids[row, mine], teacher.input_ids[row, theirs]):
        raise DataError(
            f"student and teacher tokenize the response of {name} differently",
            hint="use models of the same tokenizer family",
        )
    return [(mine - 1, theirs - 1, torch.ones(shorter))]


def _pictures(
    mine: Tensor, theirs: Tensor, grids: list[tuple[Grid, Grid]], name: str
) -> list[tuple[Tensor, Tensor, Tensor]]:
    if len(mine) == len(theirs):
        return [(mine, theirs, torch.ones(len(mine)))]
    sizes = [[grid[i][0] * grid[i][1] for grid in grids] for i in (0, 1)]
    if [sum(s) for s in sizes] != [len(mine), len(theirs)]:
        raise DataError(
            f"the images of {name} have {len(mine)} image tokens for the student and "
            f"{len(theirs)} for the teacher, and they do not form grids that could be aligned",
            hint="use processors that make one grid of tokens per image",
        )
    matched = []
    parts = zip(grids, mine.split(sizes[0]), theirs.split(sizes[1]), strict=True)
    for (small, large), rows, columns in parts:
        to, source, weights = resized(large, small)
        matched.append((rows[to], columns[source], weights))
    return matched


@lru_cache(maxsize=256)
def resized(source: Grid, target: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Bilinear interpolation between two grids, with antialiasing for downsampling.

    Returns:
        Terms (target cell [n], source cell [n], weight [n]); the identity for equal grids.
    """
    vertical, horizontal = (_line(s, t) for s, t in zip(source, target, strict=True))
    matrix = torch.einsum("is,jt->ijst", vertical, horizontal).flatten(2).flatten(0, 1)
    to, at = matrix.nonzero().unbind(1)
    return to, at, matrix[to, at].float()


def _line(source: int, target: int) -> Tensor:
    """Interpolation matrix along one side, [target, source]."""
    points = torch.eye(source, dtype=torch.float64)[None, :, None]  # [1, source, 1, source]
    made = torch.nn.functional.interpolate(
        points, size=(1, target), mode="bilinear", antialias=True, align_corners=False
    )
    return made[0, :, 0].T


def same_processor(a: Any, b: Any) -> bool:
    """Whether two processors return the same tokens and pixels for every record."""
    return a is b or processor_hash(a) == processor_hash(b)


def check_compared(context: StageContext) -> None:
    """Check that objectives that need a teacher have one, and that they can compare its tokens with
    the student's if vocabularies or processors differ.

    Raises:
        RecipeError: there is no teacher, or its tokens cannot be compared.
    """
    needing = context.needing("teacher")
    if not needing or context.store is not None:
        return
    if context.teacher_processor is None:
        names = [o.name for o in needing]
        raise RecipeError(
            f"objective {', '.join(names)} needs a teacher",
            where=context.where,
            hint="add 'teacher' to the recipe",
        )
    try:
        shared_vocabulary(context.processor.tokenizer, context.teacher_processor.tokenizer)
    except CheckpointError as error:
        _check_vocabularies(context, error.what)
    if same_processor(context.processor, context.teacher_processor):
        return
    for objective in needing:
        region = getattr(objective.config, "region", "response")
        if "layers" in objective.needs or region not in ALIGNED:
            raise RecipeError(
                "teacher and student have different processors: only response and image tokens "
                "can be aligned, at the models' outputs",
                where=context.at(objective),
                hint="use region response or vision, or models with the same processor",
            )


def _check_vocabularies(context: StageContext, differ: str) -> None:
    """Check that the objectives can compare models with different vocabularies."""
    for objective in context.needing("teacher"):
        region = getattr(objective.config, "region", "vision")
        if not objective.any_vocabulary or region != "vision":
            raise RecipeError(
                f"{differ}, and this objective compares them token by token",
                where=context.at(objective),
                hint="use alm or uld for responses and relation for image tokens, or models of the "
                "same tokenizer family",
            )
