"""Command that fits a teacher's temperature."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmkd.cli.app import AsJson, Device, Overrides, Plugins, Trusted, app, notes


@app.command()
def calibrate(
    recipe: Annotated[Path, typer.Argument(help="recipe, a YAML file, or a run's folder")],
    overrides: Overrides = None,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="name of one of several teachers"),
    ] = None,
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="held-out records; default: the recipe's data.validation"),
    ] = None,
    images: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="folder of image paths of --data"),
    ] = None,
    records: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="largest number of records, evenly spread; default: all"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="records per forward pass")] = 8,
    device: Device = "auto",
    plugin: Plugins = None,
    trusted: Trusted = None,
    as_json: AsJson = False,
) -> None:
    """Fit the teacher's temperature on held-out records, and print its calibration error."""
    from mmkd.recipe import load_recipe
    from mmkd.runtime.run_folder import RunFolder

    with notes(as_json):  # before torch is imported, which takes seconds
        read = load_recipe(RunFolder(recipe).recipe if recipe.is_dir() else recipe, overrides)
    from mmkd.commands.calibrate import calibrate as fit
    from mmkd.commands.calibrate import print_calibration

    with notes(as_json):
        found = fit(
            read,
            teacher=teacher,
            data=data,
            images=images,
            records=records,
            batch_size=batch_size,
            device=device,
        )
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_calibration(found)
