"""Truncate batches at `max_length`, and find records whose whole answer is cut off."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.data.chat import Rendered, mark_tokens
from mmkd.data.processing import Processing, Size
from mmkd.data.samples import Sample
from mmkd.errors import DataError
from mmkd.objectives import ObjectiveConfig, Targets
from mmkd.objectives.settings import AffinityConfig, EmbeddingConfig


def truncate(
    batch: Batch,
    samples: Sequence[Sample],
    limit: int,
    image_token: int,
    where: Callable[[int], str],
) -> Batch:
    """Truncate the sequences of a batch.

    Args:
        batch: of the samples, perhaps with a filler row.
        samples: one per row.
        limit: largest number of tokens.
        image_token: id of the token that image features replace.
        where: returns the place of a record for messages.

    Raises:
        DataError: the limit cuts off a part of an image.
    """
    length = batch.targets.input_ids.shape[1]
    if length <= limit:
        return batch
    pictures = batch.inputs["input_ids"] == image_token  # [B, T], or [B + 1, T]
    cut = pictures[:, limit:].any(1).nonzero()[:, 0].tolist()
    if cut:
        raise DataError(
            f"its images have more tokens than max_length {limit}"
            if cut[0] < len(samples)
            else f"a blank image has more tokens than max_length {limit}",
            where=where(samples[min(cut[0], len(samples) - 1)].index),
            hint="raise data.max_length or use smaller images",
        )
    rows = (len(samples), len(batch.inputs["input_ids"]))

    def head(value: Any) -> Any:
        is_sequence = isinstance(value, Tensor) and value.dim() > 1
        if is_sequence and value.shape[0] in rows and value.shape[1] == length:
            return value[:, :limit]
        return value

    targets = Targets(**{k: head(v) for k, v in vars(batch.targets).items()})
    return replace(batch, inputs={k: head(v) for k, v in batch.inputs.items()}, targets=targets)


def check_answers(
    response: Tensor, samples: Sequence[Sample], limit: int, where: Callable[[int], str]
) -> None:
    """Check that each sample with an answer still has at least one token of it.

    Args:
        response: [B, T] bool, of the truncated sequences.
        samples: one per row; for a pair, the chosen and the rejected answer.
        limit: number of tokens at which they were truncated.
        where: returns the place of a record for messages.

    Raises:
        DataError: no token of a record would be trained on.
    """
    for sample, left in zip(samples, response.any(1).tolist(), strict=True):
        if sample.rendered.spans and not left:
            raise no_answer_left(limit).at(where(sample.index))


def no_answer_left(limit: int) -> DataError:
    """The error for a record whose answers begin after `max_length` tokens."""
    return DataError(
        f"max_length {limit} cuts off its whole answer",
        hint="raise data.max_length, use smaller images, or drop the record",
        kind="max_length cuts off the whole answer",
    )


def tokens_before_answer(
    processing: Processing, rendered: Rendered, sizes: Sequence[Size]
) -> int | None:
    """Number of tokens before the first token of an answer, without processing the images; None if
    there is no answer."""
    offsets = processing.offsets(rendered.text)
    marks = mark_tokens(offsets, list(rendered.spans), list(rendered.said))
    if True not in marks:
        return None
    first = marks.index(True)
    images = rendered.text.count(processing.processor.image_token, 0, offsets[first][1])
    return first + processing.image_tokens(sizes[:images], of=len(sizes))


def needs_answers(objective: ObjectiveConfig) -> bool:
    """Whether an objective has no loss on a record whose answer is cut off."""
    return (
        getattr(objective, "region", None) == "response"
        or bool(objective.needs & {"pairs", "chunks"})
        or isinstance(objective, AffinityConfig | EmbeddingConfig)
    )
