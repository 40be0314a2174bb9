"""`width_pruning`: keep the neurons of each MLP that have the largest weights.

A neuron's weight is the norm of what goes in times the norm of what comes out, |w_in| |w_out|: a
data-free form of the width pruning in Minitron (Muralidharan et al. 2024, arXiv 2407.14679,
section 2.2). Keeping all neurons changes nothing.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.recipe import WidthPruningConfig
from mmkd.students.towers import Tower, TowerConversion
from mmkd_models.moe import SparseFfn

# Names of the projections into and out of the neurons, gated and plain.
FORMS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"))


class WidthPruning(TowerConversion):
    config_class = WidthPruningConfig
    uncut = (SparseFfn,)

    def cut(self, model: PreTrainedModel, tower: Tower) -> str:
        return keep_neurons(tower, getattr(self.config, tower.name))


def keep_neurons(tower: Tower, kept: int) -> str:
    """Cut the MLP of every layer of a tower down to `kept` neurons in place, and fit its config.

    Raises:
        RecipeError: the MLP is of an unknown form, or has fewer neurons.
    """
    before = getattr(tower.config, "intermediate_size", None)
    if before is None or not 0 < kept <= before:
        raise RecipeError(
            f"cannot keep {kept} of {before} neurons",
            where=tower.where,
            hint="give a number up to the model's intermediate_size",
        )
    for layer in tower.layers:
        _cut(_mlp_of(layer, tower.where), kept)
    tower.config.intermediate_size = kept
    return f"kept {kept} of {before} neurons per layer"


def _mlp_of(layer: nn.Module, where: str) -> tuple[nn.Module, tuple[str, ...], str]:
    for module in layer.modules():
        for ins, out in FORMS:
            if all(isinstance(getattr(module, n, None), nn.Linear) for n in (*ins, out)):
                return module, ins, out
    raise RecipeError("no MLP of a known form", where=where)


def _cut(found: tuple[nn.Module, tuple[str, ...], str], kept: int) -> None:
    mlp, ins, out = found
    entering = torch.cat([getattr(mlp, n).weight for n in ins], dim=1)  # [F, inputs]
    leaving = getattr(mlp, out).weight  # [outputs, F]
    weight = entering.detach().norm(dim=1) * leaving.detach().norm(dim=0)  # [F]
    chosen = weight.topk(kept).indices.sort().values
    for n in ins:
        setattr(mlp, n, _linear(getattr(mlp, n), rows=chosen))
    setattr(mlp, out, _linear(getattr(mlp, out), columns=chosen))
    for attribute in ("intermediate_size", "ffn_dim"):
        if hasattr(mlp, attribute):
            setattr(mlp, attribute, kept)


def _linear(
    old: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> nn.Linear:
    """A copy of `old` with only some outputs (rows) or inputs (columns)."""
    weight: Tensor = old.weight.detach()
    bias: Tensor | None = old.bias
    if rows is not None:
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    new.weight = nn.Parameter(weight.clone())
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone())
    return new
