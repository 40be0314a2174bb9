"""Weights of objectives that are inversely proportional to the norms of their gradients.

    w_i = (c_i / g_i) / sum_j (c_j / g_j)

g_i is the norm of the gradient of objective i at the student's final hidden states, over all rows
of the global batch, and c_i the weight of the recipe. This is GradMag, the balancing of ALM's terms
(Minixhofer, Vulić and Ponti, arXiv 2503.20083; there at the last layer's parameters). The norms are
those of the step before, because a step's gradients are known after its backward passes. They are
in checkpoints, so a run that resumes has equal weights. While no norm is known, w_i = c_i / sum_j
c_j; an objective without a known norm takes the mean of the others, and one without a gradient in a
step keeps its norm.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkd.objectives.base import Objective


class GradientNorms(nn.Module):
    """Measures the norms in each step, and keeps those of the last one.

    Args:
        objectives: of the stage; those with weight 0 keep it.
    """

    norms: Tensor

    def __init__(self, objectives: Sequence[Objective]):
        super().__init__()
        self.given = {o.name: o.config.weight for o in objectives if o.config.weight > 0}
        self.register_buffer("norms", torch.zeros(len(self.given), dtype=torch.float64))
        self.squares: dict[str, Tensor] = {}
        self.weights = self.find_weights()

    def find_weights(self) -> dict[str, float]:
        """The weights of the objectives from the norms of the last step, by name."""
        known = [n for n in self.norms.tolist() if n > 0]
        mean = sum(known) / len(known) if known else 1.0
        norms = dict(zip(self.given, self.norms.tolist(), strict=True))
        shares = {name: c / (norms[name] or mean) for name, c in self.given.items()}
        total = sum(shares.values())
        return {name: share / total for name, share in shares.items()}

    def begin(self, device: torch.device) -> None:
        """Begin a step: find its weights, and forget what was measured."""
        self.weights = self.find_weights()
        self.squares = {n: torch.zeros((), dtype=torch.float64, device=device) for n in self.given}

    def weight_of(self, objective: Objective) -> float:
        """The weight of an objective in this step."""
        return self.weights.get(objective.name, 0.0)

    def watched(self, objective: Objective, hidden: Tensor) -> Tensor:
        """The same hidden states, whose gradient is measured in the backward pass.

        Args:
            objective: the only one that reads what is returned.
            hidden: [B, T, H].
        """
        into = self.squares.get(objective.name)
        return hidden if into is None else _Watch.apply(hidden, into)

    def sums(self) -> Tensor:
        """[objectives], squared norms of this process's gradients, with their weights."""
        return torch.stack([self.squares[name] for name in self.given])

    def end(self, sums: Tensor, scale: float) -> dict[str, float]:
        """End a step: keep its norms. Returns the weights that it had, as metrics.

        Args:
            sums: of `sums` over all processes, on any device.
            scale: the engine's `gradient_scale`.
        """
        for number, name in enumerate(self.given):
            norm = float(sums[number]) ** 0.5 / scale / self.weights[name]
            if norm > 0:
                self.norms[number] = norm
        return {f"{name}/weight": weight for name, weight in self.weights.items()}


class _Watch(torch.autograd.Function):
    """The identity, which adds the squared norm of its gradient to a tensor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, into: Tensor) -> Tensor:
        ctx.into = into
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        (grad,) = grad_outputs
        ctx.into += grad.detach().double().square().sum()
        return grad, None
