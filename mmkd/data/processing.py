"""A model's processor on rendered conversations and their pictures."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from mmkd.data.images import load_image
from mmkd.data.picture_cache import PictureCache
from mmkd.errors import DataError

MOVED = "text_replacement_offsets"
Size = tuple[int, int]


class Processing:
    """Calls a processor as its family wants it.

    Args:
        processor: a model's.
        cache: folder of what it makes of pictures, if that is kept.
    """

    def __init__(self, processor: Any, cache: Path | None = None):
        self.picture = load_image
        if cache is not None:
            pictures = PictureCache(cache, processor.image_processor)
            processor = copy.copy(processor)
            processor.image_processor = pictures
            self.picture = pictures.picture
        self.processor = processor
        # Idefics-like processors want the pictures of each row apart, the others one flat list.
        self._nested = hasattr(processor, "fake_image_token")
        self._picture_tokens = lru_cache(maxsize=None)(self._count_picture_tokens)

    def __call__(
        self, texts: Sequence[str], pictures: Sequence[list[Image.Image]], side: str = "right"
    ) -> dict[str, Any]:
        """Padded inputs of conversations, with offsets of tokens and of what replaced placeholders.

        Args:
            texts: rendered, with a placeholder for each picture.
            pictures: of each text.
            side: where padding goes, left or right.

        Raises:
            DataError: the processor refuses them.
        """
        flat = [p for row in pictures for p in row]
        images: Any = (list(pictures) if self._nested else flat) if flat else None
        try:
            encoded = self.processor(
                text=list(texts),
                images=images,
                padding=True,
                padding_side=side,
                add_special_tokens=not self._template_writes_bos(texts[0]),
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                # Idefics3 would try to turn the replacement offsets into a tensor too.
                return_tensors=None if self._nested else "pt",
            )
            moved = encoded.pop(MOVED, None)
            encoded.convert_to_tensors("pt")
            return {**encoded, MOVED: moved}
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"the processor refuses it: {reason}",
                mend="check the record's images and placeholders",
            ) from error

    def length(self, text: str, sizes: Sequence[Size]) -> int:
        """Tokens of one conversation, without processing its pictures.

        Args:
            text: rendered.
            sizes: width and height of its pictures.
        """
        special = not self._template_writes_bos(text)
        words = self.processor.tokenizer(text, add_special_tokens=special)["input_ids"]
        return len(words) + sum(self._picture_tokens(size) for size in sizes)

    def _count_picture_tokens(self, size: Size) -> int:
        """Tokens that a picture adds to its placeholder; its size alone decides."""
        text = self.processor.image_token
        blank = [[Image.new("RGB", size)]]
        alone = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        whole = self.processor(
            text=[text], images=blank if self._nested else blank[0], add_special_tokens=False
        )["input_ids"][0]
        return len(whole) - len(alone)

    def _template_writes_bos(self, text: str) -> bool:
        bos = self.processor.tokenizer.bos_token
        return bos is not None and text.startswith(bos)

    @property
    def image_token_id(self) -> int:
        """The id of the token that image features replace."""
        known = getattr(self.processor, "image_token_id", None)
        if known is not None:
            return known
        return self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
