"""Spoil, run and judge for some minutes; exit status 1 if anything broke.

python -m scripts.attacks --minutes 10 --seed 0
python -m scripts.attacks --seed 0 --case 17 --keep /tmp/seen    # one of them again
"""

import argparse
import importlib
import os
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PROCESSES = 2
LOST = "lost the connection to another process"
USED = (
    *("mmkd.cli", "mmkd.report", "mmkd.evaluation.samples", "mmkd.runs.pipeline"),
    *("mmkd.commands.bench", "mmkd.commands.build_cache", "mmkd.commands.cache_stats"),
    *("mmkd.commands.check_data", "mmkd.commands.plan", "mmkd.release"),
)
"""Modules that the commands import."""
TOLD = (
    *(
        "damaged",
        "passed over",
        "made again",
        "left out",
        "cut",
        "starts again",
        "skipped",
        "gone",
        "lost",
    ),
    *("already", "not finished", "was killed", "dropped", "no longer"),
)
"""Words with which a command says that it goes on without something."""


def attack(
    worlds: Any, seed: int, number: int, folder: Path, asked: str | None = None
) -> tuple[str, list[str]]:
    """Attack `number` of a seed, of the kind that is asked for or drawn.

    Returns:
        What was done, and what broke.
    """
    from mmkd.recipe import Recipe
    from scripts.attacks.kinds import KINDS
    from scripts.attacks.mutate import Schema
    from scripts.attacks.worlds import command, forked
    from tests.support.bad_inputs.table import contents

    draw = random.Random(f"{seed} {number}")
    drawn = draw.choices([*KINDS], [k.weight for k in KINDS.values()])[0]
    kind = asked or drawn
    name = draw.choice(KINDS[kind].worlds)
    worlds.copy(name, folder / "world")
    here = Path.cwd()
    os.chdir(folder / "world")
    try:
        words = KINDS[kind].spoil(draw, Schema(Recipe.model_json_schema()))
        before = contents(Path())
        ended = forked(command(words), folder, KINDS[kind].seconds)
        after = contents(Path())
        broken = judged(ended, words, before, after)
        if not broken and ended.status == 0 and kind in ("folders", "scores", "releases"):
            broken = silent(ended, words, worlds.reference(name))
    finally:
        os.chdir(here)
    said = (ended.err.strip() or ended.out.strip()).splitlines()[-1:]
    did = f"{kind} in {name}: mmkd {' '.join(words)}: {ended.status} {''.join(said)[:160]!r}"
    return did, broken


def judged(
    ended: Any, words: list[str], before: dict[str, str], after: dict[str, str]
) -> list[str]:
    """What must hold of any command."""
    found = []
    allowed = (0, 1, 2) if words[:2] == ["data", "check"] else (0, 2)
    if ended.status is None:
        return ["it hangs"]
    if ended.status not in allowed:
        found.append(f"exit status {ended.status}")
    if "Traceback" in ended.out + ended.err:
        found.append("a traceback")
    lines = ended.err.strip().split("\n")
    most = 1
    if "--nproc" in words:
        # A process names what is wrong, the others that they lost it. If their shares of the data
        # have different faults, each names its own.
        lines = [line for line in lines if LOST not in line] or lines[:1]
        most = PROCESSES if len({*lines}) == len(lines) else 1
    if ended.status == 2 and words[:2] != ["data", "check"]:
        if len(lines) > most or not lines:
            found.append(f"{len(lines)} lines on stderr")
        elif any(not line.startswith("mmkd: ") or line.count(" -- ") > 1 for line in lines):
            found.append("no line of what, where and hint")
    if "\x1b" in ended.out + ended.err:
        found.append("a terminal's control characters")
    if partial := [p for p in after if ".partial" in p and p not in before]:
        found.append(f"half-written: {partial[0]}")
    written = written_by(words)
    changed = sorted(p for p in {*before, *after} if after.get(p) != before.get(p))
    if gone := [p for p in changed if p in before and not p.startswith(written)]:
        found.append(f"an input has changed: {gone[0]}")
    reading = words[0] in ("plan", "data") or words[:2] == ["cache", "stats"]
    reading |= words[:1] in (["release"], ["convert"]) and (
        ended.status != 0 or "--dry-run" in words
    )
    if reading and changed:
        found.append(f"a command that leaves the disk alone has changed {changed[0]}")
    return found


def written_by(words: list[str]) -> tuple[str, ...]:
    """Beginnings of the paths that a command may change."""
    if "--out" in words:
        return (f"{words[words.index('--out') + 1]}/",)
    return ("runs/", "cache/", "report")


def silent(ended: Any, words: list[str], reference: dict[str, Any]) -> list[str]:
    """Whether a command that went on has other results than in an undamaged folder, and does not
    say so."""
    from scripts.attacks.worlds import losses, student

    if any(word in ended.out + ended.err for word in TOLD):
        return []
    found = []
    if words[0] == "run":
        if losses(Path()) != reference["losses"]:
            found.append(f"other losses, and no word of it: {losses(Path())[:3]}")
        if student(Path()) != reference["student"]:
            found.append("another student, and no word of it")
    as_they_are = words[0] == "release" and not any(
        word == "--dry-run" or word.startswith("dtype=") for word in words
    )
    if as_they_are and student(Path(), "released") != reference["student"]:
        found.append("other weights are released, and no word of it")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one only")
    parser.add_argument("--keep", type=Path, help="keep the folders of those that break here")
    parser.add_argument("--kind", help="draw attacks of this kind only")
    asked = parser.parse_args()
    with TemporaryDirectory() as name:
        home = Path(name).resolve()
        os.environ |= {
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(home / "cache"),
            "COLUMNS": "200",
        }
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        for name in USED:  # so that no attack waits for the imports
            importlib.import_module(name)
        from scripts.attacks.worlds import Worlds

        worlds = Worlds(home / "worlds")
        broken, count = run(worlds, home, asked)
    print(f"seed {asked.seed}: {sum(count.values())} attacks, {broken} broke: {dict(count)}")
    sys.exit(1 if broken else 0)


def run(worlds: Any, home: Path, asked: argparse.Namespace) -> tuple[int, Counter]:
    """Attack until the time is over; how many broke, and how many there were of each kind."""
    end, number, broken = time.monotonic() + 60 * asked.minutes, asked.case or 0, 0
    count: Counter = Counter()
    while time.monotonic() < end:
        folder = home / f"attack-{number}"
        folder.mkdir()
        did, found = attack(worlds, asked.seed, number, folder, asked.kind)
        count[did.partition(" ")[0]] += 1
        if found or asked.case is not None:
            print(f"{number}: {'; '.join(found) or 'holds'}\n    {did}", flush=True)
        if found:
            broken += 1
            kind = f" --kind {asked.kind}" if asked.kind else ""
            repeat = f"python -m scripts.attacks --seed {asked.seed} --case {number}{kind}"
            print(f"    {repeat}", flush=True)
        if asked.keep is not None and (found or asked.case is not None):
            shutil.copytree(folder, asked.keep / folder.name, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        if asked.case is not None:
            break
        number += 1
    return broken, count


if __name__ == "__main__":
    main()
