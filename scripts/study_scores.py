"""Scores of the scene tasks of one or more runs with seeds, as JSON and as a table.

python -m scripts.study_scores runs/divergence-study --json docs/studies/divergences_scores.json

The table has the mean and the standard deviation over the seeds, in percent. Scores that the JSON
file has of other seeds are kept; it also has the accuracy of each kind of question. `--against kl`
prints a second table: the differences to this student, paired by seed.
"""

import argparse
import re
import statistics
from pathlib import Path

from mmkd.runtime.files import read_json, write_json

KINDS = ("existence", "count", "relation", "colour", "name", "category", "choice", "ocr")
NEGATIVES = ("random", "popular", "adversarial")
TASKS = {
    "scenes_pope": {
        "pope_random_accuracy": "pope_random",
        "pope_popular_accuracy": "pope_popular",
        "pope_adversarial_accuracy": "pope_adversarial",
        "answer_ece": "pope_ece",
        **{f"pope_{kind}_yes_rate": f"pope_{kind}_yes" for kind in NEGATIVES},
    },
    "scenes_vqa": {
        "vqa_accuracy": "vqa",
        "answer_ece": "vqa_ece",
        **{f"vqa_{kind}_accuracy": f"vqa_{kind}" for kind in KINDS},
    },
    "scenes_caption": {
        "caption_chair_s": "chair_s",
        "caption_object_recall": "objects_named",
        "caption_bleu": "bleu",
        "token_ece": "token_ece",
    },
}
PERCENT = 100.0
COLUMNS = (
    ("POPE random / popular / adversarial", ("pope_random", "pope_popular", "pope_adversarial")),
    ("VQA", ("vqa",)),
    ("CHAIR-s (lower is better)", ("chair_s",)),
    ("objects named", ("objects_named",)),
    ("ECE (lower is better)", ("pope_ece", "vqa_ece", "token_ece")),
)
Scores = dict[str, dict[str, dict[str, float]]]


def scores_of(run: Path) -> Scores:
    """{label: {seed: {score: percent}}} of a run's students and teacher."""
    found: Scores = {}
    for path in sorted((run / "evaluation").glob("*/results.json")):
        name = path.parent.name
        label, seed = name, "0"
        if match := re.fullmatch(r"(.+)-seed(\d+)", name):
            label, seed = match.groups()
        scores = read_json(path)["scores"]
        found.setdefault(label, {})[seed] = {
            short: round(scores[task][name] * PERCENT, 2)
            for task, names in TASKS.items()
            for name, short in names.items()
            if name in scores.get(task, {})
        }
    return found


def cell(seeds: dict[str, dict[str, float]], names: tuple[str, ...]) -> str:
    """Means, with standard deviations of several seeds."""
    parts = []
    for name in names:
        values = [scores[name] for scores in seeds.values() if name in scores]
        mean = f"{statistics.mean(values):.1f}" if values else "–"
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        parts.append(mean + spread)
    return " / ".join(parts)


def table(scores: Scores) -> str:
    """A table in Markdown, a row for each label."""
    head = " | ".join(title for title, _ in COLUMNS)
    lines = [f"| | {head} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for label, seeds in scores.items():
        cells = " | ".join(cell(seeds, names) for _, names in COLUMNS)
        lines.append(f"| `{label}` | {cells} |")
    return "\n".join(lines)


def differences(scores: Scores, label: str) -> Scores:
    """For each other label, its scores minus those of `label` with the same seed."""
    found: Scores = {}
    for other, seeds in scores.items():
        for seed in seeds.keys() & scores[label].keys() if other != label else ():
            pair = scores[label][seed], seeds[seed]
            names = [name for name in pair[1] if name in pair[0]]
            both = {name: round(pair[1][name] - pair[0][name], 2) for name in names}
            found.setdefault(other, {})[seed] = both
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--against", metavar="LABEL")
    given = parser.parse_args()
    merged: Scores = read_json(given.json) if given.json and given.json.exists() else {}
    for run in given.runs:
        for label, seeds in scores_of(run).items():
            merged.setdefault(label, {}).update(seeds)
    if given.json:
        write_json(given.json, merged)
    print(table(merged))
    if given.against:
        print(f"\n{table(differences(merged, given.against))}")
