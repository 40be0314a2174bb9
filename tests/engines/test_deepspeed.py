"""ZeRO stages 0 to 3 train like the torch engine, and resume from checkpoints of any engine.

The student is a sparse hybrid, its objectives read the output, image tokens and layers; all runs of
a number of processes share one launch.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mmkd.recipe import StudentConfig
from mmkd.students import write_converted
from tests.support.places import ROOT
from tests.support.recipes import tiny_recipe
from tests.support.slow import only, runs_all_cases

pytest.importorskip("deepspeed")

OBJECTIVES = [
    {"kind": "ce"},
    {"kind": "kl", "weight": 0.5},
    {"kind": "kl", "name": "kl_vision", "region": "vision"},
    {"kind": "kl", "name": "kl_top", "top_k": 5, "acceptance": True},
    {"kind": "balanced_kl", "weight": 0.5},
    {"kind": "relation"},
    {"kind": "affinity", "weight": 0.5},
    {"kind": "layer_l2"},
    {"kind": "router_z", "weight": 0.01},  # balance is a micro-batch's own
    # with parameters of their own
    {"kind": "exits", "layers": [1, 0], "norm": "own", "block": True, "lr": 2e-3},
    {"kind": "hidden_mse", "layers": [1], "linear_map": True, "normalize": "token"},
    {"kind": "embedding"},
]
CONVERT = [
    {"kind": "mamba", "keep_attention": [0], "init": "mimic"},
    {"kind": "moe", "experts": 4, "top_k": 2, "layers": "all"},
]
STEPS, STOP = 6, 5
LOGGED = ("loss", "ce", "kl", "kl_vision", "kl_top", "kl_top/acceptance", "balanced_kl", "relation",
          "affinity", "layer_l2", "exits", "hidden_mse", "embedding", "grad_norm")  # fmt: skip
SPREAD = "spread.json"
ENGINES = {
    "torch": {},
    **{f"zero{z}": {"kind": "deepspeed", "zero": z} for z in range(4)},
    "offload": {"kind": "deepspeed", "zero": 3, "offload": "all"},
    # the teacher's weights
    "sharded": {"kind": "deepspeed", "zero": 2},
    "sharded-torch": {},
    "waiting": {"kind": "deepspeed", "zero": 3},
}
PLACEMENTS = {"sharded": "sharded", "sharded-torch": "sharded", "waiting": "offload"}
# begun on, gone on with
HANDED_OVER = [("zero2", "zero2"), ("zero3", "zero3"), ("torch", "zero3"), ("zero1", "torch")]
QUICKLY_HANDED_OVER = [("zero3", "zero3"), ("torch", "zero3")]


# What runs a frozen model or samples beside: name -> engines, stage. `make test` runs the first two
# engines of each, so that each engine is among them.
BESIDE = {
    "preference": (
        ("torch", "sharded", "zero3"),
        {
            "objectives": [
                {"kind": "preference", "loss": "sigmoid", "reference_logps": "once"},
                {"kind": "kl"},
            ],
            "pairs": True,
        },
    ),
    "self": (
        ("torch", "zero3"),
        {"objectives": [{"kind": "preference", "loss": "ipo", "reference": "self"}], "pairs": True},
    ),
    # a sharded teacher corrects on all processes, also where no answer was sampled
    "sampled": (
        ("torch", "sharded", "zero2"),
        {
            "objectives": [{"kind": "jsd"}],
            "on_policy": {"lmbda": 0.3, "max_new_tokens": 6, "temperature": 0, "correct": 1},
        },
    ),
    # some processes' micro-batches have no image, vision weights have to run on all
    # mutual depends on the micro-batches, so it is not among OBJECTIVES
    "wordy": (
        ("torch", "zero3", "sharded-torch", "zero1", "zero2"),
        {
            "objectives": [*OBJECTIVES, {"kind": "mutual", "layers": [1]}],
            "batch": {"size": 1, "total": 4},
            "wordy": True,
        },
    ),
    # as many micro-steps as a step's records need
    "budget": (
        ("torch", "zero1", "zero0", "zero2", "zero3"),
        {"batch": {"total": 8, "tokens": 320}, "max_length": 320},
    ),
    # the head's adapter is read outside of its layer
    "adapters": (
        ("torch", "zero2", "zero1", "zero3"),
        {"train": {"groups": ["moe.router"], "lora": {"groups": ["language_model", "head"]}}},
    ),
    # weights of objectives from their gradients
    "balanced": (
        ("torch", "zero3", "zero2"),
        {"objectives": [{"kind": "ce"}, {"kind": "jsd"}], "balance_gradients": True},
    ),
    # teacher and student have one frozen vision tower
    "frozen": (("torch", "sharded-torch", "zero2", "zero3"), {"train": ["language_model"]}),
    # the same image tokens in all models
    "fewer_tokens": (
        ("torch", "zero3", "sharded", "zero2"),
        {"batch": {"size": 1, "total": 4}, "wordy": True, "image_tokens": {"keep": 0.5}},
    ),
    "wordy_pairs": (
        ("torch", "zero3", "zero2"),
        {
            "objectives": [{"kind": "preference", "loss": "sigmoid"}, {"kind": "kl"}],
            "batch": {"size": 1, "total": 4},
            "pairs": True,
            "wordy": True,
        },
    ),
}


HALF = ("zero2", "zero1", "zero3")
ROUNDING = 2**-8  # of bfloat16


class Runs:
    """Starts runs and reads what they left."""

    def __init__(self, scenes: Path, model: Path, folder: Path):
        self.scenes, self.model, self.folder = scenes, model, folder
        self.student = folder / "converted"
        config = StudentConfig(model=str(model), convert=CONVERT)
        write_converted(config, self.student, seed=0)

    def recipe(self, name: str, engine: str, *, pairs=False, wordy=False, max_length=2048, **stage):
        file = "preferences.parquet" if pairs else "train.parquet"
        train = (self.folder if wordy else self.scenes) / file
        return tiny_recipe(
            self.scenes,
            self.model,
            self.folder,
            name=name,
            teacher={"model": str(self.model), "placement": PLACEMENTS.get(engine, "auto")},
            student={"model": str(self.student)},
            data={"train": str(train), "max_length": max_length},
            stage={
                "objectives": OBJECTIVES,
                "steps": STEPS,
                "batch": {"size": 2, "total": 8},
                "engine": {"device": "cpu", **self._engine(engine)},
                # A large eps: gradients that are rounding alone must not become steps.
                "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-4},
                "checkpoint": {"interval": 2},
                **stage,
            },
        )

    def _engine(self, engine: str) -> dict:
        settings = ENGINES[engine]
        if settings.get("zero") == 3:
            return {**settings, "config": str(self.folder / SPREAD)}
        return settings

    def start(self, entries: list, processes: int) -> None:
        # Tiny weights are spread too.
        spread = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
        (self.folder / SPREAD).write_text(json.dumps(spread))
        path = self.folder / f"runs-{processes}-{len(list(self.folder.glob('runs-*')))}.json"
        path.write_text(json.dumps(entries))
        torchrun = ["-m", "torch.distributed.run", "--standalone"]
        launcher = [*torchrun, f"--nproc_per_node={processes}"] if processes > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "tests.support.engine_runs", str(path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-9000:]

    def metrics(self, name: str) -> list[dict]:
        path = self.folder / name / "01-mimic" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def weights(self, name: str, file: str = "student/model.safetensors") -> dict:
        return load_file(self.folder / name / "01-mimic" / file)


def write_wordy(source: Path, target: Path) -> None:
    """The records with an image left to every third of them."""
    rows = pq.read_table(source).to_pylist()
    for number, row in enumerate(rows):
        if number % 3:
            row["image"] = None
            for turns in (row.get(k) or [] for k in ("conversations", "chosen", "rejected")):
                for turn in turns:
                    turn["value"] = turn["value"].replace("<image>\n", "")
    pq.write_table(pa.Table.from_pylist(rows), target)


@pytest.fixture(scope="module")
def runs(request, scenes_dir, tiny_model_dir, tmp_path_factory) -> Runs:
    """All runs: every engine at one and two processes, and those that are handed over."""
    whole = runs_all_cases(request)
    made = Runs(scenes_dir, tiny_model_dir, tmp_path_factory.mktemp("runs"))
    for file in ("train.parquet", "preferences.parquet"):
        write_wordy(scenes_dir / file, made.folder / file)
    two = [(made.recipe(f"{engine}-2", engine), None) for engine in ENGINES]
    for before, after in HANDED_OVER if whole else QUICKLY_HANDED_OVER:
        name = f"{before}-{after}"
        two += [(made.recipe(name, before), STOP), (made.recipe(name, after), None)]
    two.append((made.recipe("two-one", "zero3"), STOP))
    for name, (engines, settings) in BESIDE.items():
        two += [
            (made.recipe(f"{name}-{e}", e, steps=3, **settings), None)
            for e in engines[: None if whole else 2]
        ]
    for engine in HALF if whole else HALF[:1]:
        two.append((made.recipe(f"half-{engine}", engine, precision="bfloat16"), None))
    again = made.recipe("half-again", "zero2", precision="bfloat16")
    two += [(again, STOP), (again, None)]
    made.start(two, 2)
    one = [(made.recipe(f"{engine}-1", engine), None) for engine in ("torch", "zero2", "zero3")]
    one += [(made.recipe("two-one", "zero2"), None), (made.recipe("one-two", "torch"), STOP)]
    one.append((made.recipe("fewer_tokens-1", "torch", steps=3, **BESIDE["fewer_tokens"][1]), None))
    made.start(one, 1)
    made.start([(made.recipe("one-two", "zero2"), None)], 2)
    return made


@pytest.mark.parametrize(
    "name", [*(f"{e}-2" for e in ENGINES), "zero2-1", "zero3-1", "two-one", "one-two"]
)
def test_every_engine_trains_the_same(runs, name):
    """1e-5 is what float32 sums in another order are apart after six steps of Adam."""
    got, want = runs.metrics(name), runs.metrics("torch-1")
    assert len(got) == len(want) == STEPS
    for mine, theirs in zip(got, want, strict=True):
        for key in LOGGED:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6), (key, mine["step"])
        assert mine["lr"] == theirs["lr"]
        assert mine["supervised_tokens"] == theirs["supervised_tokens"]
    assert runs.weights(name).keys() == load_file(runs.student / "model.safetensors").keys()
    for file in ("student/model.safetensors", "objectives.safetensors"):
        weights, expected = runs.weights(name, file), runs.weights("torch-1", file)
        assert weights.keys() == expected.keys()
        for key, tensor in weights.items():
            assert tensor.dtype == expected[key].dtype
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("before_after", only(QUICKLY_HANDED_OVER, HANDED_OVER))
def test_a_run_goes_on_where_it_stopped(runs, before_after):
    before, after = before_after
    got = [m["loss"] for m in runs.metrics(f"{before}-{after}")]
    want = [m["loss"] for m in runs.metrics(f"{before}-2")]
    if before == after:
        assert got == want
    else:
        assert got[: STOP - 1] == want[: STOP - 1]
        assert got == pytest.approx(want, rel=1e-5)


PAIRS = [(name, engine) for name, (engines, _) in BESIDE.items() for engine in engines[1:]]
QUICK_PAIRS = [(name, engines[1]) for name, (engines, _) in BESIDE.items()]


@pytest.mark.parametrize("pair", only(QUICK_PAIRS, PAIRS))
def test_frozen_models_and_samples_are_the_same_on_every_engine(runs, pair):
    name, engine = pair
    got, want = runs.metrics(f"{name}-{engine}"), runs.metrics(f"{name}-{BESIDE[name][0][0]}")
    assert [m["loss"] for m in got] == pytest.approx([m["loss"] for m in want], rel=1e-5)
    for key in ("sampled", "corrected", "corrected_at"):
        assert [m.get(key) for m in got] == [m.get(key) for m in want]


def test_a_token_budget_changes_no_loss(runs):
    """Of the steps at whose start both schedules have given the same rates."""
    want = [m["loss"] for m in runs.metrics("torch-1")][:2]
    assert [m["loss"] for m in runs.metrics("budget-torch")][:2] == pytest.approx(want, rel=1e-5)


def test_image_tokens_do_not_depend_on_the_number_of_processes(runs):
    got, want = runs.metrics("fewer_tokens-torch"), runs.metrics("fewer_tokens-1")
    assert [m["loss"] for m in got] == pytest.approx([m["loss"] for m in want], rel=1e-5)
    assert [m["tokens"] for m in got] == [m["tokens"] for m in want]


@pytest.mark.parametrize("engine", only(HALF[:1], HALF))
def test_bfloat16_trains_float32_weights(runs, engine):
    """As float32 does but for rounding, and what is written is not rounded."""
    got, want = runs.metrics(f"half-{engine}"), runs.metrics("torch-2")
    for mine, theirs in zip(got, want, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2 * ROUNDING)
    weights = runs.weights(f"half-{engine}")
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert any((t != t.bfloat16().float()).any() for t in weights.values())


def test_bfloat16_goes_on_where_it_stopped(runs):
    got, want = runs.metrics("half-again"), runs.metrics("half-zero2")
    assert [m["loss"] for m in got] == [m["loss"] for m in want]
    weights, expected = runs.weights("half-again"), runs.weights("half-zero2")
    assert all(torch.equal(t, expected[name]) for name, t in weights.items())
