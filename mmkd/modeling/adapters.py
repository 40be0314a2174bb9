"""LoRA and DoRA: low-rank adapters of frozen linear layers, with peft.

    W' = W + s B A                         LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1)
    W' = m (W + s B A) / ||W + s B A||     DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5)

Here s = alpha / rank. DoRA's norm is taken over the row of each output and gets no gradient
(section 4.3). B is initialised with 0, so new adapters do not change the student's outputs.

peft is slow to import, so this module imports it only when adapters are added.

`merged` does not use peft's `merge`, which changes the layers in place and rounds s B A to the
weight's dtype before it adds it. Here the weights may be a mapping that an engine has gathered from
its processes, and the sum is computed in float32 and rounded once.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import RecipeError
from mmkd.recipe import LoraConfig
from mmkd_models.parts import parameter_groups

if TYPE_CHECKING:
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora import Linear

NAME = "default"
A, B, MAGNITUDE = (
    f"{part}.{NAME}.weight" for part in ("lora_A", "lora_B", "lora_magnitude_vector")
)
BASE = "base_layer."


def targets(model: PreTrainedModel, lora: LoraConfig, whole: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers that get adapters. The head is included only if it is named.

    Args:
        model: without adapters.
        lora: settings of the adapters.
        whole: fully trained groups, whose layers get no adapters.

    Raises:
        RecipeError: the groups have no linear layers, or the head is named and its weight is tied
            to the embeddings.
    """
    where = "stages.train.lora"
    known = parameter_groups(model)
    trained = {name for group in whole for name in known.get(group, [])}
    chosen = {name for group in lora.groups for name in known.get(group, [])} - trained
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    layers = [
        name
        for name, module in model.named_modules()
        # Modules that read the weight of a subclass without calling it would skip the adapter.
        if type(module) is nn.Linear and f"{name}.weight" in chosen and name != head
    ]
    if "head" in lora.groups and f"{head}.weight" not in trained:
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            raise RecipeError(
                "the head's weight is tied to the embeddings, so it cannot have an adapter",
                where=where,
                hint="leave 'head' out of its groups",
            )
        layers.append(head)
    if not layers:
        raise RecipeError(
            f"no linear layers in {', '.join(lora.groups)}",
            where=where,
            hint="name groups with linear layers that are not fully trained, e.g. language_model",
        )
    return layers


def add_adapters(model: PreTrainedModel, lora: LoraConfig, whole: Sequence[str] = ()) -> None:
    """Add new adapters to the layers that `targets` names, in place; arguments as there."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(_peft_config(lora, targets(model, lora, whole)), model, NAME)


def _peft_config(lora: LoraConfig, layers: list[str]) -> "PeftConfig":
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_dora=lora.dora,
        target_modules=layers,
    )


def adapted_layers(model: nn.Module) -> dict[str, "Linear"]:
    """Linear layers that have adapters, by name."""
    return {n: m for n, m in model.named_modules() if _is_adapted(m)}


def _is_adapted(module: object) -> "TypeGuard[Linear]":
    lora: Any = sys.modules.get("peft.tuners.lora")  # if peft is not imported, there are none
    return lora is not None and isinstance(module, lora.Linear)


def adapter_parameters(model: nn.Module) -> list[str]:
    """Names of the adapters' weights."""
    return [
        f"{layer}.{name}"
        for layer, module in adapted_layers(model).items()
        for name, _ in module.named_parameters()
        if not name.startswith(BASE)
    ]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Context manager that disables all adapters of a model."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer._disable_adapters = True  # peft's public switch also freezes the adapters' weights
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def effective_weight(layer: Any) -> Tensor:
    """The weight of a linear layer with its adapter merged, [out, in], differentiable."""
    if not _is_adapted(layer) or layer.disable_adapters:
        return layer.weight
    adapter: Any = layer
    magnitude = None
    if NAME in adapter.lora_magnitude_vector:
        magnitude = adapter.lora_magnitude_vector[NAME].weight
    a, b = adapter.lora_A[NAME].weight, adapter.lora_B[NAME].weight
    return _weight(adapter.base_layer.weight, a, b, magnitude, adapter.scaling[NAME])


def _weight(base: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float) -> Tensor:
    whole = base + scale * (b @ a).to(base.dtype)
    if magnitude is None:
        return whole
    norm = torch.linalg.norm(whole, dim=1).detach()  # [out]
    norm = norm.clamp(min=torch.finfo(norm.dtype).tiny)  # rows of padding tokens may be 0
    return (magnitude / norm)[:, None].to(base.dtype) * whole


@torch.no_grad()
def merged(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights with all adapters merged, under the names of a model without adapters.

    Args:
        model: a model with adapters.
        weights: its gathered weights, if an engine has sharded them; those of `model` if None.
    """
    found = dict(weights if weights is not None else model.state_dict())
    for name, layer in adapted_layers(model).items():
        a, b = (found.pop(f"{name}.{part}") for part in (A, B))
        magnitude = found.pop(f"{name}.{MAGNITUDE}", None)
        for part in ("weight", "bias"):
            if f"{name}.{BASE}{part}" in found:
                found[f"{name}.{part}"] = found.pop(f"{name}.{BASE}{part}")
        base = found[f"{name}.weight"]
        parts = (base.float(), a.float(), b.float(), magnitude)
        found[f"{name}.weight"] = _weight(*parts, layer.scaling[NAME]).to(base.dtype)
    return found


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Merge all adapters into their layers, in place. The model has no adapters afterwards."""
    weights = merged(model)
    for name, layer in adapted_layers(model).items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.base_layer)
    model.load_state_dict(weights)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)


def save_adapters(
    model: PreTrainedModel, lora: LoraConfig, weights: Mapping[str, Tensor] | None, folder: Path
) -> None:
    """Save the adapters in peft's format. They belong to the student before the stage."""
    from peft import get_peft_model_state_dict

    found = dict(weights if weights is not None else model.state_dict())
    # Otherwise peft also saves the full weight of the head.
    adapters = get_peft_model_state_dict(model, found, NAME, save_embedding_layers=False)
    folder.mkdir(parents=True)
    tensors = {  # names as in peft's wrapper around a model
        f"base_model.model.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in adapters.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    _peft_config(lora, list(adapted_layers(model))).save_pretrained(str(folder))
