"""`made:NAME` in a recipe: data and entries of `make` that read what another entry writes."""

from typing import Any

from mmkd.recipe.making import MADE, STUDENT, WHY, MakeConfig
from mmkd.recipe.sources import DataConfig, SourceConfig

Make = dict[str, MakeConfig]


def in_order(make: Make) -> Make:
    """The entries, each after the one whose records it reads, with files in place of `made:NAME`.

    Raises:
        ValueError: there is no such entry, `images` is given for it, or entries read each other's
            records.
    """
    found: Make = {}

    def add(name: str, readers: tuple[str, ...]) -> None:
        if name in readers:
            circle = " -> ".join([*readers[readers.index(name) :], name])
            raise ValueError(
                f"entries of 'make' read each other's records ({circle}) -- break the circle"
            )
        if name in found:
            return
        config = make[name]
        if (other := read_entry(config, make)) is not None:
            add(other, (*readers, name))
        if config.records is not None and config.records.startswith(MADE):
            read = _source(config.records, config.images, {**make, **found})
            config = config.model_copy(update={"records": read["train"], "images": read["images"]})
        found[name] = config

    for name in make:
        add(name, ())
    return found


def read_entry(config: MakeConfig, make: Make) -> str | None:
    """The name of the entry whose records an entry reads; None if it reads others."""
    if config.records is None:
        return None
    if config.records.startswith(MADE):
        name = config.records[len(MADE) :]
        return next((n for n, m in make.items() if name in (n, m.why and f"{n}{WHY}")), None)
    return next((n for n, m in make.items() if config.records in m.files), None)


def asking_student(make: Make) -> Make:
    """The entries that ask the student, or read the records of one that does, in order."""
    found: Make = {}
    for name, config in in_order(make).items():
        if STUDENT in config.models or read_entry(config, make) in found:
            found[name] = config
    return found


def with_made(data: DataConfig, make: Make) -> DataConfig:
    """Settings of data in which `made:NAME` is replaced by the file of that entry, in held-out
    records too.

    Raises:
        ValueError: there is no such entry, or `images` is given for it.
    """
    update: dict[str, Any] = {"sources": _sources(data.sources, make)}
    if data.train is not None and data.train.startswith(MADE):
        update |= _source(data.train, data.images, make)
    if data.validation is not None:
        held_out = _sources(data.validation.sources, make)
        update["validation"] = data.validation.model_copy(update={"sources": held_out})
    return data.model_copy(update=update)


def _sources(sources: list[SourceConfig], make: Make) -> list[SourceConfig]:
    return [
        s.model_copy(
            update={**_source(s.train, s.images, make), "name": s.name or s.train[len(MADE) :]}
        )
        if s.train.startswith(MADE)
        else s
        for s in sources
    ]


def with_made_names(data: dict[str, Any], make: Make) -> dict[str, Any]:
    """Written settings of data in which files of `make` are `made:NAME` again, so that they follow
    a variant that changes the entry: the inverse of `with_made`."""
    names = {(source["train"], source["images"]): name for name, source in _entries(make).items()}

    def named(part: dict[str, Any]) -> dict[str, Any]:
        name = names.get((part.get("train"), part.get("images")))
        return part if name is None else {**part, "train": f"{MADE}{name}", "images": None}

    found = {**named(data), "sources": [named(s) for s in data["sources"]]}
    if data["validation"] is not None:
        held_out = [named(s) for s in data["validation"]["sources"]]
        found["validation"] = {**data["validation"], "sources": held_out}
    return found


def with_record_names(entries: dict[str, Any], make: Make) -> dict[str, Any]:
    """The same for written entries of `make` that read the records of others."""
    names = {(source["train"], source["images"]): name for name, source in _entries(make).items()}

    def named(entry: dict[str, Any]) -> dict[str, Any]:
        name = names.get((entry["records"], entry["images"]))
        return entry if name is None else {**entry, "records": f"{MADE}{name}", "images": None}

    return {name: named(entry) for name, entry in entries.items()}


def _entries(make: Make) -> dict[str, dict[str, str | None]]:
    """The data source of each name after `made:`."""
    sources = {n: m.source for n, m in make.items()}
    for entry, config in make.items():
        if config.why is not None:
            sources[f"{entry}{WHY}"] = {**config.source, "train": config.why.out}
    return sources


def _source(train: str, images: str | None, make: Make) -> dict[str, str | None]:
    name = train[len(MADE) :]
    sources = _entries(make)
    if name not in sources:
        known = ", ".join(sources) or "there is none"
        raise ValueError(f"{train!r} is no entry of 'make' -- known: {known}")
    # A variant may name another entry, in data that have the images of the recipe's own entry.
    if images is not None and images not in [m.source["images"] for m in make.values()]:
        raise ValueError(f"{train!r} has the images of its entry of 'make' -- remove 'images'")
    return sources[name]
