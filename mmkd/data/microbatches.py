"""How the records of a step are cut into micro-batches, alike on every process."""

from collections.abc import Mapping, Sequence

from mmkd.errors import RecipeError
from mmkd.recipe.context import StageContext
from mmkd.runtime import distributed


def by_size(records: Sequence[int], size: int) -> list[list[int]]:
    """Micro-batches of `size` records each."""
    return [list(records[start : start + size]) for start in range(0, len(records), size)]


def by_tokens(
    records: Sequence[int],
    lengths: Mapping[int, int],
    budget: int,
    processes: int,
    *,
    packed: bool = False,
) -> list[list[int]]:
    """Micro-batches of at most `budget` tokens, as few as cutting in order gives, for each process
    the same number.

    Args:
        records: of a step, a multiple of `processes`.
        lengths: tokens of each record.
        budget: tokens; a record that is longer stands alone.
        processes: that share the micro-batches.
        packed: records lie one behind another; else they are padded to the longest.
    """
    made: list[list[int]] = []
    longest = total = 0
    for record in records:
        length = lengths[record]
        taken = (
            total + length if packed else max(longest, length) * (len(made[-1]) + 1 if made else 1)
        )
        if not made or taken > budget:
            made.append([])
            longest = total = 0
        made[-1].append(record)
        longest, total = max(longest, length), total + length
    while len(made) % processes:  # ends: at the latest when each record stands alone
        largest = max(range(len(made)), key=lambda i: len(made[i]))
        middle = (len(made[largest]) + 1) // 2
        made[largest : largest + 1] = [made[largest][:middle], made[largest][middle:]]
    return made


def check_budget(context: StageContext) -> None:
    """A micro-batch has room for the longest record.

    Raises:
        RecipeError: it has not.
    """
    tokens, longest = context.stage.batch.tokens, context.data.max_length
    if tokens is not None and tokens < longest:
        raise RecipeError(
            f"a micro-batch of {tokens} tokens cannot hold a record of max_length {longest}",
            where=f"{context.where}: batch.tokens",
            hint="raise it, or lower data.max_length",
        )


def check_contrast(context: StageContext) -> None:
    """Objectives that compare the records of a micro-batch get at least two.

    Raises:
        RecipeError: each micro-batch holds one.
    """
    batch, processes = context.stage.batch, distributed.world_size()
    alone = batch.size == 1
    if batch.tokens is not None:
        alone = batch.records_per_step(processes) == processes
    for objective in context.objectives:
        if objective.relates_records and alone:
            raise RecipeError(
                "it compares the records of a micro-batch, and each micro-batch holds one",
                where=context.at(objective),
                hint="set batch.size to 2 or more, or batch.total with batch.tokens",
            )
