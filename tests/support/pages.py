"""Content of documentation pages: code blocks, and described changes to files."""

import re
from pathlib import Path

from tests.support.places import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def pages() -> list[Path]:
    """README and the other pages of the front folder, and all pages below docs."""
    front = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    return [*front, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks of a language."""
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def apply_change(change: str, root: Path) -> None:
    """Apply a ```diff block without line numbers: after `--- path` come hunks, parted by `@@`,
    whose old lines stand in the file once."""
    for part in re.split(r"^--- ", change, flags=re.M)[1:]:
        name, _, hunks = part.partition("\n")
        path = root / name
        text = path.read_text()
        for hunk in re.split(r"^@@\n", hunks, flags=re.M):
            lines = hunk.splitlines()
            old, new = (_side(lines, sign) for sign in "-+")
            assert text.count(old) == 1, f"{name}: {text.count(old)} times\n{old}"
            text = text.replace(old, new)
        path.write_text(text)


def _side(lines: list[str], sign: str) -> str:
    return "".join(f"{line[1:]}\n" for line in lines if not line or line[0] in (" ", sign))
