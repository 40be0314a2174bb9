"""Load images of records, from inside of their folder only, with limits on their size.

All images of users, data sets and benchmarks are opened by this module.
"""

import base64
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

from PIL import ExifTags, Image, ImageFile

from mmkd.data.content import printable
from mmkd.errors import DataError

# Pillow supports more formats. Some of them (EPS) start other programs.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""File suffixes of images."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MEMBER_BYTES = 2**28
MOST_PIXELS = 89_478_485  # Pillow's own default, which other libraries change
LONGEST_SIDE = 65_535
"""Most pixels along an edge, as in JPEG. Pillow needs gigabytes to resize longer edges."""
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Operation that turns an image upright, by its EXIF orientation. 5 to 8 swap width and height."""


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, in any depth, by name; links to files are among them."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


@dataclass(frozen=True)
class Member:
    """A file inside of a tar archive, which is read without unpacking the archive.

    Attributes:
        archive: path of the tar.
        name: of the file, for messages only.
        offset, size: of its content, in bytes.
    """

    archive: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its content.

        Raises:
            DataError: it is larger than `MEMBER_BYTES`, or the archive has been cut.
        """
        name = printable(self.name)
        if self.size > MEMBER_BYTES:
            raise DataError(
                f"{name} has {self.size:,} bytes, the limit is {MEMBER_BYTES:,}",
                hint="shrink or drop it",
                kind="too large a file",
            )
        try:
            with open(self.archive, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise DataError(
                f"cannot read {name} ({error.strerror})", kind="archive not readable"
            ) from error
        if len(content) < self.size:
            raise DataError(f"the archive ends within {name}", kind="archive is cut")
        return content


def load_image(ref: Any, root: Path | None) -> Image.Image:
    """Decode one image reference to RGB: upright, the first frame, without transparency.

    Raises:
        DataError: it is missing, outside of `root`, damaged, or too large.
    """
    with _opened(ref, root) as picture:
        return _as_rgb(picture)


def picture_as_rgb(picture: Image.Image) -> Image.Image:
    """An open image in RGB, as `load_image` decodes it.

    Raises:
        DataError: as `load_image`.
    """
    return load_image(picture, None)


def with_eight_bits(value: Any) -> Any:
    """A value of a benchmark's document, with 16-bit images scaled to 8 bits as in `load_image`.

    Benchmarks often call Pillow's `convert`, which clips 16-bit levels.

    Args:
        value: an image, or lists and dicts that may hold images; other values are not changed.

    Raises:
        DataError: an image has levels of 32 bits.
    """
    if isinstance(value, dict):
        return {key: with_eight_bits(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_eight_bits(inner) for inner in value]
    if isinstance(value, Image.Image):
        check_picture(value, "image")
        return _scaled(value).convert("L") if value.mode in SIXTEEN_BITS else value
    return value


def _as_rgb(picture: Image.Image) -> Image.Image:
    orientation = _orientation(picture)
    whole = _scaled(picture).convert("RGB")
    return whole.transpose(TURNS[orientation]) if orientation in TURNS else whole


def _scaled(picture: Image.Image) -> Image.Image:
    """Scale a 16-bit image to 8 bits. Pillow would clip it, so it would be white nearly
    everywhere."""
    if picture.mode not in SIXTEEN_BITS:
        return picture
    return picture.convert("I").point(lambda level: level / 256)


def thumbnail(picture: Image.Image, side: int = 360) -> str:
    """An image as a `data:` URI for a page, at most `side` pixels wide and high."""
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    out = io.BytesIO()
    # Lossless if the file is small, because JPEG artefacts are visible in small drawings.
    kind = "png" if max(small.size) <= 128 else "jpeg"
    small.save(out, kind.upper(), **({"optimize": True} if kind == "png" else {"quality": 85}))
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def image_size(ref: Any, root: Path | None) -> tuple[int, int]:
    """Width and height of the upright image in pixels. Only the header is read.

    Raises:
        DataError: as `load_image`, for problems that the header shows.
    """
    with _opened(ref, root) as picture:
        width, height = picture.size
        return (height, width) if _orientation(picture) >= 5 else (width, height)


def image_content(ref: Any, root: Path | None) -> bytes | None:
    """The bytes of an image's file, which are not checked; None for a decoded image.

    Raises:
        DataError: it is missing, outside of `root`, or cannot be read.
    """
    if isinstance(ref, Image.Image):
        return None
    name, found = _found(ref, root)
    if isinstance(found, io.BytesIO):
        return found.getvalue()
    try:
        return Path(found).read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {name} ({error.strerror})", kind="image not readable"
        ) from error


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation from the header only, so that an image has the same size before and after
    decoding."""
    if picture.format == "TIFF":  # Pillow turns these itself
        return 1
    try:
        # Not the format's own method: PNG's decodes the image to find EXIF data after it.
        found = Image.Image.getexif(picture).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged metadata turn nothing
        return 1
    return found if found in TURNS else 1


@contextmanager
def _opened(ref: Any, root: Path | None) -> Iterator[Image.Image]:
    name = "image"
    try:
        # Importing lmms-eval has Pillow fill cut images up, everywhere and in silence.
        whole = mock.patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
        with whole, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata, thousands of times
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(ref, Image.Image):
                yield check_picture(ref, name)
                return
            name, content = _found(ref, root)
            with Image.open(content, formats=FORMATS) as picture:
                yield check_picture(picture, name)
    except DataError:
        raise
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise too_large(name) from error
    except Exception as error:  # what decoders raise of hostile bytes is no closed list
        raise DataError(
            f"{name} is not a readable image",
            hint=f"replace or drop it; read are {', '.join(FORMATS)}",
            kind="image not readable",
        ) from error


def check_picture(picture: Image.Image, name: str) -> Image.Image:
    """Check an open image, which need not be decoded yet, and return it.

    Args:
        picture: opened by Pillow.
        name: for messages.

    Raises:
        DataError: its format is not supported, it is too large, or has 32 bits per channel.
    """
    if picture.format is not None and picture.format not in (*FORMATS, "MPO"):  # MPO: of phones
        raise DataError(
            f"{name} is an image of the format {printable(picture.format, 20)}",
            hint=f"replace or drop it; read are {', '.join(FORMATS)}",
            kind="image not readable",
        )
    width, height = picture.size
    if (
        width * height > (Image.MAX_IMAGE_PIXELS or MOST_PIXELS)
        or max(width, height) > LONGEST_SIDE
    ):
        raise too_large(name)
    if picture.mode in ("I", "F"):  # the values of black and white are unknown
        raise DataError(
            f"{name} has numbers of 32 bits for pixels",
            hint="store it with 8 or 16 bits a channel",
            kind="pixels of 32 bits",
        )
    return picture


def too_large(name: str) -> DataError:
    """An error for an image that must not be decoded."""
    return DataError(
        f"{name} is too large to decode",
        hint=f"shrink or drop it; at most {MOST_PIXELS:,} pixels, {LONGEST_SIDE:,} along an edge",
        kind="image too large",
    )


def _found(ref: Any, root: Path | None) -> tuple[str, Any]:
    """The name of an image for messages, and its file or content."""
    if isinstance(ref, Member):
        return printable(ref.name), io.BytesIO(ref.read())
    path = ref.get("path") if isinstance(ref, dict) else ref
    if isinstance(ref, dict) and isinstance(ref.get("bytes"), bytes):
        return printable(path or "image"), io.BytesIO(ref["bytes"])
    if not isinstance(path, str) or not path:
        raise DataError("the image is missing", hint="give its path or bytes")
    if root is None:
        raise DataError(
            f"{printable(path)} is a path, and there is no image folder",
            hint="set 'images' of the source",
            kind="no image folder",
        )
    return printable(path), file_below(root, path)


def file_below(root: Path, path: str) -> str:
    """Resolve a path, including links, to a file below `root`.

    Raises:
        DataError: the file is outside of `root`, or does not exist.
    """
    name = printable(path)
    home = _resolved(os.path.abspath(root))
    try:
        target = os.path.realpath(os.path.join(home, path))
    except ValueError as error:  # a null byte
        raise DataError(
            f"no such image: {name}", hint="check data.images", kind="no such image"
        ) from error
    if not target.startswith(os.path.join(home, "")):
        raise DataError(
            f"{name} is outside of {root}",
            hint="keep images, and targets of links, below data.images",
            kind="image outside of its folder",
        )
    if not os.path.isfile(target):
        missing = not os.path.exists(target)
        raise DataError(
            f"no such image: {name}" if missing else f"{name} is not a file",
            hint="check data.images",
            kind="no such image" if missing else "image not readable",
        )
    return target


@lru_cache(maxsize=256)
def _resolved(root: str) -> str:
    return os.path.realpath(root)
