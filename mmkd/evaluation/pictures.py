"""Images of lmms-eval's documents: opened with the limits of training's images.

A document is data of others: it may name any file of this machine, an address, or bytes in a format
for which Pillow starts another program. An image that is refused, or is broken, spoils its own
document and no other.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import Image

from mmkd.data.content import printable
from mmkd.data.images import FORMATS, check_picture, file_below, too_large
from mmkd.errors import DataError


class UnreadablePicture(Image.Image):
    """Takes the place of an image that cannot be decoded. Reading its pixels raises DataError."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason

    def load(self) -> Any:
        raise DataError(self.reason, hint="replace the image")


_ADDRESS = re.compile(r" object at 0x[0-9a-f]+")
"""What Python writes of an object, which differs between processes."""
_folders: list[Path] | None = None
"""Where the images of the documents that are scored now may lie; None outside of `guarded`."""

_pixels: int | None = Image.MAX_IMAGE_PIXELS
"""Most pixels of a document's image: benchmarks of very large ones raise Pillow's limit when they
are imported, which must not hold outside."""


def allow(*folders: Path) -> None:
    """Let documents name images below these folders, inside of `guarded`."""
    if _folders is not None:
        _folders.extend(folder.absolute() for folder in folders)


@contextmanager
def guarded() -> Iterator[None]:
    """Whatever opens an image inside is bound to the formats, sizes and folders of documents.

    Libraries' downloads may be read; `allow` adds the folders of the tasks. An image that is
    refused or broken raises where it is used, not where it is read: `datasets` decodes an image
    when it reads the document, and lmms-eval reads all documents in one loop, which the first
    broken image would end.
    """
    global _folders, _pixels
    import datasets

    outer, decode, pixels = _folders, datasets.Image.decode_example, Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = _pixels
    _folders = [] if outer is None else [*outer]
    allow(*_downloads())

    def decoded(self: Any, value: Any, token_per_repo_id: Any = None) -> Any:
        try:
            return decode(self, _local(value), token_per_repo_id)
        except MemoryError:
            raise
        except Exception as error:  # what decoders raise of hostile bytes is no closed list
            what = error.what if isinstance(error, DataError) else str(error)
            reason = _ADDRESS.sub("", " ".join(what.split()))[:200] or type(error).__name__
            return UnreadablePicture(f"the image cannot be read ({reason})")

    try:
        with (
            mock.patch.object(datasets.Image, "decode_example", decoded),
            mock.patch.object(Image, "open", _guarded(Image.open)),
        ):
            yield
    finally:
        _folders, _pixels, Image.MAX_IMAGE_PIXELS = outer, Image.MAX_IMAGE_PIXELS, pixels


def _downloads() -> list[Path]:
    import datasets
    from huggingface_hub import constants

    found = [constants.HF_HOME, constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]
    return [Path(path) for path in found]


def _guarded(opened: Any) -> Any:
    """`PIL.Image.open` with the limits of `guarded`."""

    def open_picture(fp: Any, mode: Any = "r", formats: Any = None) -> Image.Image:
        name = "image"
        if isinstance(fp, str | bytes | os.PathLike):
            fp = find_picture(os.fsdecode(fp))
            name = printable(fp)
        wanted = FORMATS if formats is None else [f for f in formats if f.upper() in FORMATS]
        try:
            return check_picture(opened(fp, mode, wanted), name)
        except Image.DecompressionBombError as error:
            raise too_large(name) from error

    return open_picture


def _local(value: Any) -> Any:
    """A value of a column of images, with the file that its path names."""
    if isinstance(value, str):
        value = {"path": value, "bytes": None}
    if not isinstance(value, dict) or value.get("bytes") is not None or not value.get("path"):
        return value
    return {"path": find_picture(str(value["path"])), "bytes": None}


def find_picture(path: str) -> str:
    """The file that a document names, which lies in a folder of the documents that are scored.

    Outside of `guarded` it may be any file.

    Raises:
        DataError: it lies elsewhere, on the web for example, or is not there.
    """
    if "://" in path:
        raise DataError(
            f"{printable(path)} lies on the web",
            hint="download it into the folder of the task's data",
            kind="image on the web",
        )
    if _folders is None:
        return file_below(Path(path).absolute().parent, path)
    missing: DataError | None = None
    for folder in dict.fromkeys(_folders):
        try:
            return file_below(folder, path)
        except DataError as error:
            if error.kind != "image outside of its folder":
                missing = error
    raise missing or DataError(
        f"{printable(path)} lies outside of the task's data",
        hint="keep a task's images below the folder of its data files",
        kind="image outside of its folder",
    )
