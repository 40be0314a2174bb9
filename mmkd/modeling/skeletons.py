"""Models without weights, on torch's meta device, with a cache.

`no_init_weights` of transformers also skips initialization, but leaves tied weights untied.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

KEPT = 8
"""Number of models that are cached."""
_INITIALIZERS = frozenset(
    {
        torch.nn.init.uniform_,
        torch.nn.init.normal_,
        torch.nn.init.kaiming_uniform_,
        torch.Tensor.uniform_,
        torch.Tensor.normal_,
    }
)
_kept: OrderedDict[Hashable, PreTrainedModel] = OrderedDict()


class _NoInitialization(TorchFunctionMode):
    """Mode in which functions that draw initial values return their tensor unchanged."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _INITIALIZERS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def without_weights() -> Iterator[None]:
    """Context manager in which new parameters are on torch's `meta` device and are not initialized:
    tensors on this device have no values, but initializing them takes a third of the time."""
    with torch.device("meta"), _NoInitialization():
        yield


def copied(key: Hashable, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Build a model on the meta device, or copy it if the same one was built before.

    Args:
        key: everything that the model depends on.
        make: builds the model; called if there is none for this key.

    Returns:
        A model that the caller may change.
    """
    if key not in _kept:
        _kept[key] = make()
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return copy.deepcopy(_kept[key])
