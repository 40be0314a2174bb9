"""Which decoder layers keep their attention, and which become Mamba mixers."""

from mmkd.errors import RecipeError
from mmkd.recipe import Every, Head, Placement, Tail

WHERE = "student.convert: mamba"


def choose(placement: Placement, count: int) -> list[int]:
    """The layers that a placement names, of `count` layers.

    Raises:
        RecipeError: it names layers that are not there.
    """
    if isinstance(placement, Every):
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
            where=WHERE,
            mend=f"name different layers from 0 to {count - 1}",
        )
    return chosen


def converted_layers(keep: Placement | None, convert: Placement | None, count: int) -> list[int]:
    """The layers that become Mamba, from what keeps attention or from what does not.

    Raises:
        RecipeError: nothing is left to convert, or the placement does not fit.
    """
    if convert is not None:
        chosen = choose(convert, count)
    else:
        kept = choose(keep or [], count)
        chosen = [i for i in range(count) if i not in kept]
    if not chosen:
        raise RecipeError(
            f"all {count} layers keep their attention", where=WHERE, mend="keep fewer"
        )
    return chosen


def parse(text: str) -> list[int] | dict[str, int | bool]:
    """A placement of the command line as a recipe writes it.

    Args:
        text: every:4, every:4:last, head:2, tail:2, none or 0,4,8.

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
        else:
            return [int(part) for part in text.split(",")]
    except ValueError:
        pass
    raise RecipeError(
        f"cannot read {text!r}",
        where="placement",
        mend="write every:4, every:4:last, head:2, tail:2, none or 0,4,8",
    )
