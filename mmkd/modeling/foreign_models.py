"""Checks of a model's folder: damaged settings files, code from other repositories, pickled
weights."""

from pathlib import Path
from typing import Any

from pydantic import model_validator

from mmkd.errors import CheckpointError
from mmkd.runtime.shapes import Shape, read_as

INDEX = "model.safetensors.index.json"
SETTINGS = ("*config.json", "special_tokens_map.json", "chat_template.json", INDEX)
"""Settings files. Libraries assume that each holds a JSON object."""
Ids = int | list[int] | None


class _Config(Shape):
    """config.json."""

    model_type: str | None = None
    architectures: list[str] | None = None
    auto_map: dict[str, Any] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None

    @model_validator(mode="after")
    def _names_a_class(self) -> "_Config":
        if not self.model_type and not self.auto_map:
            raise ValueError("it has no model_type")
        return self


class _Generation(Shape):
    """generation_config.json."""

    bos_token_id: Ids = None
    eos_token_id: Ids = None
    pad_token_id: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None


class _Tokenizer(Shape):
    """tokenizer_config.json and processor_config.json."""

    chat_template: str | list[dict[str, str]] | dict[str, str] | None = None


class _Index(Shape):
    """The index of weights in several files."""

    weight_map: dict[str, str]


_SHAPES: dict[str, type[Shape]] = {
    "config.json": _Config,
    "generation_config.json": _Generation,
    "tokenizer_config.json": _Tokenizer,
    "processor_config.json": _Tokenizer,
    INDEX: _Index,
}


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a settings file in a model's folder.

    Raises:
        CheckpointError: it cannot be read, or has the wrong structure.
    """
    return read_as(_SHAPES.get(path.name, Shape), path, "copy or download it again")


def check_settings(folder: Path) -> None:
    """Check the settings files of a model's folder.

    Raises:
        CheckpointError: one of them is damaged.
    """
    for path in sorted({path for name in SETTINGS for path in folder.glob(name)}):
        read_settings(path)


def refuse_kernels(config: Any, name: str) -> None:
    """Refuse a config whose attention is a repository of compiled kernels, which are code too.

    Raises:
        CheckpointError: the config, or one of its parts, names such a repository.
    """
    parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))]
    for part in parts:
        kernel = getattr(part, "_attn_implementation", None)
        named = kernel.values() if isinstance(kernel, dict) else [kernel]
        for found in named:
            if isinstance(found, str) and "/" in found:
                raise CheckpointError(
                    f"its config names code on the Hub as its attention ({found})",
                    where=name,
                    hint="remove attn_implementation from its config.json",
                )


def refuse_pickled(folder: Path) -> None:
    """Refuse pickled weights: loading them can run any code.

    Raises:
        CheckpointError: the folder has no other weights, or its index names files other than
            safetensors in the folder.
    """
    index = folder / INDEX
    if index.is_file() and not (folder / "model.safetensors").is_file():
        for name in indexed_files(index):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"it names a file that is not a safetensors file of this folder ({name})",
                    where=str(index),
                    hint="copy or download it again",
                )
    pickled = sorted(folder.glob("*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"its weights are pickled ({pickled[0].name}), and loading them could run any code",
            where=str(folder),
            hint="if you trust them, load them in transformers and use save_pretrained",
        )


def indexed_files(index: Path) -> list[str]:
    """The files that an index of weights names.

    Raises:
        CheckpointError: it is damaged.
    """
    return sorted({*read_settings(index)["weight_map"].values()})
