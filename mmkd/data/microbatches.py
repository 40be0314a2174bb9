"""Divide the records of a step into micro-batches, in the same way on every process."""

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
    """Micro-batches of at most `budget` tokens, the same number for each process.

    Records are added to a micro-batch in order until it is full.

    Args:
        records: of a step; their number is a multiple of `processes`.
        lengths: number of tokens of each record.
        budget: number of tokens. A longer record is a micro-batch of its own.
        processes: number of processes.
        packed: records are packed; otherwise they are padded to the longest.
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
    while len(made) % processes:  # ends at the latest when each micro-batch has one record
        largest = max(range(len(made)), key=lambda i: len(made[i]))
        middle = (len(made[largest]) + 1) // 2
        made[largest : largest + 1] = [made[largest][:middle], made[largest][middle:]]
    return made


def check_budget(context: StageContext) -> None:
    """Check that `batch.tokens` is at least `data.max_length`.

    Raises:
        RecipeError: it is not.
    """
    tokens, longest = context.stage.batch.tokens, context.data.max_length
    if tokens is not None and tokens < longest:
        raise RecipeError(
            f"a micro-batch of {tokens} tokens cannot hold a record of max_length {longest}",
            where=f"{context.where}: batch.tokens",
            hint="raise it, or lower data.max_length",
        )


def check_contrast(context: StageContext) -> None:
    """Check that objectives that compare records have at least two of them: in a micro-batch, or in
    a step if they gather.

    Raises:
        RecipeError: there is only one.
    """
    batch, processes = context.stage.batch, distributed.world_size()
    records = batch.records_per_step(processes)
    alone = batch.size == 1 if batch.tokens is None else records == processes
    for objective in context.objectives:
        if not objective.relates_records:
            continue
        if objective.gathers and records == 1:
            raise RecipeError(
                "it compares the records of a step, and each step has one record",
                where=context.at(objective),
                hint="raise batch.size, batch.accumulate or batch.total",
            )
        if alone and not objective.gathers:
            raise RecipeError(
                "it compares the records of a micro-batch, and each micro-batch has one record",
                where=context.at(objective),
                hint="set 'gather: true', or batch.size to 2 or more, or batch.total",
            )
