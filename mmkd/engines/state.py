"""What training changes in a model and its optimizer, by name: the same for every engine.

`weights/NAME` are trainable parameters and the buffers that a model saves, `optimizer/NAME/STATE`
what an optimizer keeps of a parameter; numbers are tensors without dimensions. Of a 16-bit
parameter that has a float32 copy, both are the copy's.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmkd.engines.masters import Masters

WEIGHTS, OPTIMIZER = "weights", "optimizer"


def changing_weights(
    model: nn.Module, masters: Masters | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters, shared ones once, and saved buffers."""
    for name, parameter in _named(model, masters).items():
        if parameter.requires_grad:
            yield f"{WEIGHTS}/{name}", parameter.detach()
    yield from saved_buffers(model)


def saved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved:
            yield f"{WEIGHTS}/{name}", buffer


@torch.no_grad()
def load_weights(
    model: nn.Module, saved: Mapping[str, Tensor], masters: Masters | None = None
) -> None:
    """Copy what `changing_weights` gave into the model."""
    for key, tensor in changing_weights(model, masters):
        tensor.copy_(saved[key])
    if masters is not None:
        masters.write()


def _named(model: nn.Module, masters: Masters | None) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters()) if masters is None else masters.named(model)


def optimizer_tensors(
    model: nn.Module, optimizer: Optimizer, masters: Masters | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer keeps of the model's parameters."""
    for name, parameter in _named(model, masters).items():
        for state, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{OPTIMIZER}/{name}/{state}", value
            elif value is not None:
                yield f"{OPTIMIZER}/{name}/{state}", torch.tensor(value, dtype=torch.float64)


def load_optimizer(
    model: nn.Module,
    optimizer: Optimizer,
    saved: Mapping[str, Tensor],
    masters: Masters | None = None,
) -> None:
    """Give the optimizer what `optimizer_tensors` gave, on its parameters' devices."""
    kept = saved_states(saved)
    names = {id(p): name for name, p in _named(model, masters).items()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Any]] = {
        i: kept[names[id(p)]] for i, p in enumerate(parameters) if names[id(p)] in kept
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})


def saved_states(saved: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Optimizer states by parameter."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in saved:
        if key.startswith(f"{OPTIMIZER}/"):
            name, state = key.split("/")[1:]
            found.setdefault(name, {})[state] = saved[key]
    return found
