"""The tables of studies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.study_scores import differences, scores_of, table
from tests.support.places import ROOT


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for label, seed, recall, bleu in (
        *(("kl", 0, 0.5, 0.61), ("kl", 1, 0.6, 0.62)),
        *(("ce", 0, 0.45, 0.7), ("ce", 1, 0.5, 0.74), ("ce", 2, 0.1, 0.1)),
    ):
        folder = tmp_path / "evaluation" / f"{label}-seed{seed}"
        folder.mkdir(parents=True)
        scores = {"caption_object_recall": recall, "caption_bleu": bleu}
        results = {"scores": {"scenes_caption": scores}}
        (folder / "results.json").write_text(json.dumps(results))
    return tmp_path


def test_all_scores_are_in_percent(run: Path) -> None:
    assert scores_of(run)["kl"] == {
        "0": {"objects_named": 50, "bleu": 61},
        "1": {"objects_named": 60, "bleu": 62},
    }


def test_differences_are_paired_by_seed(run: Path) -> None:
    scores = scores_of(run)
    found = differences(scores, "kl")
    assert found == {
        "ce": {"0": {"objects_named": -5, "bleu": 9}, "1": {"objects_named": -10, "bleu": 12}}
    }
    assert "| -7.5 ± 3.5 |" in table(found)


def test_scores_of_other_seeds_are_kept(run: Path) -> None:
    out = run / "scores.json"
    out.write_text(json.dumps({"kl": {"7": {"vqa": 1.0}}, "new": {"0": {"vqa": 2.0}}}))
    command = [sys.executable, "-m", "scripts.study_scores", run, "--json", out, "--against", "kl"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    kept = json.loads(out.read_text())
    assert list(kept["kl"]) == ["7", "0", "1"]
    assert kept["new"] == {"0": {"vqa": 2.0}}
    assert printed.count("| `ce` |") == 2
