"""What the file of an entry of `make` was made with, to see whether it is up to date."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmkd.data.sources import find_files
from mmkd.errors import DataError
from mmkd.making.against import against_facts
from mmkd.making.base import MakerSource
from mmkd.making.makers import sources_of
from mmkd.recipe import EvaluateConfig, MakeConfig, Recipe, ServerConfig, read_entry
from mmkd.runtime.files import read_json, write_json
from mmkd.runtime.formats import FormatError
from mmkd.runtime.shapes import Counts, read_if

SETTINGS, COUNTS = "made.json", "counts.json"
_MODEL = {
    *("model", "config", "processor", "revision", "dtype", "attn_implementation", "image_size"),
    "quantize",
}
SERVER_KEYS = {"server", "model", "image_format", "extra"}
"""Keys of a server on which its answers depend."""
Facts = dict[str, Any]


def folder_of(config: MakeConfig) -> Path:
    """Folder of the answers so far."""
    return Path(f"{config.out}.answers")


def facts_of(
    config: MakeConfig,
    sources: Mapping[str, MakerSource],
    evaluation: EvaluateConfig | None = None,
) -> Facts:
    """What the records depend on, as JSON: settings, models, and the files of records, examples,
    models and `against` with their sizes and modification times. The entry's own images are not
    looked at, nor what the Hub or a server holds under a model's name.

    Args:
        config: the entry.
        sources: settings of the models that it names.
        evaluation: of the recipe, which says where tasks of `against` are.
    """
    return {
        "settings": config.model_dump(mode="json", exclude={"batch_size"}),
        "models": {name: _of_model(source) for name, source in sources.items()},
        "records": _of_records(config),
        "against": against_facts(config, evaluation) if config.against else {},
    }


def entry_facts(recipe: Recipe, name: str) -> Facts:
    """`facts_of` an entry of a recipe's `make`."""
    config = recipe.make[name]
    return facts_of(config, sources_of(recipe, config.models), recipe.evaluate)


def is_made(recipe: Recipe, name: str) -> bool:
    """Whether the files of an entry are there, and were made with what `facts_of` names. Those of
    the entry whose records it reads must be made too."""
    config = recipe.make[name]
    if (read := read_entry(config, recipe.make)) is not None and not is_made(recipe, read):
        return False
    settings = folder_of(config) / SETTINGS
    if not all(Path(file).is_file() for file in config.files) or not settings.is_file():
        return False
    try:
        return bool(read_json(settings) == entry_facts(recipe, name))
    except FormatError:
        return False


def begin_writing(config: MakeConfig) -> None:
    """Note that the files of an entry are incomplete, until `end_writing`."""
    (folder_of(config) / SETTINGS).unlink(missing_ok=True)


def end_writing(config: MakeConfig, facts: Facts, counts: Facts) -> None:
    """Note what the files of an entry were made with, and how many questions were kept."""
    write_counts(config, counts)
    write_json(folder_of(config) / SETTINGS, facts)


def write_counts(config: MakeConfig, counts: Facts) -> None:
    """Note how many questions were kept."""
    write_json(folder_of(config) / COUNTS, counts)


def counts_of(config: MakeConfig) -> Facts | None:
    """The counts of `write_counts`; None if they are not there."""
    return read_if(Counts, folder_of(config) / COUNTS)


def _of_model(source: MakerSource) -> Facts:
    if isinstance(source, ServerConfig):
        return source.model_dump(mode="json", include=SERVER_KEYS)
    folders = [Path(name) for name in (source.model, source.processor) if name]
    files = sorted(path for folder in folders for path in folder.glob("*.safetensors"))
    return source.model_dump(mode="json", include=_MODEL) | {"files": _stamps(files)}


def _of_records(config: MakeConfig) -> list[list[Any]]:
    shots = None if config.context is None else config.context.shots
    files: list[Path] = []
    for train in (config.records, shots):
        try:
            files += [] if train is None else find_files(train)
        except DataError:  # a data set of the Hub, or one that `save_to_disk` wrote
            continue
    return _stamps(files)


def _stamps(files: list[Path]) -> list[list[Any]]:
    found = [(path, path.stat()) for path in files]
    return [[str(path), status.st_size, status.st_mtime_ns] for path, status in found]
