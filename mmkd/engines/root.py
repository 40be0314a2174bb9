"""The module that an engine runs: the student, and the parameters that objectives have of their
own."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel

Result = TypeVar("Result")

STUDENT, OBJECTIVES = "model", "objectives"


class Root(nn.Module):
    """Runs a function of the model inside of one module's forward pass.

    DeepSpeed gathers the weights of the modules that it sees run. Weights that are read from
    outside of their module, such as the head's, belong to this one. Modules of objectives are a
    part of it, so that they are sharded, gathered and saved like the student's.

    Args:
        model: the student, or a sharded teacher.
        own: modules of objectives, by the objective's name; None if there are none.
    """

    def __init__(self, model: PreTrainedModel, own: nn.ModuleDict | None = None):
        super().__init__()
        self.model = model
        self.objectives = nn.ModuleDict() if own is None else own

    def forward(self, run: Callable[[PreTrainedModel], Result]) -> Result:
        return run(self.model)

    def by_name(self) -> dict[str, nn.Parameter]:
        """All parameters, shared ones once. Those of the student have the names that they have in
        the student; those of objectives begin with `objectives.`."""
        return {_name(name): p for name, p in self.named_parameters()}

    def saved_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Names and buffers that a state dict contains."""
        saved = self.state_dict().keys()
        for name, buffer in self.named_buffers():
            if name in saved:
                yield _name(name), buffer


def _name(name: str) -> str:
    return name.removeprefix(f"{STUDENT}.")
