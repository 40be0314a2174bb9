"""Groups of commands, and arguments of several commands."""

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer
import typer.core

from mmkd.errors import AGAIN
from mmkd.runtime import interrupt

if TYPE_CHECKING:
    from mmkd.recipe import Recipe


class RecipeGroup(typer.core.TyperGroup):
    """Commands with `build` as the default: `mmkd cache RECIPE` is `mmkd cache build RECIPE`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args and args[0] in self.commands
        return super().resolve_command(ctx, args if known else ["build", *args])


ORDER = (
    *("doctor", "init", "plan", "run", "report", "eval", "chat", "release"),
    *("data", "cache", "calibrate", "label-weight", "bench", "convert", "recipe"),
)
"""Commands in the order in which --help lists them: that of their first use."""


class OrderedGroup(typer.core.TyperGroup):
    """Lists its commands in the order of `ORDER`."""

    def list_commands(self, ctx: Any) -> list[str]:
        known = [*ORDER, *self.commands]
        return sorted(self.commands, key=known.index)


app = typer.Typer(
    cls=OrderedGroup,
    context_settings={"help_option_names": ["-h", "--help"]},  # commands inherit it
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


def _load_plugins(names: list[str] | None) -> list[str]:
    from mmkd.runtime.plugins import load_plugin

    for name in names or []:
        load_plugin(name)
    return names or []


Plugins = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--plugin",
        callback=_load_plugins,
        help="Python file or module to run first, such as one with objectives or conversions",
    ),
]


def _trust(names: list[str] | None) -> list[str]:
    from mmkd.runtime import consent

    for name in names or []:
        consent.grant(name)
    return names or []


Trusted = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--trust-remote-code",
        metavar="NAME",
        callback=_trust,
        help="folder or Hub id whose Python code may run: of a model, or of evaluation tasks",
    ),
]


def named(plugins: list[str] | None) -> list[str]:
    """Plugins and trusted code as arguments of a command."""
    from mmkd.runtime import consent

    return [*(word for name in plugins or [] for word in ("--plugin", name)), *consent.words()]


Nproc = Annotated[int, typer.Option(min=1, help="processes on this machine")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")]
Revision = Annotated[Optional[str], typer.Option(help="of a Hub id")]  # noqa: UP045
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


def begin(
    command: list[str],
    recipe: Path,
    overrides: list[str] | None,
    plugins: list[str] | None,
    processes: int,
    options: Sequence[str] = (),
) -> "Recipe":
    """Load the recipe of a command that resumes when it is called again.

    With several processes, the command is launched in each of them, and this process exits with
    their status.

    Args:
        command: name of the command.
        recipe, overrides, plugins, processes: arguments of the command.
        options: further arguments for the launched processes.
    """
    from mmkd.recipe import load_recipe

    interrupt.can_go_on(AGAIN)
    loaded = load_recipe(recipe, overrides)  # before torch is imported, which takes seconds
    if processes > 1:
        words = [*command, str(recipe), *(overrides or []), *named(plugins), *options]
        launch_again(words, processes)
    return loaded


def launch_again(words: list[str], processes: int) -> NoReturn:
    """Run `mmkd WORDS` in several processes, and exit with their status."""
    from mmkd.cli.launch import launch

    sys.exit(launch(words, processes))


def notes(as_json: bool) -> AbstractContextManager[Any]:
    """Context manager: notes and progress are printed on stderr if stdout is for JSON."""
    return redirect_stdout(sys.stderr if as_json else sys.stdout)


@contextmanager
def without_collector() -> Iterator[None]:
    """Context manager that turns off Python's garbage collector. Imports and plans make many
    objects and hardly any cycles, and the collector takes a seventh of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _say_version(asked: bool) -> None:
    if asked:
        from mmkd import __version__

        print(f"mmkd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    local_rank: Annotated[int, typer.Option("--local_rank", hidden=True)] = 0,
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="print it")
    ] = False,
) -> None:
    """Distil large vision-language models into small ones."""
    # The deepspeed launcher passes the rank here as well as in the environment.
