"""Which decoder layers keep their attention, and which become Mamba mixers."""

from typing import get_args

from mmkd.errors import RecipeError
from mmkd.recipe import Every, Head, Named, Placement, Tail


def choose(placement: Placement, count: int, *, where: str) -> list[int]:
    """The layers that a placement names, of `count` layers.

    Args:
        placement: as a recipe writes it.
        count: of the model's decoder layers.
        where: the conversion, for messages.

    Raises:
        RecipeError: it names layers that are not there.
    """
    if isinstance(placement, str):
        chosen = _named(placement, count)
    elif isinstance(placement, Every):
        first = 0 if placement.first else placement.every - 1
        chosen = list(range(first, count, placement.every))
    elif isinstance(placement, Head):
        chosen = list(range(placement.head))
    elif isinstance(placement, Tail):
        chosen = list(range(count - placement.tail, count))
    else:
        chosen = sorted(placement)
    if len(set(chosen)) != len(chosen) or any(not 0 <= i < count for i in chosen):
        raise RecipeError(
            f"cannot place layers {chosen} in {count} layers",
            where=where,
            hint=f"name different layers from 0 to {count - 1}",
        )
    return chosen


def _named(name: str, count: int) -> list[int]:
    half = count // 2
    return {
        "all": list(range(count)),
        "even": list(range(0, count, 2)),
        "odd": list(range(1, count, 2)),
        "first_half": list(range(half)),
        "second_half": list(range(half, count)),
    }[name]


def converted_layers(
    keep: Placement | None, convert: Placement | None, count: int, *, where: str
) -> list[int]:
    """The layers that become Mamba, from what keeps attention or from what does not.

    Args:
        keep, convert: placements, one of them given.
        count, where: as in `choose`.

    Raises:
        RecipeError: nothing is left to convert, or the placement does not fit.
    """
    if convert is not None:
        chosen = choose(convert, count, where=where)
    else:
        kept = choose(keep or [], count, where=where)
        chosen = [i for i in range(count) if i not in kept]
    if not chosen:
        raise RecipeError(
            f"all {count} layers keep their attention", where=where, hint="keep fewer"
        )
    return chosen


def parse(text: str) -> list[int] | dict[str, int | bool] | str:
    """A placement of the command line as a recipe writes it.

    Args:
        text: every:4, every:4:last, head:2, tail:2, a name (even, odd, all, first_half,
            second_half), none or 0,4,8.

    Raises:
        RecipeError: it is written otherwise.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "every":
            number, _, which = rest.partition(":")
            if which in ("", "first", "last"):
                return Every(every=int(number), first=which != "last").model_dump()
        elif kind == "head":
            return Head(head=int(rest)).model_dump()
        elif kind == "tail":
            return Tail(tail=int(rest)).model_dump()
        elif text == "none":
            return []
        elif text in get_args(Named):
            return text
        else:
            return [int(part) for part in text.split(",")]
    except ValueError:
        pass
    raise RecipeError(
        f"cannot read {text!r}",
        where="placement",
        hint="write every:4, every:4:last, head:2, tail:2, even, odd, none or 0,4,8",
    )
