"""Which decoder layers keep their attention, and which become Mamba mixers."""

from typing import get_args

from mmkd.errors import RecipeError
from mmkd.recipe import EveryNth, FirstLayers, LastLayers, LayerSelection, NamedLayers


def choose(selection: LayerSelection, count: int, *, where: str) -> list[int]:
    """Indices of the layers that a selection names.

    Args:
        selection: as a recipe writes it.
        count: number of decoder layers of the model.
        where: the conversion, for messages.

    Raises:
        RecipeError: it names layers that do not exist.
    """
    if isinstance(selection, str):
        chosen = _named(selection, count)
    elif isinstance(selection, EveryNth):
        first = 0 if selection.first else selection.every - 1
        chosen = list(range(first, count, selection.every))
    elif isinstance(selection, FirstLayers):
        chosen = list(range(selection.head))
    elif isinstance(selection, LastLayers):
        chosen = list(range(count - selection.tail, count))
    else:
        chosen = sorted(selection)
    if len(set(chosen)) != len(chosen) or any(not 0 <= i < count for i in chosen):
        raise RecipeError(
            f"cannot select layers {chosen} of {count}",
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
    keep: LayerSelection | None, convert: LayerSelection | None, count: int, *, where: str
) -> list[int]:
    """Indices of the layers that become Mamba.

    Args:
        keep: the layers that keep attention, if `convert` is None.
        convert: the layers to convert.
        count, where: as in `choose`.

    Raises:
        RecipeError: no layer is left to convert, or the selection names layers that do not exist.
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
    """A selection of layers on the command line, as a recipe writes it.

    Args:
        text: every:4, every:4:last, head:2, tail:2, a name (even, odd, all, first_half,
            second_half), none or 0,4,8.

    Raises:
        RecipeError: `text` has another form.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "every":
            number, _, which = rest.partition(":")
            if which in ("", "first", "last"):
                return EveryNth(every=int(number), first=which != "last").model_dump()
        elif kind == "head":
            return FirstLayers(head=int(rest)).model_dump()
        elif kind == "tail":
            return LastLayers(tail=int(rest)).model_dump()
        elif text == "none":
            return []
        elif text in get_args(NamedLayers):
            return text
        else:
            return [int(part) for part in text.split(",")]
    except ValueError:
        pass
    raise RecipeError(
        f"cannot read {text!r}",
        where="layers",
        hint="write every:4, every:4:last, head:2, tail:2, even, odd, none or 0,4,8",
    )
