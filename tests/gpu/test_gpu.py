"""Training and generation on a GPU equal those on a CPU; skipped without a GPU.

Float32 is compared without TF32: what is left are sums in another order. mamba-ssm's kernels
multiply float32 in TF32 by themselves, so hybrids have the tolerance of their tests.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from mmkd.commands import build_cache
from mmkd.evaluation.adapter import MmkdModel
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from mmkd.runtime.files import read_json
from mmkd_models import kernels
from tests.support.places import ROOT
from tests.support.recipes import tiny_recipe
from tests.support.recurrences import TOLERANCE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

OBJECTIVES = [
    {"kind": "ce"},
    {"kind": "kl", "weight": 0.5},
    {"kind": "jsd", "name": "jsd_vision", "region": "vision"},
    {"kind": "skew_kl", "temperature": 2.0},
    {"kind": "relation"},
    {"kind": "layer_l2", "layers": [1]},
]
STUDENTS = {
    "dense": [],
    "sparse": [{"kind": "moe", "experts": 4, "top_k": 2, "layers": "all"}],
    "hybrid": [{"kind": "mamba", "keep_attention": [0], "init": "mimic"}],
}
ROUNDING = 2**-8  # of bfloat16
SAME = 1e-4  # float32 sums in another order, after a few steps of Adam


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def losses(scenes_dir, tiny_model_dir, tmp_path):
    """Runs a recipe on a device; its losses and gradients' norms by step."""

    def recipe(name, device, *, convert=(), source="live", engine=None, pairs=False, **stage):
        file = "preferences.parquet" if pairs else "train.parquet"
        return tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            data={"train": str(scenes_dir / file)},
            teacher={
                "model": str(tiny_model_dir),
                "source": source,
                "cache": {"folder": str(tmp_path / f"cache-{device}"), "k": 50},
            },
            student={"model": str(tiny_model_dir), "convert": list(convert)},
            stage={
                "objectives": OBJECTIVES,
                # A large eps: gradients that are rounding alone must not become steps.
                "optimizer": {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-4},
                "precision": "float32",
                "checkpoint": {"interval": 2},
                "engine": {"device": device, **(engine or {})},
                **stage,
            },
        )

    def run(name, device, **settings):
        made = load_recipe(recipe(name, device, **settings))
        if settings.get("source") == "cache":
            build_cache.build_cache(made)
        folder = pipeline.run(made)
        lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert len(steps) == made.stages[0].steps
        return [[s["loss"], s["grad_norm"]] for s in steps]

    run.recipe = recipe
    return run


def close(got, want, rel):
    for mine, theirs in zip(got, want, strict=True):
        assert mine == pytest.approx(theirs, rel=rel)


def tolerance(student):
    kernel = callable(kernels.load("mamba_chunk_scan_combined"))
    return TOLERANCE["triton"][1] if student == "hybrid" and kernel else SAME


@pytest.mark.parametrize("student", STUDENTS)
def test_training(losses, student):
    settings = {"convert": STUDENTS[student]}
    close(*(losses(d, d, **settings) for d in ("cuda", "cpu")), tolerance(student))


@pytest.mark.parametrize("student", STUDENTS)
def test_packed_rows(losses, student):
    settings = {"convert": STUDENTS[student], "objectives": OBJECTIVES[:4]}
    packed = losses("packed", "cuda", batch={"size": 8, "pack": 700}, **settings)
    apart = losses("apart", "cpu", batch={"size": 8}, **settings)
    close(packed, apart, tolerance(student))


@pytest.mark.parametrize("student", STUDENTS)
def test_bfloat16_starts_as_float32_but_for_rounding(losses, student):
    settings = {"convert": STUDENTS[student], "objectives": OBJECTIVES[:2]}
    half = losses("half", "cuda", precision="bfloat16", **settings)
    whole = losses("whole", "cpu", **settings)
    assert half[0][0] == pytest.approx(whole[0][0], rel=2 * ROUNDING)
    assert half[-1][0] < half[0][0]


@pytest.mark.parametrize(
    "stage",
    [
        {"activation_checkpointing": True, "objectives": OBJECTIVES[:5]},
        {"batch": {"size": 2, "total": 8}},
        {"batch": {"total": 8, "tokens": 2048}},
        {"train": {"groups": [], "lora": {"groups": ["language_model", "head"]}}},
        {"objectives": [{"kind": "kl"}], "engine": {"head_memory": 1}},
        {
            "objectives": [{"kind": "jsd"}],
            "on_policy": {"lmbda": 0.5, "max_new_tokens": 6, "temperature": 0, "correct": 1},
        },
    ],
    ids=["checkpointing", "micro-batches", "token budget", "lora", "small chunks", "on policy"],
)
def test_stages(losses, stage):
    engine = stage.pop("engine", {})
    close(*(losses(d, d, engine=engine, **stage) for d in ("cuda", "cpu")), SAME)


@pytest.mark.parametrize("reference", ["teacher", "self"])
def test_preferences(losses, reference):
    objectives = [{"kind": "preference", "loss": "sigmoid", "reference": reference}]
    found = [losses(d, d, pairs=True, objectives=objectives) for d in ("cuda", "cpu")]
    close(*found, SAME)


def test_a_cache_is_the_same_wherever_it_was_built(losses):
    settings = {"source": "cache", "objectives": OBJECTIVES[:2]}
    close(*(losses(d, d, **settings) for d in ("cuda", "cpu")), 1e-3)


def test_a_run_goes_on_where_it_stopped(losses, monkeypatch):
    """To the last bit on the torch engine with the head's losses and experts of these students."""
    from mmkd.training import stage

    settings = {"convert": STUDENTS["sparse"], "steps": 6}
    want = losses("whole", "cuda", **settings)
    step = stage.Stage.step

    def breaking_off(self, number, batches):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number, batches)

    monkeypatch.setattr(stage.Stage, "step", breaking_off)
    with pytest.raises(KeyboardInterrupt):
        losses("again", "cuda", **settings)
    monkeypatch.setattr(stage.Stage, "step", step)
    close(losses("again", "cuda", **settings), want, 1e-6)


ENGINES = {
    **{f"zero{z}": {"kind": "deepspeed", "zero": z} for z in range(4)},
    "optimizer": {"kind": "deepspeed", "zero": 2, "offload": "optimizer"},
    "all": {"kind": "deepspeed", "zero": 3, "offload": "all"},
}


@pytest.fixture
def launched(losses, tmp_path):
    """Runs of engines in one process of their own, as DeepSpeed wants it."""

    def start(precision, named):
        settings = {
            "convert": STUDENTS["sparse"],
            "precision": precision,
            "objectives": OBJECTIVES if precision == "float32" else OBJECTIVES[:2],
        }
        made = [losses.recipe(n, "cuda", engine=e, **settings) for n, e in named.items()]
        path = tmp_path / "runs.json"
        path.write_text(json.dumps([(recipe, None) for recipe in made]))
        done = subprocess.run(
            [sys.executable, "-m", "tests.support.engine_runs", str(path)],
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "4",
                "NVIDIA_TF32_OVERRIDE": "0",
                "PYTHONPATH": str(ROOT),
            },
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr[-9000:]
        found = {}
        for name in named:
            lines = (tmp_path / name / "01-mimic" / "metrics.jsonl").read_text().splitlines()
            found[name] = [json.loads(line)["loss"] for line in lines]
        return found

    return start


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_deepspeed(launched, precision):
    pytest.importorskip("deepspeed")
    named = {"torch": {}, **ENGINES}
    if precision == "bfloat16":
        del named["zero0"]  # refused: it has no float32 weights
    want, *others = launched(precision, named).values()
    bound = SAME if precision == "float32" else 2 * ROUNDING
    for got in others:
        assert got == pytest.approx(want, rel=bound)


def test_answers_and_scores(losses, scenes_dir, tiny_model_dir, tmp_path):
    """The same answers, one after another and several at once, and times to decode."""
    pytest.importorskip("lmms_eval")
    evaluate = {
        "tasks": ["scenes_pope", "scenes_caption"],
        "include": str(scenes_dir / "tasks"),
        "limit": 6,
        "decode": [20],
    }
    found = {}
    for device in ("cpu", "cuda"):
        raw = losses.recipe(device, device, steps=1, convert=STUDENTS["hybrid"])
        folder = pipeline.run(load_recipe({**raw, "evaluate": evaluate}))
        answers = {}
        for member in ("teacher", "student"):
            scored = folder / "evaluation" / member
            assert read_json(scored / "decode.json")["device"].startswith(device)
            for path in (scored / "samples").iterdir():
                lines = path.read_text().splitlines()
                answers[member, path.name] = [json.loads(line)["prediction"] for line in lines]
        assert len(answers) == 4
        found[device] = answers
    assert found["cuda"] == found["cpu"]


def test_the_adapter_takes_the_gpu(tiny_model_dir):
    adapter = MmkdModel(pretrained=str(tiny_model_dir), batch_size=2)
    assert adapter.device.type == "cuda"
