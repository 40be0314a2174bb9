"""docs/families.md: written from verdicts, and read again."""

import re
from collections.abc import Mapping
from typing import Any

from scripts.families.checks import CHECKS, Verdict

COLUMNS = list(CHECKS)
HEAD = """# Families

What mmkd does with families of vision-language models that transformers ships, seen on a CPU on
tiny random models of their real classes, with their real processors and their documented chat
templates around a small tokenizer; no published weights were loaded. Each cell is a run of mmkd's
own path; what does not work is refused in one line, whose words are below the table.
`python -m scripts.families --write docs/families.md` writes this page, and
`tests/documents/test_families_table.py` fails where it no longer holds.

- **teacher**: its distributions over responses and image tokens teach a student of the family.
- **dense**, **MoE**, **hybrid**, **LoRA**: a student as it is, with experts for all feed-forward
  networks, with Mamba-2 for one layer's attention, with adapters: one step; the folder loads as the
  student that was trained.
- **packing**: `batch.pack`; losses and gradient are those of the same records apart.
- **several pictures**, **no picture**, **video frames**: such records alone and in a batch:
  responses and image tokens are marked to the token, other records change no hidden state, lengths
  are foreseen. Frames are a record's pictures in their order; a family's own video inputs are not
  used.
- **picture cache**: `data.picture_cache` gives the same inputs bit by bit.
- **needs**: packages without which transformers does not load the family's processor.
"""


def write(results: Mapping[str, tuple[Any, Mapping[str, Verdict]]], versions: str) -> str:
    """The page.

    Args:
        results: of each family its member of the zoo and its verdicts.
        versions: of the packages that it was seen with.
    """
    reasons: list[str] = []

    def cell(found: Verdict) -> str:
        if not found.reason:
            return found.word
        if found.reason not in reasons:
            reasons.append(found.reason)
        return f"{found.word} [{reasons.index(found.reason) + 1}]"

    rows = [["family", *COLUMNS, "needs"], ["---"] * (len(COLUMNS) + 2)]
    for member, found in results.values():
        cells = [cell(found[column]) for column in COLUMNS]
        rows.append([member.title, *cells, ", ".join(member.needs) or "-"])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([HEAD, *lines, "", "Why not:", "", *notes, "", f"Seen with {versions}.", ""])


def read(page: str) -> dict[str, dict[str, Verdict]]:
    """What a page says, by title of the family and column."""
    reasons = dict(re.findall(r"^(\d+)\. (.*)$", page, flags=re.MULTILINE))
    found: dict[str, dict[str, Verdict]] = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] not in ("family", "---"):
            found[cells[0]] = {}
            for column, text in zip(COLUMNS, cells[1:-1], strict=True):
                word, _, note = text.partition(" ")
                reason = reasons[note.strip("[]")] if note else ""
                found[cells[0]][column] = Verdict(word, reason)
    return found
