"""How many questions were kept of the data that models made for each stage."""

from dataclasses import dataclass

from mmkd.report.rundata import Run


@dataclass(frozen=True)
class MadeRow:
    """An entry of `make` that a stage of a student has read.

    Attributes:
        kept: "312 of 1,000 questions kept", and how many are hard if a check looks for hard ones.
        refused: answers that each check has refused, as text.
    """

    label: str
    stage: str
    entry: str
    kept: str
    refused: str


def made_rows(run: Run) -> list[MadeRow]:
    """The entries of each student and stage; the first seed if there are several."""
    found = []
    for group in run.groups:
        member = next(m for m in run.members if m.group == group)
        for stage in member.stages:
            for entry, counts in stage.made.items():
                refused = [f"{n:,} by {kind}" for kind, n in counts["refused"].items() if n]
                kept = f"{counts['kept']:,} of {counts['questions']:,} questions kept"
                for hard, judged in counts.get("hard", {}).values():
                    kept += f", {hard:,} of {judged:,} hard"
                of_all = f"{', '.join(refused)}, of {counts['answers']:,}" if refused else "none"
                found.append(MadeRow(member.label, stage.name, entry, kept, of_all))
    return found
