"""Run a model's processor on rendered conversations and their images."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmkd.data.alignment import Grid
from mmkd.data.bounds import check_scaled, scaled_edge
from mmkd.data.image_cache import ImageCache
from mmkd.data.images import load_image
from mmkd.errors import DataError, MmkdError

MOVED = "text_replacement_offsets"
NOT_OF_THE_RECORD = (MmkdError, OSError, MemoryError, ImportError)
"""Exceptions of a processor that the record does not cause: a full disk, a missing package."""
Size = tuple[int, int]


class Processing:
    """Calls a processor with the arguments that its family needs.

    Args:
        processor: of a model.
        cache: folder for the outputs of the image processor; None for no cache.
    """

    def __init__(self, processor: Any, cache: Path | None = None):
        self.picture = load_image
        if cache is not None:
            pictures = ImageCache(cache, processor.image_processor)
            processor = copy.copy(processor)
            processor.image_processor = pictures
            self.picture = pictures.picture
        self.processor = processor
        self._edge = scaled_edge(processor)
        self._picture_tokens = lru_cache(maxsize=None)(self._count_picture_tokens)

    def __call__(
        self, texts: Sequence[str], pictures: Sequence[list[Image.Image]], side: str = "right"
    ) -> dict[str, Any]:
        """Padded inputs of conversations, with offsets of tokens and of expanded placeholders.

        Args:
            texts: rendered conversations, with a placeholder for each image.
            pictures: of each text.
            side: of the padding, left or right.

        Raises:
            DataError: the processor refuses them.
        """
        # Nested by row: some families process an image differently if a record has several.
        images = list(pictures) if any(pictures) else None
        for picture in (picture for row in pictures for picture in row):
            check_scaled(picture.size, self._edge)
        special = not self._template_writes_bos(texts[0])
        try:
            encoded = self.processor(
                text=list(texts),
                images=images,
                padding=True,
                padding_side=side,
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_text_replacement_offsets=True,
                # Tensors are made below: some families would convert replacement offsets too.
                text_kwargs={"return_tensors": None},
                images_kwargs={"return_tensors": "pt"},
            )
            moved = encoded.pop(MOVED, None)
            encoded.convert_to_tensors("pt")
        except NOT_OF_THE_RECORD:
            raise
        except Exception as error:  # families raise many different types
            raise _refused(error) from error
        if special:
            drop_appended(encoded, self.processor.tokenizer, side)
        self._check_text(texts, moved, encoded["offset_mapping"])
        if moved is not None:
            self._check_images(pictures, moved, encoded["input_ids"])
        return {**encoded, MOVED: moved}

    def length(self, text: str, sizes: Sequence[Size]) -> int:
        """Number of tokens of a conversation, without processing its images.

        Args:
            text: rendered conversation.
            sizes: width and height of its images.

        Raises:
            DataError: the processor refuses images of such a size.
        """
        return len(self.offsets(text)) + self.image_tokens(sizes, of=len(sizes))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """(start, end) characters of the tokens of a conversation, without expanding image
        placeholders."""
        special = not self._template_writes_bos(text)
        tokenizer = self.processor.tokenizer
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        found = encoded["offset_mapping"]
        return found[: len(found) - appended_tokens(tokenizer)] if special else found

    def image_tokens(self, sizes: Sequence[Size], *, of: int) -> int:
        """Number of tokens that images add to their placeholders.

        Args:
            sizes: width and height of each image.
            of: number of images of the whole conversation.

        Raises:
            DataError: the processor refuses images of such a size.
        """
        return sum(self._picture_tokens(size, min(of, 2)) for size in sizes)

    def _count_picture_tokens(self, size: Size, count: int) -> int:
        """Number of tokens that an image adds to its placeholder. It depends on the size, and on
        whether the record has one image (`count` 1) or several (2)."""
        check_scaled(size, self._edge)
        text = self.processor.image_token * count
        blank = [Image.new("RGB", size)] * count
        alone = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        try:
            whole = self.processor(text=[text], images=[blank], add_special_tokens=False)
        except NOT_OF_THE_RECORD:
            raise
        except Exception as error:
            raise _refused(error) from error
        return (len(whole["input_ids"][0]) - len(alone)) // count

    def grids(
        self, encoded: dict[str, Tensor], vision: Tensor, pictures: Sequence[int]
    ) -> list[list[Grid]]:
        """Rows and columns of image tokens for each image of each row: from the processor's
        outputs, or a square if these do not contain them.

        Args:
            encoded: outputs of a call.
            vision: [B, T] bool, image tokens.
            pictures: number of images of each row.
        """
        if "image_grid_thw" in encoded:
            merge = self.processor.image_processor.merge_size
            sizes = encoded["image_grid_thw"].tolist()
            grids = [(t * height // merge, width // merge) for t, height, width in sizes]
            ends = list(accumulate(pictures))
            return [grids[end - n : end] for end, n in zip(ends, pictures, strict=True)]
        sides = [
            round((tokens / max(n, 1)) ** 0.5)
            for tokens, n in zip(vision.sum(1).tolist(), pictures, strict=True)
        ]
        return [[(side, side)] * n for side, n in zip(sides, pictures, strict=True)]

    @staticmethod
    def _check_text(texts: Sequence[str], moved: Any, offsets: Tensor) -> None:
        """Check that offsets of tokens refer to the rendered text with expanded placeholders.

        Raises:
            DataError: a token is outside of this text, so the processor has changed it.
        """
        ends = offsets[..., 1].amax(1).tolist()
        for text, replaced, end in zip(texts, moved or [[]] * len(texts), ends, strict=True):
            added = sum(len(r["replacement"]) - len(r["text"]) for r in replaced)
            if end > len(text) + added:
                raise DataError(
                    "the processor adds text to the rendered conversation",
                    hint="choose a family whose chat template writes the whole conversation",
                )

    def _check_images(
        self, pictures: Sequence[Sequence[Any]], moved: Sequence[list[Any]], ids: Tensor
    ) -> None:
        """Check that the numbers of image tokens and image features are equal in each row. If they
        differ, models fail or use the features of another row.

        Args:
            pictures: of each row.
            moved: replacements of the placeholders of each row.
            ids: [B, T] int64.

        Raises:
            DataError: the numbers differ in a row.
        """
        token = self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id)
        there = (ids == self.image_token_id).sum(1).tolist()
        for images, replaced, count in zip(pictures, moved, there, strict=True):
            features = sum(r["replacement"].count(token) for r in replaced)
            if len(replaced) != len(images) or features != count:
                raise DataError(
                    f"its text has {len(replaced)} image placeholder(s) and {count} image tokens, "
                    f"but there are {len(images)} image(s) with {features}",
                    hint=f"do not write {token} in a text, and give each image its placeholder",
                    kind="numbers of image tokens and features differ",
                )

    def _template_writes_bos(self, text: str) -> bool:
        bos = self.processor.tokenizer.bos_token
        return bos is not None and text.startswith(bos)

    @property
    def image_token_id(self) -> int:
        """The id of the token that image features replace."""
        return image_token_id(self.processor)


def image_token_id(processor: Any) -> int:
    """The id of the token that image features replace."""
    # The tokenizer is asked first: Gemma 3's processor has the token before the features.
    for part in (processor.tokenizer, processor):
        known = getattr(part, "image_token_id", None)
        if known is not None:
            return int(known)
    return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token))


def drop_appended(encoded: Any, tokenizer: Any, side: str) -> None:
    """Remove, in place, special tokens that a tokenizer appends to a text, such as the EOS token of
    `add_eos_token`. Chat templates write their own, and no answer can follow an EOS token.

    Args:
        encoded: tensors by name; tensors of tokens are [B, T, ...].
        tokenizer: that made them.
        side: of the padding, left or right.
    """
    count = appended_tokens(tokenizer)
    if not count:
        return
    ids, attention = encoded["input_ids"], encoded["attention_mask"]
    rows, length = ids.shape
    if side == "right":
        ends = attention.sum(1, keepdim=True)  # [B, 1]
        at = torch.arange(length)[None, :]
        appended = (at >= ends - count) & (at < ends)  # [B, T]
        ids[appended] = tokenizer.pad_token_id
        attention[appended] = 0
        if "offset_mapping" in encoded:
            encoded["offset_mapping"][appended] = 0
    for name, value in encoded.items():
        if isinstance(value, Tensor) and value.shape[:2] == (rows, length):
            encoded[name] = value[:, : length - count]


@lru_cache(maxsize=32)
def appended_tokens(tokenizer: Any) -> int:
    """Number of special tokens that a tokenizer appends to a text."""
    words = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for first in range(len(whole) - len(words), -1, -1):
        if whole[first : first + len(words)] == words:
            return len(whole) - len(words) - first
    return 0


def _refused(error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    if not isinstance(error, ValueError) or not reason:
        reason = f"{type(error).__name__} {reason}".strip()
    return DataError(
        f"the processor refuses it: {reason}",
        hint="check the record's images and placeholders",
        kind="the processor refuses it",
    )
