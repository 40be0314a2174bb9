"""Apply a recipe's `image_size` to a processor and to the config of its model.

Families have different settings for the size of images. Keys of `image_size` that a processor does
not have are refused.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mmkd.errors import RecipeError
from mmkd.recipe import ImageSizeConfig

GRIDS = "image_grid_pinpoints"
OWN_NAMES = {
    "max_patches": "max_patches",
    "max_tiles": "max_patches",
    "min_patches": "min_patches",
    "min_tiles": "min_patches",
    "do_image_splitting": "split",
}
"""Names of image processors for keys of `image_size`. InternVL's `crop_to_patches` is not among
them, since its processor sets it in each call."""
Setter = Callable[[Any], None]


def limit_processor(processor: Any, wanted: ImageSizeConfig | None, name: str) -> None:
    """Set the size to which a processor scales images. `save_pretrained` saves it too.

    Args:
        processor: changed in place.
        wanted: `image_size` of the recipe; None changes nothing.
        name: of the model, for messages.

    Raises:
        RecipeError: the processor has no such setting, or cannot take this value.
    """
    if wanted is None:
        return
    images = processor.image_processor
    known = _setters(images)
    for key, value in wanted.model_dump(exclude_none=True).items():
        if key not in known:
            names = ", ".join(sorted(known))
            raise RecipeError(
                f"{type(images).__name__} has no setting for {key}",
                where=f"image_size of {name}",
                hint=f"it has: {names}" if known else "leave image_size out",
            )
        try:
            known[key](value)
        except ValueError as error:
            raise RecipeError(
                str(error), where=f"image_size of {name}", hint="choose another value"
            ) from error
    low, high = (_number(images, n) for n in ("shortest_edge", "longest_edge"))
    if _counts_pixels(images) and low and high and low > high:
        raise RecipeError(
            f"images would have at least {low:,} and at most {high:,} pixels",
            where=f"image_size of {name}",
            hint="set min_pixels too",
        )


def limit_config(config: Any, wanted: ImageSizeConfig | None, name: str) -> None:
    """Set the size of images in a model's config, to match `limit_processor`.

    LLaVA-NeXT and LLaVA-OneVision compute the number of tiles of an image from it.

    Args:
        config: changed in place.
        wanted: `image_size` of the recipe; None changes nothing.
        name: of the model, for messages.

    Raises:
        RecipeError: none of the config's grids is small enough.
    """
    grids = getattr(config, GRIDS, None)
    if wanted is None or wanted.max_patches is None or not grids:
        return
    try:
        side = config.vision_config.image_size
        setattr(config, GRIDS, _smaller(grids, side, wanted.max_patches))
    except ValueError as error:
        raise RecipeError(
            str(error), where=f"image_size of {name}", hint="choose another value"
        ) from error


def _setters(images: Any) -> dict[str, Setter]:
    """For each key of `image_size` that an image processor has, the function that sets it."""

    def attribute(name: str) -> Setter:
        return lambda value: setattr(images, name, value)

    def part(name: str) -> Setter:
        return lambda value: _set_size(images, name, value)

    def grids(value: int) -> None:
        side = _number(images, "height") or _number(images, "shortest_edge") or 0
        setattr(images, GRIDS, _smaller(getattr(images, GRIDS), side, value))

    found: dict[str, Setter] = {}
    if _counts_pixels(images):
        found |= {"min_pixels": part("shortest_edge"), "max_pixels": part("longest_edge")}
    elif _number(images, "max_pixels"):
        found |= {"min_pixels": part("min_pixels"), "max_pixels": part("max_pixels")}
    elif _number(images, "longest_edge"):
        found["longest_edge"] = part("longest_edge")
    for name, key in OWN_NAMES.items():
        if getattr(images, name, None) is not None:
            found[key] = attribute(name)
    if getattr(images, GRIDS, None):
        found["max_patches"] = grids
    return found


def _counts_pixels(images: Any) -> bool:
    """Whether `size` bounds the number of pixels: Qwen2-VL's family calls the bounds edges."""
    edges = _number(images, "shortest_edge") and _number(images, "longest_edge")
    return bool(edges) and hasattr(images, "merge_size")


def _number(images: Any, name: str) -> int | None:
    size = getattr(images, "size", None)
    return size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)


def _set_size(images: Any, name: str, value: int) -> None:
    if isinstance(images.size, Mapping):
        images.size = {**images.size, name: value}
    else:
        images.size = dataclasses.replace(images.size, **{name: value})
    for own, other in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if other == name and getattr(images, own, None) is not None:
            setattr(images, own, value)


def _smaller(grids: list[list[int]], side: int, most: int) -> list[list[int]]:
    """The grids of at most `most` tiles of `side` x `side` pixels.

    Raises:
        ValueError: all grids have more tiles.
    """
    tiles = [(height // side) * (width // side) for height, width in grids]
    kept = [list(grid) for grid, count in zip(grids, tiles, strict=True) if count <= most]
    if not kept:
        raise ValueError(f"max_patches is {most}, but the smallest grid has {min(tiles)}")
    return kept
