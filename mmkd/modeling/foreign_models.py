"""What a model's folder may not ask for: code from elsewhere, and pickled weights."""

import json
from pathlib import Path
from typing import Any

from mmkd.errors import CheckpointError


def refuse_kernels(config: Any, name: str) -> None:
    """A config may name a repository of compiled kernels as its attention: that is code, too.

    Raises:
        CheckpointError: it does, in itself or in one of its parts.
    """
    parts = [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", ()))]
    for part in parts:
        kernel = getattr(part, "_attn_implementation", None)
        named = kernel.values() if isinstance(kernel, dict) else [kernel]
        for found in named:
            if isinstance(found, str) and "/" in found:
                raise CheckpointError(
                    f"its config asks for attention by code from the Hub ({found})",
                    where=name,
                    mend="take attn_implementation out of its config.json",
                )


def refuse_pickled(folder: Path) -> None:
    """Reading pickled weights can run any code: nothing opens them.

    Raises:
        CheckpointError: a folder has no others, its index names other files than safetensors in
            the folder.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        for name in _indexed(index):
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise CheckpointError(
                    f"it names a file that is no safetensors of this folder ({name})",
                    where=str(index),
                    mend="copy or download it again",
                )
    pickled = sorted(folder.glob("*.bin"))
    if pickled and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"its weights are pickled ({pickled[0].name}), which can run code: they are not read",
            where=str(folder),
            mend="where you trust them, load them in transformers and save_pretrained safetensors",
        )


def _indexed(index: Path) -> list[str]:
    """The files that an index of weights names."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, TypeError, KeyError, AttributeError):
        named = [""]
    return sorted({str(name) for name in named})
