"""Commands. Each parses its words and calls one function; errors are one line, exit status 2."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn, Optional

import typer
import typer.core

from mmkd.errors import MmkdError, StoppedError


class RecipeGroup(typer.core.TyperGroup):
    """Commands, one of which may be left out: `mmkd cache RECIPE` builds."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args and args[0] in self.commands
        return super().resolve_command(ctx, args if known else ["build", *args])


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Distil large vision-language models into small ones.",
)
data_app = typer.Typer(no_args_is_help=True, help="Build and look at data sets.")
recipe_app = typer.Typer(no_args_is_help=True, help="About recipes.")
cache_app = typer.Typer(
    cls=RecipeGroup,
    no_args_is_help=True,
    help="A teacher's output distributions on disk: `mmkd cache RECIPE` stores them.",
)
app.add_typer(data_app, name="data")
app.add_typer(recipe_app, name="recipe")
app.add_typer(cache_app, name="cache")

RecipeFile = Annotated[Path, typer.Argument(help="recipe, a YAML file")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(help="key.path=value, such as stages.0.optimizer.lr=1e-4"),
]


@app.callback()
def options(
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
) -> None:
    """Distil large vision-language models into small ones."""
    # The deepspeed launcher says the rank here as well as in the environment.


@app.command()
def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="processes on this machine")] = 1,
) -> None:
    """Train, evaluate and report; a second call continues where the first stopped."""
    if nproc > 1:
        from mmkd.launch import launch

        sys.exit(launch(["run", str(recipe), *(overrides or [])], nproc))
    from mmkd import distributed, interrupt, pipeline
    from mmkd.recipe import load_recipe
    from mmkd.report import write_report

    interrupt.listen()
    folder = pipeline.run(load_recipe(recipe, overrides))
    if distributed.rank() == 0:
        write_report(folder)
    distributed.disconnect()


@cache_app.command(name="build")
def build_cache(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, help="processes on this machine")] = 1,
) -> None:
    """Run the recipe's teacher once over its data; a second call goes on where it stopped."""
    if nproc > 1:
        from mmkd.launch import launch

        sys.exit(launch(["cache", "build", str(recipe), *(overrides or [])], nproc))
    from mmkd import distributed
    from mmkd.build_cache import build_cache as build
    from mmkd.cache_stats import print_stats, stats
    from mmkd.recipe import load_recipe

    store = build(load_recipe(recipe, overrides))
    if distributed.rank() == 0:
        print_stats(stats(store))
    distributed.disconnect()


@cache_app.command(name="stats")
def cache_stats(
    folder: Annotated[Path, typer.Argument(help="a cache's folder")],
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="its recipe: compare with the teacher itself"),
    ] = None,
    student: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="model folder: whose divergences are compared; the recipe's if left out"),
    ] = None,
    records: Annotated[int, typer.Option(min=1, help="records to compare on")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """Bytes a token, read speed, and with a recipe the error against the teacher itself."""
    from mmkd.cache import Store
    from mmkd.cache_stats import compare, print_stats, stats
    from mmkd.recipe import load_recipe

    store = Store(folder)
    found = stats(store)
    if recipe is not None:
        found |= compare(store, load_recipe(recipe), student, records)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print_stats(found)


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    nproc: Annotated[Optional[int], typer.Option(min=1, help="plan for so many processes")] = None,  # noqa: UP045
    memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=1, help="plan for GPUs of so many GiB, one a process"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable")] = False,
) -> None:
    """What a run would do: settings, parameters, tokens, FLOPs and memory of every stage."""
    from mmkd import distributed
    from mmkd.plan import make_plan, print_plan
    from mmkd.recipe import load_recipe

    size = None if memory is None else int(memory * 2**30)
    with distributed.imagined(nproc or distributed.world_size(), size):
        made = make_plan(load_recipe(recipe, overrides))
    if as_json:
        print(json.dumps(made, indent=1))
    else:
        print_plan(made)


@app.command()
def bench(
    recipe: RecipeFile,
    overrides: Overrides = None,
    stage: Annotated[Optional[str], typer.Option(help="the first if left out")] = None,  # noqa: UP045
    steps: Annotated[int, typer.Option(min=1, help="steps to time")] = 10,
    out: Annotated[Optional[Path], typer.Option("--json", help="file to write")] = None,  # noqa: UP045
    plot: Annotated[Optional[Path], typer.Option(help="picture to write")] = None,  # noqa: UP045
) -> None:
    """Where the time and memory of a recipe's steps go, against what the models alone take."""
    from mmkd import distributed
    from mmkd.bench import bench as time_steps
    from mmkd.bench import plot_bench, print_bench
    from mmkd.files import write_json
    from mmkd.recipe import load_recipe

    found = time_steps(load_recipe(recipe, overrides), stage, steps)
    if distributed.rank() == 0:
        print_bench(found)
        if out is not None:
            write_json(out, found)
        if plot is not None:
            plot_bench(found, plot)
    distributed.disconnect()


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="model folder or Hub id")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="key=value of the mixers, such as rope=false or state=kv"),
    ] = None,
    keep_attention: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="every:4, every:4:last, head:2, tail:2, none or 0,4,8"),
    ] = None,
    layers: Annotated[Optional[str], typer.Option(help="or: layers that become Mamba")] = None,  # noqa: UP045
    init: Annotated[str, typer.Option(help="default, inherit, mimic or exact")] = "mimic",
    experts: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="and, or instead: experts per sparse layer"),
    ] = None,
    top_k: Annotated[int, typer.Option(help="experts that a token meets")] = 2,
    sparse_layers: Annotated[str, typer.Option(help="even, odd, all, every:4, 0,4,8")] = "even",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="of the new weights")] = 42,
    trust_remote_code: bool = False,
) -> None:
    """Put Mamba-2 mixers in attention's place, experts in the networks', and write the student."""
    from mmkd.progress import console
    from mmkd.recipe import load_student
    from mmkd.students import placement, write_converted

    if out.exists():
        raise MmkdError("it is there already", where=str(out), mend="name a new folder")
    mamba: dict[str, Any] = {"kind": "mamba", "init": init}
    for name, text in (("keep_attention", keep_attention), ("layers", layers)):
        if text is not None:
            mamba[name] = placement.parse(text)
    moe: dict[str, Any] = {"kind": "moe", "experts": experts, "top_k": top_k}
    moe["layers"] = placement.parse(sparse_layers)
    wants_mamba = experts is None or bool(settings) or len(mamba) > 2
    student = load_student(
        {
            "model": model,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "convert": [mamba] * wants_mamba + [moe] * (experts is not None),
        },
        [f"convert.0.{setting}" for setting in settings or []],
    )
    report = write_converted(student, out, seed=seed)
    for line in report.lines:
        console.print(line, highlight=False)
    console.print(
        f"wrote {out}: {report.after:,} parameters, {report.before:,} before", highlight=False
    )


@app.command(name="eval")
def evaluate(
    student: Annotated[str, typer.Argument(help="model folder or Hub id")],
    tasks: Annotated[str, typer.Option(help="lmms-eval tasks, separated by commas")],
    include: Annotated[Optional[Path], typer.Option(help="folder of task files")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="folder for results and samples")] = None,  # noqa: UP045
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    limit: Annotated[Optional[int], typer.Option(min=1, help="documents per task")] = None,  # noqa: UP045
    device: str = "cpu",
) -> None:
    """Score a model with lmms-eval."""
    from mmkd.evaluation.run import evaluate as score
    from mmkd.report.tables import print_scores

    result = score(
        student,
        tasks=tasks.split(","),
        include_path=include,
        out=out,
        batch_size=batch_size,
        limit=limit,
        device=device,
    )
    print_scores({Path(student).name: result.scores})


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run's folder")]) -> None:
    """Write a run's report.html again and print its table."""
    from mmkd.report import write_report

    write_report(folder)


@data_app.command()
def build(
    name: Annotated[str, typer.Argument(help="scenes")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    seed: Annotated[int, typer.Option(min=0)] = 0,
    train: Annotated[int, typer.Option(min=1, help="training pictures")] = 12_000,
    validation: Annotated[int, typer.Option(min=1)] = 500,
    evaluation: Annotated[int, typer.Option(min=1, help="pictures per evaluation file")] = 200,
) -> None:
    """Build a data set from installed packages: real pictures, questions and ground truth."""
    from mmkd.data.scenes.build import build_scenes
    from mmkd.progress import console, track

    if name != "scenes":
        raise MmkdError(f"unknown data set {name!r}", mend="known: scenes")
    made = build_scenes(
        out, seed=seed, train=train, validation=validation, evaluation=evaluation, progress=track
    )
    for file, rows in made["rows"].items():
        console.print(f"{rows:8,} rows  {out / file}", highlight=False)


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
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: str = "auto",
) -> None:
    """Preference pairs from a model's own answers, scored by the objects that they name."""
    from mmkd.pairs import make_pairs
    from mmkd.progress import console
    from mmkd.recipe import DataConfig, SamplingConfig

    made = make_pairs(
        model,
        DataConfig(train=data, images=images),
        out,
        sampling=SamplingConfig(temperature=temperature, max_new_tokens=max_new_tokens),
        samples=samples,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    console.print(
        f"wrote {out}: {made.pairs:,} pairs of {made.prompts:,} prompts; in {made.equal:,} all "
        "answers are of equal worth",
        highlight=False,
    )


@data_app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="a data set's folder")],
    out: Annotated[Optional[Path], typer.Option(help="picture to write")] = None,  # noqa: UP045
    count: Annotated[int, typer.Option(min=1)] = 24,
) -> None:
    """A contact sheet: pictures with their questions and answers."""
    from mmkd.data.scenes.show import contact_sheet
    from mmkd.progress import console

    path = out or folder / "contact_sheet.png"
    contact_sheet(folder, count).save(path)
    console.print(f"wrote {path}", highlight=False)


@recipe_app.command()
def schema() -> None:
    """The recipe's JSON schema."""
    from mmkd.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=1))


def main() -> None:
    """Entry point of `mmkd`."""
    try:
        app()
    except StoppedError as end:
        print(f"mmkd: {end}")
        _end(0)
    except MmkdError as error:
        _fail(error)
    except (OSError, RuntimeError) as error:
        from mmkd.distributed import explained
        from mmkd.files import full_disk

        known = full_disk(error) or explained(error)
        if known is None:
            raise
        _fail(known)


def _fail(error: MmkdError) -> NoReturn:
    print(f"mmkd: {error}", file=sys.stderr)
    _end(2)


def _end(status: int) -> NoReturn:
    """Exit; at once where other processes are connected, whose threads may abort a slow exit."""
    from mmkd import distributed

    if distributed.world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
