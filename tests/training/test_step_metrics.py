"""What ranks tell each other in a step: two all-reduces beside that of the gradients."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

from mmkd.training.step_metrics import sum_over_ranks
from tests.support.places import ROOT
from tests.support.recipes import tiny_recipe


class OneRank:
    """An engine's place, and a sum that doubles: two ranks with equal values."""

    device = torch.device("cpu")

    def __init__(self):
        self.sums = 0

    def total(self, values):
        self.sums += 1
        return values * 2


def test_tensors_of_all_shapes_and_types_are_summed_at_once():
    engine = OneRank()
    values = {
        "losses": torch.tensor([0.1, 0.2], dtype=torch.float64),
        "count": torch.tensor(2**53 // 2),
        "flag": torch.tensor(True),
        "load": torch.arange(6, dtype=torch.float32).view(2, 3),
    }
    found = sum_over_ranks(values, engine)
    assert engine.sums == 1
    assert {name: value.shape for name, value in found.items()} == {
        name: value.shape for name, value in values.items()
    }
    assert found["losses"].tolist() == [0.2, 0.4]
    assert int(found["count"]) == 2**53
    assert float(found["flag"]) == 2
    assert found["load"].tolist() == [[0, 2, 4], [6, 8, 10]]


@pytest.fixture(scope="module")
def counted(scenes_dir, tiny_model_dir, tmp_path_factory):
    """Collectives of each step of two processes: a mixture of two sources, two objectives, two
    micro-batches, sampled answers and sparse layers; lengths are not needed."""
    folder = tmp_path_factory.mktemp("counted")
    sources = [
        {"name": name, "train": str(scenes_dir / f"{name}.parquet")}
        for name in ("train", "validation")
    ]
    recipe = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        folder,
        teacher={"model": str(tiny_model_dir)},
        student={
            "model": str(tiny_model_dir),
            "convert": [{"kind": "moe", "experts": 4, "top_k": 2, "layers": "all"}],
        },
        data={"sources": sources},
        stage={
            "objectives": [{"kind": "kl"}, {"kind": "relation"}],
            "on_policy": {"lmbda": 0.5, "max_new_tokens": 2, "temperature": 0},
            "batch": {"size": 2, "total": 8, "group_by_length": False},
        },
    )
    path, out = folder / "recipe.yaml", folder / "counts.json"
    path.write_text(yaml.safe_dump(recipe))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "tests.support.counted_run", str(path), str(out)],
        check=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = (folder / "tiny" / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    return json.loads(out.read_text()), [json.loads(line) for line in lines]


def test_a_step_takes_two_all_reduces_beside_the_gradients(counted):
    steps, _ = counted
    assert len(steps) == 4
    assert steps[1:] == [{"allreduce": 3}] * 3


def test_a_step_still_says_all_it_said(counted):
    _, lines = counted
    for line in lines:
        assert {"loss", "kl", "relation", "tokens", "supervised_tokens", "padding", "sampled",
                "sources", "expert_load", "grad_norm"} <= line.keys()  # fmt: skip
        assert sum(line["sources"].values()) == 8
        for shares in line["expert_load"].values():
            assert sum(shares) == pytest.approx(1, abs=1e-3)
