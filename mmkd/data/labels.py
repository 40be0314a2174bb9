"""Labels of image tokens, from the boxes of a record's objects."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkd.data.schema import GroundedObject
from mmkd.errors import DataError

IGNORED = -100
Box = tuple[float, float, float, float]


def vision_labels(
    objects: list[tuple[GroundedObject, ...]],
    pictures: list[list[Image.Image]],
    vision: Tensor,
    processor: Any,
    where: Callable[[int], str],
) -> tuple[Tensor, Tensor]:
    """Label image tokens with the names of the objects that they show.

    Args:
        objects, pictures: of each row. Rows without objects or with several images get no labels.
        vision: [B, T] bool, image tokens.
        processor: of the model.
        where: returns the name of a row's record for messages.

    Returns:
        Labels [B, T] int64, `IGNORED` for tokens without one, and the background [B, T] bool: image
        tokens that show no object.
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
                hint="use a processor without tiling or rows",
            )
        named = grid_words(found, view(processor.image_processor, seen[0].size), grid)
        ids = [
            IGNORED if word is None else _last_token(processor.tokenizer, word) for word in named
        ]
        labels[row, vision[row]] = torch.tensor(ids)
        labelled[row] = True
    return labels, vision & labelled & (labels == IGNORED)


@lru_cache(maxsize=65536)
def _last_token(tokenizer: Any, word: str) -> int:
    return tokenizer.encode(word, add_special_tokens=False)[-1]


def view(image_processor: Any, size: tuple[int, int]) -> Box:
    """The part of an image that the model sees, after a centre crop if the processor has one.

    Args:
        image_processor: such as CLIP's.
        size: (width, height) of the image in pixels.

    Returns:
        (left, top, right, bottom) in pixels, beyond the image where it is padded.
    """
    if not getattr(image_processor, "do_center_crop", False):
        return (0, 0, *size)
    edge = image_processor.size
    if not image_processor.do_resize:
        resized: tuple[float, float] = size
    elif edge.get("shortest_edge"):
        scale = edge["shortest_edge"] / min(size)
        resized = (size[0] * scale, size[1] * scale)
    else:
        resized = (edge["width"], edge["height"])
    crop = image_processor.crop_size
    width = size[0] * crop["width"] / resized[0]
    height = size[1] * crop["height"] / resized[1]
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def grid_words(objects: tuple[GroundedObject, ...], seen: Box, grid: int) -> list[str | None]:
    """For each cell of a grid, row by row, the name of the smallest box that covers its centre;
    None if there is none.

    Args:
        objects: names and boxes in pixels.
        seen: the area that the grid covers, in pixels.
        grid: number of cells per side.
    """
    by_area = sorted(
        objects, key=lambda o: (o.box[2] - o.box[0]) * (o.box[3] - o.box[1]), reverse=True
    )
    words: list[str | None] = [None] * grid**2
    left, top, right, bottom = seen
    for cell in range(grid**2):
        x = left + (cell % grid + 0.5) * (right - left) / grid
        y = top + (cell // grid + 0.5) * (bottom - top) / grid
        for obj in by_area:
            x0, y0, x1, y1 = obj.box
            if x0 <= x < x1 and y0 <= y < y1:
                words[cell] = obj.name
    return words
