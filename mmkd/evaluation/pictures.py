"""Pictures of lmms-eval's documents. A broken picture affects its own document only."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from PIL import Image

from mmkd.errors import DataError


class UnreadablePicture(Image.Image):
    """Takes the place of a picture that cannot be decoded. Reading its pixels raises DataError."""

    def __init__(self, reason: str):
        super().__init__()
        self.reason = reason

    def load(self) -> Any:
        raise DataError(self.reason, mend="replace the picture")


@contextmanager
def broken_pictures_wait() -> Iterator[None]:
    """Inside, a picture that cannot be decoded raises when it is used, not when it is read.

    `datasets` decodes a picture when it reads the document. lmms-eval reads all documents in one
    loop, and the first broken picture would end that loop.
    """
    import datasets

    decode = datasets.Image.decode_example

    def decoded(self: Any, value: Any, token_per_repo_id: Any = None) -> Any:
        try:
            return decode(self, value, token_per_repo_id)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise many types for broken bytes
            if _is_remote(value):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            return UnreadablePicture(f"the picture cannot be read ({reason})")

    with mock.patch.object(datasets.Image, "decode_example", decoded):
        yield


def _is_remote(value: Any) -> bool:
    path = value.get("path") if isinstance(value, dict) else value
    held = isinstance(value, dict) and value.get("bytes") is not None
    return not held and isinstance(path, str) and "://" in path
