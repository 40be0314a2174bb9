"""What a release would be, in the terminal."""

from pathlib import Path

from huggingface_hub import ModelCard, constants
from rich import box
from rich.table import Table
from rich.text import Text

from mmkd.recipe import ReleaseConfig
from mmkd.release.folder import Files, size_of
from mmkd.release.source import Source
from mmkd.report.tables import compact
from mmkd.runtime.progress import console, say


def print_preview(
    source: Source, settings: ReleaseConfig, files: Files, card: ModelCard, out: Path | None
) -> None:
    """Print files with sizes, the card's metadata, and where all would go."""
    sizes = {name: size_of(content) for name, content in files.items()}
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column(f"{source.member.label}: file", Text(f"{len(sizes)} files"))
    table.add_column("size", Text(compact(sum(sizes.values()), "B")), justify="right")
    for name, size in sorted(sizes.items()):
        table.add_row(Text(name), compact(size, "B"))
    console.print(table)
    say(f"the card's metadata:\n\n{card.data.to_yaml()}\n")
    place = f"{constants.ENDPOINT}/{settings.repo}" if out is None else str(out)
    if out is None and settings.private:
        place += ", private"
    say(f"would go to {place}; nothing was written or sent")
