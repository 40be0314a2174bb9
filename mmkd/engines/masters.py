"""Float32 copies of 16-bit weights, for the torch engine's optimizer.

An update of AdamW is about as large as the learning rate. bfloat16 has 8 bits of mantissa, so that
a weight of 0.1 does not change at all by less than 0.0002. The optimizer therefore changes a
float32 copy, and the student gets its rounded value after every step (Micikevicius et al. 2018,
arXiv 1710.03740, section 3.1). Gradients of micro-steps add up in float32 too.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmkd.engines.root import Root

HALF = (torch.bfloat16, torch.float16)


def needs_master(parameter: Tensor) -> bool:
    """Whether a weight trains, and has too few bits for it."""
    return parameter.requires_grad and parameter.dtype in HALF


class Masters:
    """The float32 copies of trainable 16-bit weights; empty for a float32 student.

    Frozen weights, and trainable ones in float32 such as adapters, have none.

    Args:
        module: the student with the modules of objectives, on its device, its trainable weights
            chosen. From here on `grad` of a weight that has a copy stays None: it is added to the
            copy's.
    """

    def __init__(self, module: nn.Module):
        self._masters = {
            p: nn.Parameter(p.detach().float()) for p in module.parameters() if needs_master(p)
        }
        self._hooks = [p.register_post_accumulate_grad_hook(self._collect) for p in self._masters]

    def __len__(self) -> int:
        return len(self._masters)

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What the optimizer changes in place of a weight: its copy, or the weight itself."""
        return self._masters.get(parameter, parameter)

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """A module's parameters in order, copies in place of those that have one."""
        return (self.of(p) for p in module.parameters())

    def named(self, root: Root) -> dict[str, nn.Parameter]:
        """The same of all parameters, by name."""
        return {name: self.of(p) for name, p in root.by_name().items()}

    def close(self) -> None:
        """Leave the model's gradients to it again."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def write(self) -> None:
        """Round the copies into the student's weights."""
        for parameter, master in self._masters.items():
            parameter.copy_(master)

    def _collect(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        master = self._masters[parameter]
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None
