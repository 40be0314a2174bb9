"""A cache of the image processor's outputs on disk, so images are decoded and resized only once."""

import hashlib
import json
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import BatchFeature

from mmkd.cache import HASH, picture_hash
from mmkd.data.content import printable
from mmkd.data.images import Member, image_size, load_image
from mmkd.errors import CheckpointError, RecipeError
from mmkd.runtime.files import disk_error

NAME = "mmkd_picture"
"""Key in an image's `info`: its name in the cache."""
VERSION = 2  # of image decoding
MADE = "mmkd_made"
"""Key in an image's `info`: the image processor's output that was read from the disk."""
LISTS = "lists"
CHECKSUM = "checksum"
LEVELS = " levels"


class ImageCache:
    """Replaces the image processor of a processor, and reads its outputs from the disk.

    An image in the cache is not decoded; an empty image of its size is passed to the processor
    instead. Outputs are restored bit by bit. Files that are damaged, or were written without a
    checksum by an older version, are ignored.

    Args:
        folder: of the cache; several processes may write to it at the same time.
        image_processor: the original image processor.

    Raises:
        RecipeError: the output of the image processor for an image depends on the other images of a
            batch.
    """

    def __init__(self, folder: Path, image_processor: Any):
        self._own = image_processor
        said = {"version": VERSION, **image_processor.to_dict()}
        settings = json.dumps(said, sort_keys=True, default=str)
        self._folder = folder / hashlib.sha256(settings.encode()).hexdigest()[:16]
        self._check()

    def __getattr__(self, name: str) -> Any:
        if name == "_own":
            raise AttributeError(name)
        return getattr(self._own, name)

    def picture(self, ref: Any, root: Path | None) -> Image.Image:
        """Decode a record's image to RGB, or return an empty one of its size if it is cached."""
        name = _name(ref, root)
        known = _read(self._path(name))
        if known is None:
            picture = load_image(ref, root)
        else:
            picture = Image.new("RGB", image_size(ref, root))
            picture.info[HASH], picture.info[MADE] = known
        picture.info[NAME] = name
        return picture

    def __call__(self, images: Sequence[Sequence[Image.Image]], **settings: Any) -> BatchFeature:
        return _joined([self._single(image, settings) for row in images for image in row])

    def _single(self, image: Image.Image, settings: dict[str, Any]) -> dict[str, Any]:
        name = image.info.get(NAME)
        if name is None:
            return dict(self._own([image], **settings))
        if MADE in image.info:
            return dict(image.info[MADE])
        made = dict(self._own([image], **settings))
        _write(self._path(name), made, picture_hash(image).hex())
        return made

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name}.safetensors"

    def _check(self) -> None:
        pictures = [Image.new("RGB", size, "white") for size in ((97, 53), (40, 200), (64, 64))]
        settings = {"return_tensors": "pt"}
        try:
            alone = _joined([dict(self._own([p], **settings)) for p in pictures])
            together = self._own([pictures[:2], pictures[2:]], **settings)
            same = alone.keys() == together.keys() and all(
                torch.equal(torch.as_tensor(alone[k]), torch.as_tensor(together[k])) for k in alone
            )
        except (ValueError, RuntimeError):  # shapes that cannot be joined
            same = False
        if not same:
            raise RecipeError(
                f"outputs of {type(self._own).__name__} depend on other images of a batch",
                where="data.image_cache",
                hint="leave it out for this family",
            )


def _name(ref: Any, root: Path | None) -> str:
    """The name of an image in the cache, from its bytes, or its path, time and size."""
    found = hashlib.blake2b(digest_size=16)
    if isinstance(ref, dict) and isinstance(ref.get("bytes"), bytes):
        found.update(ref["bytes"])
    elif isinstance(ref, Image.Image):
        found.update(picture_hash(ref))
    elif isinstance(ref, Member):
        found.update(repr((ref.offset, ref.size, *_facts(Path(ref.archive)))).encode())
    else:
        path = (root or Path()) / str(ref.get("path") if isinstance(ref, dict) else ref)
        found.update(repr(_facts(path)).encode())
    return found.hexdigest()


def _facts(path: Path) -> tuple[str, tuple[int, int] | None]:
    try:
        path = path.resolve(strict=True)
        facts = path.stat()
    except (OSError, ValueError, RuntimeError):  # loading says what is wrong
        return str(path), None
    return str(path), (facts.st_mtime_ns, facts.st_size)


def _joined(parts: list[dict[str, Any]]) -> BatchFeature:
    joined: dict[str, Any] = {}
    for name, first in parts[0].items():
        if isinstance(first, torch.Tensor):
            joined[name] = torch.cat([part[name] for part in parts])
        else:
            joined[name] = [item for part in parts for item in part[name]]
    return BatchFeature(joined)


def _write(path: Path, made: dict[str, Any], content: str) -> None:
    """Write the outputs for an image. Arrays with few different values, such as pixels, are stored
    as indices into their values."""
    arrays: dict[str, np.ndarray] = {}
    lists: dict[str, Any] = {}
    for name, value in made.items():
        if not isinstance(value, torch.Tensor):
            lists[name] = value
            continue
        array = np.ascontiguousarray(value.numpy())
        if array.dtype == np.float32:
            levels, numbers = _levels(array)
            kinds = (k for k in (np.uint8, np.uint16) if len(levels) <= np.iinfo(k).max + 1)
            if (kind := next(kinds, None)) is not None:
                arrays[name + LEVELS], array = levels, numbers.astype(kind)
        arrays[name] = array
    said = {HASH: content, LISTS: json.dumps(lists)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.partial")
        try:
            save_file(arrays, partial, {**said, CHECKSUM: _checksum(arrays, said)})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        known = disk_error(error) if isinstance(error, OSError) else None
        raise CheckpointError(
            known.what if known else f"cannot write ({printable(error)})",
            where=str(path.parent.parent),
            hint="free space and run the same command again, or leave data.image_cache out",
        ) from error


def _checksum(arrays: dict[str, np.ndarray], said: dict[str, str]) -> str:
    """Checksum of the content of a file. It detects damage, not forgery."""
    found = zlib.crc32(json.dumps(said, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        found = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), found)
        found = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, found)
    return f"{found:08x}"


def _levels(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The unique values of a float32 array, and for each element the index of its value."""
    bits = pa.array(array.reshape(-1).view(np.int32)).dictionary_encode()
    levels = bits.dictionary.to_numpy().view(np.float32)
    return levels, bits.indices.to_numpy().reshape(array.shape)


def _read(path: Path) -> tuple[str, dict[str, Any]] | None:
    """The hash of an image and the outputs for it; None if the file is missing or damaged."""
    try:
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = dict(file.metadata() or {})
        if said.pop(CHECKSUM, None) != _checksum(arrays, said):
            return None
        lists = json.loads(said[LISTS])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    made: dict[str, Any] = {}
    for name, array in arrays.items():
        if name.endswith(LEVELS):
            continue
        levels = arrays.get(name + LEVELS)
        made[name] = torch.from_numpy(array if levels is None else levels[array])
    return said[HASH], made | lists
