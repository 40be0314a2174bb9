"""A batch of three sequences with images, prompts and responses, and tensors for its tokens."""

import json
from pathlib import Path
from typing import Any

import torch

from mmkd.objectives import Targets
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from tests.support.recipes import tiny_recipe

B, T = 3, 7
LAYOUT = ["vvpprr.", "vpprrrr", "pprrr.."]


def mask(letters):
    return torch.tensor([[c in letters for c in row] for row in LAYOUT])


TARGETS = Targets(torch.zeros(B, T, dtype=torch.long), mask("vpr"), mask("r"), mask("v"))


def affinity_twin(student, teacher, layout, *, center, temperatures):
    """The affinity loss of the records that have an image and an answer, by loops.

    Args:
        student, teacher: hidden states, [B, T, H].
        layout: of the tokens, a text for each record, as in `LAYOUT`.
        center: subtract the mean over records.
        temperatures: of student and teacher.
    """
    covered = [b for b, row in enumerate(layout) if "v" in row and "r" in row]
    tables = []
    for hidden, temperature in zip((student, teacher), temperatures, strict=True):
        pictures, answers = [], []
        for b in covered:
            said = [t - 1 for t, token in enumerate(layout[b]) if token == "r"]
            seen = [t for t, token in enumerate(layout[b]) if token == "v"]
            pictures.append(hidden[b, seen].mean(0))
            answers.append(hidden[b, said].mean(0))
        for group in (pictures, answers):
            mean = sum(group) / len(group) * center
            group[:] = [(x - mean) / (x - mean).norm() for x in group]
        tables.append(
            torch.stack([torch.stack([i @ t / temperature for t in answers]) for i in pictures])
        )
    mine, theirs = tables
    total = 0.0
    for k in range(len(covered)):
        for m, t in ((mine[k], theirs[k]), (mine[:, k], theirs[:, k])):
            p, q = t.softmax(0), m.softmax(0)
            total = total + (p * (p / q).log()).sum()
    return total / len(covered)


def normal(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()


def losses_of_training(
    scenes_dir: Path, tiny_model_dir: Path, folder: Path, objective: dict[str, Any]
) -> list[float]:
    """Losses of five steps by one objective; every step has all records."""
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        folder,
        teacher={"model": str(tiny_model_dir)},
        student={
            "model": str(tiny_model_dir),
            "convert": [
                {"kind": "width_pruning", "decoder": 16},
                {"kind": "mamba", "layers": [1], "init": "mimic"},
            ],
        },
        stage={"objectives": [objective], "batch": {"size": 64}, "steps": 5},
    )
    lines = (pipeline.run(load_recipe(raw)) / "01-mimic" / "metrics.jsonl").read_text()
    return [json.loads(line)["loss"] for line in lines.splitlines()]
