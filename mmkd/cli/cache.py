"""Commands for a teacher's cache: build it, and print its statistics."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmkd.cli.app import (
    AsJson,
    Nproc,
    Overrides,
    Plugins,
    RecipeFile,
    Trusted,
    begin,
    cache_app,
    notes,
)


@cache_app.command(name="build")
def build_cache(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plugin: Plugins = None,
    trusted: Trusted = None,
    nproc: Nproc = 1,
) -> None:
    """Run the recipe's teacher once over its data. A second call continues where it stopped."""
    read = begin(["cache", "build"], recipe, overrides, plugin, nproc)
    from mmkd.commands.build_cache import build_cache as build
    from mmkd.commands.cache_stats import print_stats, stats
    from mmkd.runtime import distributed

    store = build(read)
    if distributed.rank() == 0:
        print_stats(stats(store))
    distributed.disconnect()


@cache_app.command(name="stats")
def cache_stats(
    folder: Annotated[Path, typer.Argument(help="a cache's folder")],
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="its recipe, to compare the cache with the teacher itself"),
    ] = None,
    student: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="model folder: compare divergences from it; default: the recipe's"),
    ] = None,
    records: Annotated[int, typer.Option(min=1, help="records to compare on")] = 256,
    trusted: Trusted = None,
    as_json: AsJson = False,
) -> None:
    """Bytes per token and read speed; with a recipe also the error against the teacher itself."""
    from mmkd.recipe import load_recipe

    with notes(as_json):
        read = None if recipe is None else load_recipe(recipe)
    from mmkd.cache import Store
    from mmkd.commands.cache_stats import compare, print_stats, stats

    with notes(as_json):
        store = Store(folder)
        found = stats(store)
        if read is not None:
            found |= compare(store, read, student, records)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_stats(found)
