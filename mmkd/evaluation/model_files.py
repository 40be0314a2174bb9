"""The files of a model that is evaluated."""

from pathlib import Path
from typing import Any

from torch import nn

from mmkd.evaluation.finished import facts_of
from mmkd.modeling.foreign_models import INDEX, indexed_files


def model_facts(path: str | None, revision: str | None) -> list[list[Any]]:
    """Facts of a model's files: weights, configs, chat template and code."""
    folder = _folder(path, revision) if path else None
    if folder is None:
        return []
    kinds = ("*.safetensors", "*.json", "*.jinja", "*.py")
    return facts_of([file for kind in kinds for file in folder.glob(kind)])


def weights_bytes(path: str | None, revision: str | None, model: nn.Module) -> int:
    folder = _folder(path, revision) if path else None
    if folder is not None and (files := weight_files(folder)):
        return sum(file.stat().st_size for file in files)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model loads. Some folders hold the same weights twice."""
    index = folder / INDEX
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if index.is_file():
        names = indexed_files(index)
        return [folder / name for name in names if (folder / name).is_file()]
    return sorted(folder.glob("*.safetensors"))


def _folder(path: str, revision: str | None) -> Path | None:
    """A model's folder, or the folder in the Hub's cache that holds its files."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None
