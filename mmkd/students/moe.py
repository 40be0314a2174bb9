"""Upcycling: feed-forward networks become experts that start as copies of them (Komatsuzaki et al.
2022, arXiv 2212.05055; LLaVA-MoD, arXiv 2408.15881, section 3.2)."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.recipe import Conversion, MoeConfig
from mmkd.recipe.context import StageContext
from mmkd.students.layer_choice import choose
from mmkd_models.layout import MoeLayout, moe_layers
from mmkd_models.modeling_mmkd import become_student
from mmkd_models.parts import feed_forward, find_parts
from mmkd_models.surgery import replace_ffn


class MoeConversion(Conversion):
    """The model computes what it did before."""

    config_class = MoeConfig
    config: MoeConfig

    def check(self, model: PreTrainedModel) -> None:
        """
        Raises:
            RecipeError: the layers are not there, or are sparse already.
        """
        if present := moe_layers(model.config):
            raise RecipeError(
                f"layers {list(present)} are sparse already", where=self.where, hint="upcycle once"
            )
        if not self._chosen(model):
            raise RecipeError("no layer is chosen", where=self.where, hint="name at least one")

    def convert(self, model: PreTrainedModel) -> list[str]:
        """
        Raises:
            RecipeError: experts would not compute what the networks do.
            ValueError: the layers have no network to copy.
        """
        chosen, layers = self._chosen(model), find_parts(model).decoder_layers
        layout = MoeLayout(tuple(chosen), self.config.experts, self.config.top_k)
        for index, mlp in replace_ffn(model, layout).items():
            sparse: Any = feed_forward(layers[index])[1]
            sparse.experts.copy_of(mlp)
            nn.init.normal_(sparse.router.weight, std=self.config.router.std)
            if not _alike(mlp, sparse):
                raise RecipeError(
                    f"{type(mlp).__name__} computes something else than its experts would",
                    where=self.where,
                    hint="choose a family of docs/families.md",
                )
        become_student(model, {"moe": layout.to_dict()})
        size = sum(p.numel() for p in sparse.experts.parameters()) // layout.experts
        return [
            f"decoder: {layout.experts} experts, top {layout.top_k}, in layers {chosen}, "
            f"copies of the dense network ({size:,} weights an expert)"
        ]

    def _chosen(self, model: PreTrainedModel) -> list[int]:
        count = len(find_parts(model).decoder_layers)
        return choose(self.config.layers, count, where=self.where)


@torch.no_grad()
def _alike(mlp: nn.Module, sparse: Any) -> bool:
    """Whether experts compute what the copied network does: names do not tell its activation."""
    like = next(mlp.parameters())
    if like.is_meta:
        return True
    x = like.new_ones(1, 2, sparse.router.weight.shape[1])
    x[..., 1::2] *= -1
    want, got = mlp(x).float(), sparse(x).float()
    tolerance = 5e-2 if like.dtype.itemsize < 4 else 1e-4
    return float((got - want).norm()) <= tolerance * float(want.norm())


def check_experts(context: StageContext) -> None:
    """Objectives on routers have a student with experts.

    Raises:
        RecipeError: it has none.
    """
    names = [o.name for o in context.needing("experts")]
    if names and not moe_layers(context.student.config):
        raise RecipeError(
            f"objective {', '.join(names)} needs a student with experts",
            where=context.where,
            hint="add {kind: moe} to student.convert",
        )
