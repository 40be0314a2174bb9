"""Recipes: run them, plan them, time their steps, report their results."""

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
    app,
    begin,
    notes,
    recipe_app,
    without_collector,
)


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plugin: Plugins = None,
    trusted: Trusted = None,
    nproc: Nproc = 1,
    from_stage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="if the recipe has changed: train again from this stage on"),
    ] = None,
) -> None:
    """Train, evaluate and report; a second call continues where the first stopped."""
    again = [] if from_stage is None else ["--from-stage", from_stage]
    read = begin(["run"], recipe, overrides, plugin, nproc, again)
    from mmkd.api.runs import run as run_recipe
    from mmkd.runtime import distributed

    run_recipe(read, from_stage=from_stage)
    distributed.disconnect()


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plugin: Plugins = None,
    trusted: Trusted = None,
    nproc: Annotated[Optional[int], typer.Option(min=1, help="number of processes")] = None,  # noqa: UP045
    memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=1, help="GiB of each GPU, one per process; default: this machine's"),
    ] = None,
    without_data: Annotated[
        bool,
        typer.Option(help="do not check data and tasks, which may not exist yet"),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="every stage of every student of a study")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a run would do: settings, parameters, tokens, FLOPs and memory of every stage.

    It reports the errors that a run would report before its first step.
    """
    from mmkd.recipe import load_recipe

    with notes(as_json):
        read = load_recipe(recipe, overrides)  # before torch is imported, which takes seconds
    size = None if memory is None else int(memory * 2**30)
    with without_collector():
        from mmkd.commands.plan import check_recipe, make_plan, print_plan
        from mmkd.runtime import distributed

        with notes(as_json), distributed.imagined(nproc or distributed.world_size(), size):
            check_recipe(read, without_data=without_data)
            made = make_plan(read)
    if as_json:
        print(json.dumps(made, indent=1))
    else:
        print_plan(made, verbose=verbose)


@app.command()
def bench(
    recipe: RecipeFile,
    overrides: Overrides = None,
    plugin: Plugins = None,
    trusted: Trusted = None,
    stage: Annotated[Optional[str], typer.Option(help="default: the first")] = None,  # noqa: UP045
    steps: Annotated[int, typer.Option(min=1, help="steps to time")] = 10,
    out: Annotated[Optional[Path], typer.Option("--json", help="file to write")] = None,  # noqa: UP045
    plot: Annotated[Optional[Path], typer.Option(help="image to write")] = None,  # noqa: UP045
) -> None:
    """Time and memory of a recipe's steps by part, compared with the models alone."""
    from mmkd.recipe import load_recipe

    read = load_recipe(recipe, overrides)  # before torch is imported, which takes seconds
    from mmkd.commands.bench import bench as time_steps
    from mmkd.commands.bench import keep, plot_bench, print_bench
    from mmkd.runtime import distributed
    from mmkd.runtime.files import write_json
    from mmkd.runtime.progress import say

    found = time_steps(read, stage, steps)
    if distributed.rank() == 0:
        print_bench(found)
        say(f"kept for mmkd plan: {keep(read, found)}")
        if out is not None:
            write_json(out, found)
        if plot is not None:
            plot_bench(found, plot)
    distributed.disconnect()


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Write a run's report.html again and print its table."""
    from mmkd.report import write_report

    write_report(folder)


@recipe_app.command()
def schema() -> None:
    """The recipe's JSON schema."""
    from mmkd.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=1))
