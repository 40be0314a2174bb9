"""Print what was made."""

from datetime import timedelta

from mmkd.making.make import Made
from mmkd.runtime.progress import say

SHOWN = 5
"""Unreadable images that are named."""


def print_made(made: Made) -> None:
    """Print what was made, and why answers were not used."""
    new, known = made.asked.answers, made.asked.known
    say(f"wrote {made.out}: {made.records:,} records of {made.questions:,} questions")
    if said := str(made.left_out):
        say(f"  {said}")
    for error in made.left_out.uncompared[:SHOWN]:
        say(f"  could not be compared: {error}")
    if len(made.left_out.uncompared) > SHOWN:
        say(f"  could not be compared: {len(made.left_out.uncompared) - SHOWN:,} more")
    if new:
        time = timedelta(seconds=round(made.asked.seconds))
        say(f"  {new:,} new answers in {time}, {made.asked.rate:,.1f} a second")
    if known:
        say(f"  {known:,} answers were known")
    for kind, count in made.refused.items():
        say(f"  {count:,} of {made.answers:,} answers refused by '{kind}'")
    for kind, (hard, known) in made.hard.items():
        say(f"  {hard:,} of {known:,} questions are hard by '{kind}' ({hard / max(known, 1):.0%})")
    if made.similar is not None:
        say(f"  {made.similar:,} texts left out that are similar to an earlier one")
    if made.unanswered:
        say(f"  {made.unanswered:,} questions have no record")
    unreadable = list(dict.fromkeys(made.asked.unreadable.values()))
    for error in unreadable[:SHOWN]:
        say(f"  left out: {error}")
    if len(unreadable) > SHOWN:
        say(f"  left out: {len(unreadable) - SHOWN:,} more")
