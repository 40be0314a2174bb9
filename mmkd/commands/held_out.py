"""A recipe's held-out records in batches, for commands that run models over true answers."""

from collections.abc import Iterator

import torch

from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import DataError, MmkdError, RecipeError
from mmkd.recipe import DataConfig, Recipe
from mmkd.runtime import interrupt
from mmkd.runtime.progress import Bar


def held_out_records(
    recipe: Recipe, data: str | None, images: str | None
) -> tuple[Records, DataConfig]:
    """The held-out records of a recipe or of a file, and the settings to encode them with.

    Args:
        recipe: the recipe.
        data: held-out records, written as in `data.train`; None takes `data.validation`.
        images: folder that image paths of `data` are relative to; None takes the recipe's.

    Raises:
        RecipeError: no records are held out.
        MmkdError: `images` without `data`.
        DataError: a source cannot be read.
    """
    if data is not None:
        config = DataConfig(
            train=data,
            images=images or recipe.data.images,
            max_length=recipe.data.max_length,
            on_bad_record=recipe.data.on_bad_record,
        )
        return Records(config), config
    if images is not None:
        raise MmkdError("--images is the folder of --data", where="--images", hint="add --data")
    every = [recipe.data, *(recipe.stage_data(stage) for stage in recipe.stages)]
    found = next((config for config in every if config.validation is not None), None)
    if found is None:
        raise RecipeError(
            "no records are held out", where="data", hint="add 'validation', or give --data FILE"
        )
    return Records(found, held_out=True), found


def answer_batches(
    encoder: Encoder, indices: list[int], batch_size: int, device: torch.device, name: str
) -> Iterator[Batch]:
    """Iterate over records in batches on a device, with a bar.

    Args:
        encoder: of the records.
        indices: of the records.
        batch_size: records per batch.
        device: where the batches are put.
        name: of the work, for the bar.

    Raises:
        DataError: a record is bad, or none has an answer.
    """
    answers = 0
    with Bar(name, len(indices)) as bar:
        for start in range(0, len(indices), batch_size):
            interrupt.stop_here()
            part = indices[start : start + batch_size]
            batch = encoder.encode(part)
            answers += int(batch.targets.predicts("response").sum())
            yield batch.to(device)
            bar.advance(count=len(part))
    if not answers:
        raise DataError(
            "no record has an answer", where=encoder.records.name, hint="give records with answers"
        )
