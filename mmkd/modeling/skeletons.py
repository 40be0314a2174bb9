"""Models without weights: made quickly, and copied where the same one is asked for again."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

KEPT = 8
"""Number of models that are kept to be copied."""
_INITIALISERS = frozenset(
    {
        torch.nn.init.uniform_,
        torch.nn.init.normal_,
        torch.nn.init.kaiming_uniform_,
        torch.Tensor.uniform_,
        torch.Tensor.normal_,
    }
)
_kept: OrderedDict[Hashable, PreTrainedModel] = OrderedDict()


class _NoValues(TorchFunctionMode):
    """Functions that would draw initial values return their tensor as it is."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _INITIALISERS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, new parameters are on torch's `meta` device. No values are drawn for them: a tensor
    on this device has none, and to draw them takes a third of a model's time."""
    with torch.device("meta"), _NoValues():
        yield


def copied(key: Hashable, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model without weights, which the caller may change.

    Args:
        key: all that the model depends on.
        make: builds the model. It is called where none is kept for this key.
    """
    if key not in _kept:
        _kept[key] = make()
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return copy.deepcopy(_kept[key])
