"""`early_exit`: the student that ends at an exit of another one.

An exit, which the objective `exits` has trained, reads the output head after a decoder layer. The
student here has the layers up to it, then the exit's own decoder layer and norm if it has them, and
the head. Its output is that of the exit.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.errors import CheckpointError, RecipeError
from mmkd.recipe import Conversion, EarlyExitConfig
from mmkd.students.depth_pruning import DepthPruning, keep_layers
from mmkd.students.towers import Tower
from mmkd_models.parts import find_parts


class EarlyExit(Conversion):
    config_class = EarlyExitConfig
    config: EarlyExitConfig

    def check(self, model: PreTrainedModel) -> None:
        parts = find_parts(model)
        count, layer = len(parts.decoder_layers), self.config.layer
        if layer >= count:
            raise ValueError(f"there is no decoder layer {layer}, the model has {count}")
        if any(isinstance(m, DepthPruning.uncut) for m in parts.decoder_layers.modules()):
            raise ValueError("a decoder with Mamba or sparse layers cannot be cut")
        if self.config.objectives is not None:
            weights = self._own_weights()
            if "norm" in weights and parts.final_norm is None:
                raise ValueError(f"{type(parts.decoder).__name__} has no final norm that is known")
            if "block" in weights and layer == count - 1:
                raise ValueError(f"the exit after layer {layer} has the weights of no next layer")
            if "block" in weights and layer + 1 < _layers_with_images(model):
                raise ValueError(
                    f"the model adds image features after layer {layer + 1}, and the block of the "
                    f"exit after layer {layer} was trained without them"
                )

    def convert(self, model: PreTrainedModel) -> list[str]:
        layer, config = self.config.layer, model.config.get_text_config()
        own = {} if self.config.objectives is None else self._own_weights()
        kept = list(range(layer + 2 if "block" in own else layer + 1))
        tower = Tower("decoder", find_parts(model).decoder_layers, config)
        lines = [f"decoder: {keep_layers(model, tower, kept)}"]
        parts: Any = find_parts(model)
        modules = {"norm": parts.final_norm, "block": parts.decoder_layers[-1]}
        for name, weights in own.items():
            module = modules[name]
            if shapes_of(weights) != shapes_of(module.state_dict()):
                raise RecipeError(
                    f"{self.config.objectives} has an exit of another model: its {name} has other "
                    "weights",
                    where=self.where,
                    hint="name the file of the stage that has trained this student",
                )
            if not next(module.parameters()).is_meta:
                module.load_state_dict(weights)
            lines.append(f"decoder: {name} of the exit after layer {layer}")
        return lines

    def _own_weights(self) -> dict[str, dict[str, Tensor]]:
        """State dicts of the exit's own norm and block; an exit may have only one of them.

        Raises:
            CheckpointError: the file cannot be read.
            RecipeError: it has no such exit.
        """
        assert self.config.objectives is not None
        path, prefix = Path(self.config.objectives), f"{self.config.name}.{self.config.layer}."
        found: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    if key.startswith(prefix):
                        name, _, inner = key.removeprefix(prefix).partition(".")
                        found.setdefault(name, {})[inner] = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"it cannot be read ({' '.join(str(error).split())})",
                where=str(path),
                hint="name the objectives.safetensors in the folder of the stage with the exits",
            ) from error
        if not found or not found.keys() <= {"norm", "block"}:
            raise RecipeError(
                f"{path} has no exit {self.config.name} after layer {self.config.layer}",
                where=self.where,
                hint="set 'layer' and 'name' to those of the objective; an exit without parameters "
                "of its own needs no 'objectives'",
            )
        return found


def _layers_with_images(model: PreTrainedModel) -> int:
    """Number of the first decoder layers after which image features are added (DeepStack)."""
    vision = getattr(model.config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def shapes_of(weights: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in weights.items()}
