"""Commands that find settings of a recipe on held-out records: calibrate, label-weight."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from mmkd.cli.app import AsJson, Device, Overrides, Plugins, Trusted, app, notes

if TYPE_CHECKING:
    from mmkd.recipe import Recipe

RecipeOrRun = Annotated[Path, typer.Argument(help="recipe, a YAML file, or a run's folder")]
HeldOut = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="held-out records; default: the recipe's data.validation"),
]
Images = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="folder of image paths of --data"),
]
MostRecords = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(min=1, help="largest number of records, evenly spread; default: all"),
]
BatchSize = Annotated[int, typer.Option(min=1, help="records per forward pass")]


def _read(recipe: Path, overrides: list[str] | None) -> "Recipe":
    from mmkd.recipe import load_recipe
    from mmkd.runtime.run_folder import RunFolder

    return load_recipe(RunFolder(recipe).recipe if recipe.is_dir() else recipe, overrides)


@app.command()
def calibrate(
    recipe: RecipeOrRun,
    overrides: Overrides = None,
    teacher: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="name of one of several teachers"),
    ] = None,
    data: HeldOut = None,
    images: Images = None,
    records: MostRecords = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    plugin: Plugins = None,
    trusted: Trusted = None,
    as_json: AsJson = False,
) -> None:
    """Fit the teacher's temperature on held-out records, and print its calibration error."""
    with notes(as_json):  # before torch is imported, which takes seconds
        read = _read(recipe, overrides)
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


STUDENT = "folder of a student, or its label if the first argument is a run; trained with "


@app.command()
def label_weight(
    recipe: RecipeOrRun,
    labels: Annotated[str, typer.Argument(help=f"{STUDENT}ce alone")],
    teacher: Annotated[str, typer.Argument(help=f"{STUDENT}kl alone")],
    overrides: Overrides = None,
    data: HeldOut = None,
    images: Images = None,
    records: MostRecords = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    plugin: Plugins = None,
    trusted: Trusted = None,
    as_json: AsJson = False,
) -> None:
    """Find the best weights of ce and kl, from two students on held-out records."""
    from mmkd.cli.scoring import find_trained

    with notes(as_json):  # before torch is imported, which takes seconds
        read = _read(recipe, overrides)
        run = recipe if recipe.is_dir() else None
        students = [find_trained(run, name) for name in (labels, teacher)]
    from mmkd.commands.label_weight import label_weight as fit
    from mmkd.commands.label_weight import print_label_weight

    with notes(as_json):
        found = fit(
            read,
            *students,
            data=data,
            images=images,
            records=records,
            batch_size=batch_size,
            device=device,
        )
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_label_weight(found)
