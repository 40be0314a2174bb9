"""Releases: a finished student of a run as a self-contained folder, and on the Hub."""

from pathlib import Path
from typing import Any

from mmkd.errors import CheckpointError, RecipeError
from mmkd.recipe import ReleaseConfig, load_release
from mmkd.release.card import make_card
from mmkd.release.folder import release_files, write_release
from mmkd.release.preview import print_preview
from mmkd.release.source import Source, choose
from mmkd.release.upload import require_access, upload
from mmkd.report.tables import compact
from mmkd.runtime.progress import say


def release(
    folder: Path,
    *,
    label: str | None = None,
    seed: int | None = None,
    repo: str | None = None,
    private: bool = False,
    overrides: list[str] | None = None,
    out: Path | None = None,
    dry_run: bool = False,
) -> None:
    """Write a finished student's release and send it to the Hub.

    Args:
        folder: the run's.
        label, seed: which student; None is the recipe's own, or its first seed.
        repo: repository on the Hub; None takes that of the recipe's `release`.
        private: make the repository private; so does the recipe's `release`.
        overrides: `key=value` of the recipe's `release`.
        out: folder to write instead of an upload.
        dry_run: only print what would be done, and write nothing.

    Raises:
        MmkdError: in one line, what is wrong with run, settings, folder or Hub.
    """
    source = choose(folder, label, seed)
    settings = release_settings(source, repo, private, overrides)
    if out is None and settings.repo is None:
        raise RecipeError(
            "no repository is named",
            where="release.repo",
            hint="give --repo me/student, or --out DIR for the folder alone",
        )
    if out is not None and out.exists():
        raise CheckpointError("it is there already", where=str(out), hint="name a new folder")
    if out is None and not dry_run:
        require_access(str(settings.repo))
    if settings.license is None:
        say("no license is given: add license=apache-2.0, or what models and data require")
    source.check_scores()
    card = make_card(source, settings)
    files = release_files(source, settings, card)
    if dry_run:
        print_preview(source, settings, files, card, out)
        return
    target = out or source.run.folder.release(source.member.label)
    write_release(files, target, new=out is not None)
    written = [path for path in target.rglob("*") if path.is_file()]
    size = compact(sum(path.stat().st_size for path in written), "B")
    say(f"wrote {target}: {len(written)} files, {size}")
    if out is None:
        say(f"released: {upload(target, settings)}")


def release_settings(
    source: Source, repo: str | None, private: bool, overrides: list[str] | None
) -> ReleaseConfig:
    """The recipe's `release` with the command's settings over it."""
    raw: dict[str, Any] = dict(source.run.recipe.get("release") or {})
    raw |= {"repo": repo} if repo else {}
    raw |= {"private": True} if private else {}
    return load_release(raw, overrides)


__all__ = ["release"]
