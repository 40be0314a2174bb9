"""What training changes in a student, in the modules of objectives and in the optimizer, by name:
the same for every engine.

`weights/NAME` are trainable parameters and the buffers that a model saves, `optimizer/NAME/STATE`
what an optimizer keeps of a parameter; numbers are tensors without dimensions. Of a 16-bit
parameter that has a float32 copy, both are the copy's. Names of the parameters of objectives begin
with `objectives.`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mmkd.engines.masters import Masters
from mmkd.engines.root import Root

WEIGHTS, OPTIMIZER = "weights", "optimizer"


def changing_weights(root: Root, masters: Masters | None = None) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters, shared ones once, and saved buffers."""
    for name, parameter in _named(root, masters).items():
        if parameter.requires_grad:
            yield f"{WEIGHTS}/{name}", parameter.detach()
    yield from saved_buffers(root)


def saved_buffers(root: Root) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in root.saved_buffers():
        yield f"{WEIGHTS}/{name}", buffer


@torch.no_grad()
def load_weights(root: Root, saved: Mapping[str, Tensor], masters: Masters | None = None) -> None:
    """Copy what `changing_weights` gave into the modules."""
    for key, tensor in changing_weights(root, masters):
        tensor.copy_(saved[key])
    if masters is not None:
        masters.write()


def _named(root: Root, masters: Masters | None) -> dict[str, nn.Parameter]:
    return root.by_name() if masters is None else masters.named(root)


def optimizer_tensors(
    root: Root, optimizer: Optimizer, masters: Masters | None = None
) -> Iterator[tuple[str, Tensor]]:
    """What the optimizer keeps of the parameters."""
    for name, parameter in _named(root, masters).items():
        for state, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{OPTIMIZER}/{name}/{state}", value
            elif value is not None:
                yield f"{OPTIMIZER}/{name}/{state}", torch.tensor(value, dtype=torch.float64)


def load_optimizer(
    root: Root,
    optimizer: Optimizer,
    saved: Mapping[str, Tensor],
    masters: Masters | None = None,
) -> None:
    """Give the optimizer what `optimizer_tensors` gave, on its parameters' devices."""
    kept = saved_states(saved)
    names = {id(p): name for name, p in _named(root, masters).items()}
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
