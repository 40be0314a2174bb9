"""Commands for data sets."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from mmkd.cli.app import (
    AsJson,
    Device,
    Nproc,
    Overrides,
    Plugins,
    RecipeFile,
    Trusted,
    begin,
    data_app,
    notes,
)
from mmkd.cli.calibrate import BatchSize
from mmkd.errors import AGAIN, MmkdError
from mmkd.runtime import interrupt
from mmkd.runtime.fields import MOST_SEED


@data_app.command()
def build(
    name: Annotated[str, typer.Argument(help="scenes")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED)] = 0,
    train: Annotated[int, typer.Option(min=1, help="training images")] = 12_000,
    validation: Annotated[int, typer.Option(min=1)] = 500,
    evaluation: Annotated[int, typer.Option(min=1, help="images per evaluation file")] = 200,
) -> None:
    """Build a data set from installed packages: real images, questions and ground truth."""
    from mmkd.data.scenes.build import build_scenes
    from mmkd.runtime.progress import say, track

    if name != "scenes":
        raise MmkdError(f"unknown data set {name!r}", hint="known: scenes")
    made = build_scenes(
        out, seed=seed, train=train, validation=validation, evaluation=evaluation, progress=track
    )
    for file, rows in made["rows"].items():
        say(f"{rows:8,} rows  {out / file}")


@data_app.command()
def pairs(
    model: Annotated[str, typer.Argument(help="model folder or Hub id that answers")],
    data: Annotated[str, typer.Option(help="records with objects")],
    out: Annotated[Path, typer.Option(help="parquet file to write")],
    images: Annotated[Optional[str], typer.Option(help="folder of image paths")] = None,  # noqa: UP045
    samples: Annotated[int, typer.Option(help="answers to each prompt")] = 4,
    temperature: Annotated[float, typer.Option(min=0)] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 96,
    limit: Annotated[Optional[int], typer.Option(min=1, help="prompts")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED)] = 0,
    device: str = "auto",
    trusted: Trusted = None,
) -> None:
    """Preference pairs from a model's own answers, scored by the objects that they name."""
    from mmkd.commands.make_pairs import make_pairs

    interrupt.can_go_on(AGAIN)
    make_pairs(
        model,
        data,
        out,
        images=images,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )


@data_app.command()
def answers(
    recipe: RecipeFile,
    overrides: Overrides = None,
    only: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="entry of 'make'; repeat for several, all by default"),
    ] = None,
    plugin: Plugins = None,
    trusted: Trusted = None,
    nproc: Nproc = 1,
) -> None:
    """Have models answer questions about images, check the answers, and write them as records.

    A second call asks only for what is missing.
    """
    options = [word for name in only or () for word in ("--only", name)]
    read = begin(["data", "answers"], recipe, overrides, plugin, nproc, options)
    from mmkd.commands.make_answers import make_entries
    from mmkd.runtime import distributed

    make_entries(read, only or ())
    distributed.disconnect()


@data_app.command()
def score(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option(help="parquet file to write")],
    overrides: Overrides = None,
    model: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="a teacher's name, student (before its first stage) or NAME=FOLDER; "
            "default: all teachers and the student"
        ),
    ] = None,
    stage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="name of a stage with data of its own"),
    ] = None,
    clusters: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            max=10_000,
            help="also sort the records into so many clusters of similar images; without --model "
            "no model scores",
        ),
    ] = None,
    sheet: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="PNG file to write, of images of each cluster"),
    ] = None,
    batch_size: BatchSize = 8,
    device: Device = "auto",
    plugin: Plugins = None,
    trusted: Trusted = None,
    nproc: Nproc = 1,
    as_json: AsJson = False,
) -> None:
    """Score all training records with models. A second call continues where it stopped."""
    words = ["--out", str(out), "--batch-size", str(batch_size), "--device", device]
    words += [word for name in model or [] for word in ("--model", name)]
    if sheet is not None and clusters is None:
        raise MmkdError("--sheet shows clusters", hint="add --clusters, or leave --sheet out")
    words += [] if clusters is None else ["--clusters", str(clusters)]
    words += [] if sheet is None else ["--sheet", str(sheet)]
    words += ([] if stage is None else ["--stage", stage]) + (["--json"] if as_json else [])
    with notes(as_json):  # before torch is imported, which takes seconds
        read = begin(["data", "score"], recipe, overrides, plugin, nproc, words)
    from mmkd.commands.score_data import print_scores, score_data
    from mmkd.runtime import distributed

    with notes(as_json):
        found = score_data(
            read,
            out,
            models=model or [],
            stage=stage,
            clusters=clusters,
            sheet=sheet,
            batch_size=batch_size,
            device=device,
        )
    if distributed.rank() == 0 and as_json:
        print(json.dumps(found, indent=1))
    elif distributed.rank() == 0:
        print_scores(found)
    distributed.disconnect()


@data_app.command()
def check(
    target: Annotated[str, typer.Argument(help="recipe, or what data.train may be")],
    plugin: Plugins = None,
    trusted: Trusted = None,
    images: Annotated[Optional[str], typer.Option(help="folder of image paths")] = None,  # noqa: UP045
    decode: Annotated[bool, typer.Option(help="decode images, not only headers")] = False,
    unique_ids: Annotated[bool, typer.Option(help="count ids that come twice")] = False,
    twins: Annotated[bool, typer.Option(help="find near-duplicate images")] = False,
    bits: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, max=64, help="of 256, in which twins differ at most; 16 by default"),
    ] = None,
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="tasks, separated by commas, or none; by default those of the recipe"),
    ] = None,
    include: Annotated[Optional[Path], typer.Option(help="folder of task files")] = None,  # noqa: UP045
    local: Annotated[Optional[Path], typer.Option(help="folder of the tasks' data")] = None,  # noqa: UP045
    drop: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="file to write, of records to leave out, for data.leave_out"),
    ] = None,
    sheet: Annotated[Optional[Path], typer.Option(help="PNG file to write, of twins")] = None,  # noqa: UP045
    workers: Annotated[Optional[int], typer.Option(min=1, help="processes; one a core")] = None,  # noqa: UP045
    as_json: AsJson = False,
) -> None:
    """Check all records and images. Exit status 1 if any is bad, or has a twin in held-out records
    or tasks; 2 if the data cannot be read."""
    only = {"bits": bits, "against": against, "include": include, "local": local}
    for name, value in {**only, "drop": drop, "sheet": sheet}.items():
        if value is not None and not twins:
            raise MmkdError(f"--{name} is for --twins", hint=f"add --twins, or leave --{name} out")
    if target.endswith((".yaml", ".yml")):
        from mmkd.recipe import load_recipe

        with notes(as_json):  # errors are reported before torch is imported, which takes seconds
            load_recipe(target)
    from mmkd.commands.check_data import check_data, print_check
    from mmkd.commands.check_twins import twin_options
    from mmkd.data.check import Look, cores

    with notes(as_json):
        options = twin_options(bits, against, include, local, drop, sheet) if twins else None
        look = Look(decode, unique_ids)
        found = check_data(target, images, look, workers or cores(), options)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_check(found)
    if not found["good"]:
        raise typer.Exit(2 if found["unreadable"] else 1)


@data_app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="a data set's folder")],
    out: Annotated[Optional[Path], typer.Option(help="image to write")] = None,  # noqa: UP045
    count: Annotated[int, typer.Option(min=1)] = 24,
) -> None:
    """A contact sheet: images with their questions and answers."""
    from mmkd.data.scenes.show import contact_sheet
    from mmkd.runtime.progress import say

    path = out or folder / "contact_sheet.png"
    contact_sheet(folder, count).save(path)
    say(f"wrote {path}")
