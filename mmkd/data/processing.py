"""A model's processor on rendered conversations and their images."""

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
"""Exceptions of a processor that are not the record's fault: a full disk, a missing package."""
Size = tuple[int, int]


class Processing:
    """Calls a processor as its family wants it.

    Args:
        processor: a model's.
        cache: folder that keeps processed images; None to keep none.
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
        """Padded inputs of conversations, with offsets of tokens and of replaced placeholders.

        Args:
            texts: rendered, with a placeholder for each image.
            pictures: of each text.
            side: where padding goes, left or right.

        Raises:
            DataError: the processor refuses them.
        """
        # By row: some families treat an image otherwise where it is one of several.
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
                # Not of the text yet: some would make a tensor of the replacement offsets too.
                text_kwargs={"return_tensors": None},
                images_kwargs={"return_tensors": "pt"},
            )
            moved = encoded.pop(MOVED, None)
            encoded.convert_to_tensors("pt")
        except NOT_OF_THE_RECORD:
            raise
        except Exception as error:  # families raise whatever they come upon
            raise _refused(error) from error
        if special:
            drop_appended(encoded, self.processor.tokenizer, side)
        self._check_text(texts, moved, encoded["offset_mapping"])
        if moved is not None:
            self._check_images(pictures, moved, encoded["input_ids"])
        return {**encoded, MOVED: moved}

    def length(self, text: str, sizes: Sequence[Size]) -> int:
        """Tokens of one conversation, without processing its images.

        Args:
            text: rendered.
            sizes: width and height of its images.

        Raises:
            DataError: the processor refuses images of such a size.
        """
        return len(self.offsets(text)) + self.image_tokens(sizes, of=len(sizes))

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """(start, end) characters of the tokens of one conversation, image placeholders as they
        are."""
        special = not self._template_writes_bos(text)
        tokenizer = self.processor.tokenizer
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        found = encoded["offset_mapping"]
        return found[: len(found) - appended_tokens(tokenizer)] if special else found

    def image_tokens(self, sizes: Sequence[Size], *, of: int) -> int:
        """Tokens that images add to their placeholders.

        Args:
            sizes: width and height of each.
            of: images of the whole conversation.

        Raises:
            DataError: the processor refuses images of such a size.
        """
        return sum(self._picture_tokens(size, min(of, 2)) for size in sizes)

    def _count_picture_tokens(self, size: Size, count: int) -> int:
        """Tokens that an image adds to its placeholder; its size decides, and whether it is its
        record's only one (`count` 1) or one of several (2)."""
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
        """Rows and columns of image tokens of each row's images: what the processor says, else a
        square.

        Args:
            encoded: what a call gave.
            vision: [B, T] bool, image tokens.
            pictures: how many each row has.
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
        """Tokens lie in the text as it was rendered, its placeholders written out.

        Raises:
            DataError: a token lies behind that, so all might lie elsewhere than they should.
        """
        ends = offsets[..., 1].amax(1).tolist()
        for text, replaced, end in zip(texts, moved or [[]] * len(texts), ends, strict=True):
            added = sum(len(r["replacement"]) - len(r["text"]) for r in replaced)
            if end > len(text) + added:
                raise DataError(
                    "the processor adds text of its own to the chat template's",
                    hint="choose a family whose chat template writes the whole conversation",
                )

    def _check_images(
        self, pictures: Sequence[Sequence[Any]], moved: Sequence[list[Any]], ids: Tensor
    ) -> None:
        """Check that each row has as many image tokens as image features. If the numbers differ,
        models fail or take the features of another row.

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
        # The tokenizer's first: Gemma 3's processor names the token that it puts before them.
        for part in (self.processor.tokenizer, self.processor):
            known = getattr(part, "image_token_id", None)
            if known is not None:
                return known
        return self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)


def drop_appended(encoded: Any, tokenizer: Any, side: str) -> None:
    """Remove, in place, the special tokens that a tokenizer appends to a text, such as the EOS
    token of `add_eos_token`: chat templates write their own, and an answer cannot follow one.

    Args:
        encoded: tensors by name, those of tokens [B, T, ...], with special tokens.
        tokenizer: the one that made them.
        side: side of the padding, left or right.
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
    """How many special tokens a tokenizer appends to a text."""
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
