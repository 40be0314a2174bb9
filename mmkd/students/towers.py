"""What conversions share that cut the layers of decoder and vision tower."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.recipe import Conversion
from mmkd_models.parts import find_parts


@dataclass(frozen=True)
class Tower:
    """Decoder or vision tower of a model.

    Attributes:
        name: "decoder" or "vision", as settings name it.
        layers: its layers.
        config: its part of the model's config.
    """

    name: str
    layers: nn.ModuleList
    config: Any

    @property
    def where(self) -> str:
        """The place that messages name."""
        return f"student.convert: {self.name}"


class TowerConversion(Conversion):
    """Base: settings say for each tower, by its name, what to keep of it; None for all.

    Attributes:
        uncut: modules of a tower that can no longer be cut.
    """

    uncut: ClassVar[tuple[type[nn.Module], ...]]

    def check(self, model: PreTrainedModel) -> None:
        for tower in self._towers(model):
            if any(isinstance(m, self.uncut) for m in tower.layers.modules()):
                raise RecipeError(
                    "layers cannot be cut after they became Mamba or sparse",
                    where=tower.where,
                    hint=f"put '{self.config.kind}' before 'mamba' and 'moe'",
                )

    def convert(self, model: PreTrainedModel) -> list[str]:
        return [f"{t.name}: {self.cut(model, t)}" for t in self._towers(model)]

    def cut(self, model: PreTrainedModel, tower: Tower) -> str:
        """Cut one tower of a model in place; returns what was done.

        Raises:
            RecipeError: the tower has less than what to keep.
        """
        raise NotImplementedError

    def _towers(self, model: PreTrainedModel) -> list[Tower]:
        """Those that the settings cut.

        Raises:
            RecipeError: the model has no such tower.
        """
        parts = find_parts(model)
        towers = {
            "decoder": (parts.decoder_layers, model.config.get_text_config()),
            "vision": (parts.vision_layers, getattr(model.config, "vision_config", None)),
        }
        found = []
        for name, (layers, config) in towers.items():
            if getattr(self.config, name) is None:
                continue
            if layers is None or config is None:
                raise RecipeError("the model has no such layers", where=f"student.convert: {name}")
            found.append(Tower(name, layers, config))
        return found
