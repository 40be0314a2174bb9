"""What image tokens show, by the boxes of a record's objects."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkd.data.schema import GroundedObject
from mmkd.errors import DataError

IGNORED = -100


def vision_labels(
    objects: list[tuple[GroundedObject, ...]],
    pictures: list[list[Image.Image]],
    vision: Tensor,
    tokenizer: Any,
    where: Callable[[int], str],
) -> tuple[Tensor, Tensor]:
    """The word that names what each image token shows, and tokens that show no object.

    Args:
        objects, pictures: of each row; rows without objects or with several pictures get none.
        vision: [B, T] bool, image tokens.
        tokenizer: of the words.
        where: says of a row which record it is.

    Returns:
        Labels [B, T] int64, `IGNORED` where there is none, and background [B, T] bool.
    """
    labels = torch.full(vision.shape, IGNORED)  # [B, T]
    labelled = torch.zeros(len(objects), 1, dtype=torch.bool)
    for row, (found, seen) in enumerate(zip(objects, pictures, strict=True)):
        if len(seen) != 1 or not found:
            continue
        tokens = int(vision[row].sum())
        grid = round(tokens**0.5)
        if grid**2 != tokens:
            raise DataError(
                "token_labels needs image tokens on a square grid",
                where=where(row),
                mend="use a processor without tiling or rows",
            )
        named = grid_words(found, seen[0].size, grid)
        ids = [IGNORED if word is None else _last_token(tokenizer, word) for word in named]
        labels[row, vision[row]] = torch.tensor(ids)
        labelled[row] = True
    return labels, vision & labelled & (labels == IGNORED)


@lru_cache(maxsize=65536)
def _last_token(tokenizer: Any, word: str) -> int:
    return tokenizer.encode(word, add_special_tokens=False)[-1]


def grid_words(
    objects: tuple[GroundedObject, ...], size: tuple[int, int], grid: int
) -> list[str | None]:
    """The word for each cell of a grid x grid picture, row by row: the smallest box that covers
    the cell's centre, None where there is none.

    Args:
        objects: names and boxes in pixels.
        size: (width, height) of the picture in pixels.
        grid: cells per side.
    """
    by_area = sorted(
        objects, key=lambda o: (o.box[2] - o.box[0]) * (o.box[3] - o.box[1]), reverse=True
    )
    words: list[str | None] = [None] * grid**2
    for cell in range(grid**2):
        x = (cell % grid + 0.5) * size[0] / grid
        y = (cell // grid + 0.5) * size[1] / grid
        for obj in by_area:
            left, top, right, bottom = obj.box
            if left <= x < right and top <= y < bottom:
                words[cell] = obj.name
    return words
