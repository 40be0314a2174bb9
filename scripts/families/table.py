"""docs/families.md: written from verdicts, and read again."""

import re
from collections.abc import Mapping
from typing import Any

from scripts.families.checks import CHECKS, Verdict

COLUMNS = list(CHECKS)
HEAD = """# Families

This page shows which families of vision-language models in transformers you can use as teacher or
student, and with which features. The results are from tiny random models of the real classes on a
CPU, with their real processors and documented chat templates and a small tokenizer. No published
weights were loaded. Each cell is the result of running mmkd. Combinations that do not work are
refused with one line, which is quoted below the table. `python -m scripts.families --write
docs/families.md` writes this page, and `tests/documents/test_families_table.py` fails if it is out
of date.

- **teacher**: a model of the family teaches a student with its distributions over responses and
  image tokens.
- **dense**, **MoE**, **hybrid**, **LoRA**: a student without changes, with experts for all
  feed-forward networks, with Mamba-2 for one layer's attention, or with adapters is trained for one
  step. The written folder loads as the same student.
- **packing**: with `batch.pack`, losses and gradients are those of the same records without it.
- **several images**, **no image**, **video frames**: such records work alone and in a batch. Masks
  of responses and image tokens are exact to the token, other records in the batch do not change the
  hidden states, and lengths are predicted correctly. Frames are a record's images in their order; a
  family's own video inputs are not used.
- **image cache**: `data.image_cache` gives the same inputs bit for bit.
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
    return "\n".join([HEAD, *lines, "", "Reasons:", "", *notes, "", f"Tested with {versions}.", ""])


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
