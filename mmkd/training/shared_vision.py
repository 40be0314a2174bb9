"""Run a vision tower that teacher and student share only once per batch.

Many students keep their teacher's frozen vision tower. If both towers are bit-equal, the student
uses the outputs of the teacher's tower.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.teachers import LiveTeacher
from mmkd_models.parts import find_parts


class SharedVision:
    """Records outputs of the teacher's tower, and returns them in place of the student's.

    Args:
        teacher, student: models with the same tower, as checked by `share_vision`.
    """

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel):
        self._teacher = _tower(teacher)
        self._student = _tower(student)
        self._calls: list[tuple[Any, Any, Any]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Context manager for the teacher's forward pass, which records outputs."""
        self._calls = []

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._calls.append((args, kwargs, copy.copy(output)))  # models modify outputs

        handle = self._teacher.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Context manager for the student's forward pass on the same batch, which returns the
        recorded outputs."""
        module: Any = self._student
        original, own = module.forward, module.__dict__.get("forward")
        calls = iter(self._calls)

        def forward(*args: Any, **kwargs: Any) -> Any:
            kept = next(calls, None)
            if kept is not None and _equal((args, kwargs), kept[:2]):
                return kept[2]
            return original(*args, **kwargs)

        module.forward = forward
        try:
            yield
        finally:
            del module.forward
            if own is not None:  # another library has set it
                module.forward = own
            self._calls = []


@torch.no_grad()
def share_vision(teacher: LiveTeacher, student: PreTrainedModel) -> SharedVision | None:
    """A `SharedVision`, if the student's tower is bit-equal to the teacher's, frozen, and uses no
    random numbers; otherwise None. Every rank must call it.

    Args:
        teacher: with any placement.
        student: with all weights on this process, after its trainable weights were chosen.
    """
    mine, theirs = find_parts(student).vision, find_parts(teacher.model).vision
    if mine is None or theirs is None or type(mine) is not type(theirs):
        return None
    if any(p.requires_grad for p in mine.parameters()) or _draws(mine):
        return None
    if _settings(mine) != _settings(theirs):
        return None
    left = dict(mine.state_dict())
    prefix = next(n for n, m in teacher.model.named_modules() if m is theirs) + "."
    differ = False
    for name, tensor in teacher.tensors(prefix):  # no early exit: all ranks gather each tensor
        own = left.pop(name.removeprefix(prefix), None)
        differ |= own is None or own.dtype != tensor.dtype
        differ = differ or not torch.equal(own, tensor.to(own.device))
    return None if differ or left else SharedVision(teacher.model, student)


def _settings(module: Any) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if config is None:
        return {}
    said = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
    return {**said, "attention": config._attn_implementation}


def _tower(model: PreTrainedModel) -> nn.Module:
    tower = find_parts(model).vision
    assert tower is not None
    return tower


def _draws(module: nn.Module) -> bool:
    """Whether a module has dropout, as a layer or as a setting."""
    layers = [m.p for m in module.modules() if isinstance(m, nn.Dropout)]
    said = [v for k, v in _settings(module).items() if "drop" in k and isinstance(v, int | float)]
    return any(layers + said)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and bool(a == b)
