"""A bound on the size of images during a processor's resizing.

Some processors scale an image's shorter edge to a fixed length and then crop the center. They
enlarge a long and narrow image first: 10000 x 2 pixels become 1,680,000 x 336.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.errors import DataError

MOST_PIXELS = 2**25
"""Most pixels of a resized image. They take about 0.35 GB."""


def scaled_edge(processor: Any) -> int | None:
    """The pixels to which a processor scales shorter edges, where it does not bound longer ones.

    Args:
        processor: a model's.

    Returns:
        None if the processor bounds both edges.
    """
    images = processor.image_processor
    # These use `shortest_edge` for both edges of a tile.
    if getattr(images, "image_grid_pinpoints", None) or not getattr(images, "do_resize", True):
        return None
    size = getattr(images, "size", None)
    if size is None:
        return None
    get = size.get if isinstance(size, Mapping) else lambda name: getattr(size, name, None)
    bounds = ("longest_edge", "height", "width", "max_height", "max_width", "max_pixels")
    return None if any(get(name) for name in bounds) else get("shortest_edge")


def check_scaled(size: tuple[int, int], edge: int | None) -> None:
    """Check that an image does not become too large when a processor resizes it.

    Args:
        size: width and height in pixels.
        edge: as `scaled_edge` gives it.

    Raises:
        DataError: the scaled image would have more than `MOST_PIXELS`.
    """
    short, long = sorted(size)
    if edge is not None and edge * edge * long > MOST_PIXELS * short:
        raise DataError(
            f"the processor would resize an image of {size[0]} x {size[1]} to "
            f"{edge * edge * long // max(short, 1):,} pixels",
            hint="crop or drop it; its shorter edge is scaled to a fixed length",
            kind="an image is too long and narrow for the processor",
        )


MOST_CHARACTERS = 2**23
"""Most characters of a record's text. A tokenizer needs 350 bytes for each."""


def check_text(messages: Sequence[Mapping[str, Any]], max_length: int) -> None:
    """Check that the text of a conversation is not much longer than `max_length`.

    Args:
        messages: with content as parts.
        max_length: largest number of tokens of a sequence.

    Raises:
        DataError: it has more than 2^20 characters and more than 64 per token of `max_length`, or
            more than `MOST_CHARACTERS`.
    """
    count = sum(len(part.get("text", "")) for m in messages for part in m["content"])
    limit = min(max(2**20, 64 * max_length), MOST_CHARACTERS)
    if count > limit:
        raise DataError(
            f"its text has {count:,} characters, at most {limit:,} are read",
            hint="cut or drop it",
            kind="too long a text",
        )
