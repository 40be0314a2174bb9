"""Release: a run's student on the Hub."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from mmkd.cli.app import Plugins, Trusted, app
from mmkd.errors import AGAIN
from mmkd.runtime import interrupt


@app.command()
def release(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    settings: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Argument(help="key=value of the recipe's 'release', such as license=apache-2.0"),
    ] = None,
    repo: Annotated[Optional[str], typer.Option(help="repository, such as me/student")] = None,  # noqa: UP045
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    student: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="label of a variant; default: the recipe's own"),
    ] = None,
    seed: Annotated[Optional[int], typer.Option(help="default: the first")] = None,  # noqa: UP045
    out: Annotated[Optional[Path], typer.Option(help="write this folder, upload nothing")] = None,  # noqa: UP045
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be done")] = False,
    plugin: Plugins = None,
    trusted: Trusted = None,
) -> None:
    """Publish a finished student on the Hub: weights, code, processor, card."""
    from mmkd.release import release as publish

    interrupt.can_go_on(AGAIN)  # what the Hub has is not sent twice
    publish(
        run,
        label=student,
        seed=seed,
        repo=repo,
        private=private,
        overrides=settings,
        out=out,
        dry_run=dry_run,
    )
