"""Perceptual hashes of images, which are kept next to the answers.

    OUT.answers/hashes-RANK.jsonl   a line for each image, under the hash of its file

So an image is hashed once, also if it is moved or renamed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmkd.data.images import load_image
from mmkd.data.twins import HASH_BITS, image_hash
from mmkd.errors import DataError, StoppedError
from mmkd.making.ask import shared
from mmkd.making.requests import image_digest
from mmkd.runtime import distributed, interrupt
from mmkd.runtime.formats import FormatError, parse_json
from mmkd.runtime.json_lines import JsonLines, complete_lines
from mmkd.runtime.progress import Bar

Reference = tuple[Any, Path | None]
DIGITS = HASH_BITS // 4
"""Hexadecimal digits of a hash."""


class ImageHashes:
    """Finds and keeps hashes of images. Every rank has one.

    Args:
        folder: of the files.

    Raises:
        DataError: a line is not a hash.
    """

    def __init__(self, folder: Path):
        self._file = JsonLines(folder / f"hashes-{distributed.rank():05d}.jsonl", sync=False)
        self._known: dict[str, int] = {}
        for path in sorted(folder.glob("hashes-*.jsonl")):
            for number, line in enumerate(complete_lines(path), 1):
                self._known.update([_parsed(line, f"{path}: line {number}")])

    def of(self, reference: Any, root: Path | None) -> int:
        """The hash of an image, of `mmkd.data.twins.image_hash`.

        Raises:
            DataError: it cannot be read.
        """
        key = image_digest(reference, root).hex()
        if key not in self._known:
            value = image_hash(load_image(reference, root))
            self._file.add({"image": key, "hash": f"{value:0{DIGITS}x}"})
            self._known[key] = value
        return self._known[key]

    def of_all(
        self, count: int, references: Callable[[int], Sequence[Reference]], title: str
    ) -> tuple[dict[int, tuple[int, ...]], dict[int, str]]:
        """The hashes of many images. Every rank calls it, and hashes its share.

        Args:
            count: number of items, such as records.
            references: the images of an item.
            title: of the progress bar.

        Returns:
            By index of the item, the hashes of its images; and why items could not be read.

        Raises:
            StoppedError: a process was asked to stop.
        """
        found: dict[int, tuple[int, ...]] = {}
        errors: dict[int, str] = {}
        own, problem = range(distributed.rank(), count, distributed.world_size()), None
        try:
            with Bar(title, len(own), quiet=distributed.rank() > 0) as bar:
                for index in own:
                    interrupt.stop_here()
                    try:
                        found[index] = tuple(self.of(*one) for one in references(index))
                    except DataError as error:
                        errors[index] = str(error)
                    bar.advance(f"{len(errors):,} unreadable" if errors else "")
        except StoppedError as error:
            problem = error
        if not distributed.all_agree(problem is None):
            raise problem or StoppedError("another process was asked to stop")
        return shared(found), shared(errors)


def _parsed(line: bytes, where: str) -> tuple[str, int]:
    try:
        row = parse_json(line)
        key, digits = row["image"], row["hash"]
        if not (isinstance(key, str) and isinstance(digits, str) and len(digits) == DIGITS):
            raise TypeError
        return key, int(digits, 16)
    except (FormatError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            "it is not a hash of an image", where=where, hint="delete the file; it is made again"
        ) from error
