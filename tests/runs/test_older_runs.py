"""Folders that an earlier version wrote still work: a stopped run, a teacher cache, a student.

`fixtures/run_0_1.tar.xz` was written by version 0.1 (commit 9d9abc8): a two-stage recipe with a
hybrid student and a cached teacher, stopped by SIGTERM after step 5 of 8 of its second stage, and
the metrics of the same recipe without the interruption.
"""

import json
import tarfile

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmkd.modeling.loading import load_model
from mmkd.recipe import ModelConfig
from tests.support import warm
from tests.support.places import FIXTURES

ARCHIVE = FIXTURES / "run_0_1.tar.xz"


@pytest.fixture
def older(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def mmkd(folder, *words):
    return warm.run(*words, cwd=folder)


def metrics(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_stopped_run_goes_on_with_the_losses_of_an_uninterrupted_one(older):
    stage = older / "runs" / "stopped" / "02-second"
    before = metrics(stage / "metrics.jsonl")
    assert [line["step"] for line in before] == [1, 2, 3, 4, 5]
    # The run's own recipe.yaml holds every key of the older version and none that came later.
    (older / "again.yaml").write_text((older / "runs/stopped/recipe.yaml").read_text())
    done = mmkd(older, "run", "again.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    want, found = metrics(older / "expected" / "metrics.jsonl"), metrics(stage / "metrics.jsonl")
    assert [line["step"] for line in found] == [line["step"] for line in want]
    assert found[:5] == before
    for a, b in zip(found, want, strict=True):
        for name in ("loss", "ce", "kl", "grad_norm"):
            # The fixture comes from another processor, whose products round otherwise.
            assert a[name] == pytest.approx(b[name], rel=1e-4), name
        assert (a["lr"], a["tokens"], a["supervised_tokens"]) == pytest.approx(
            (b["lr"], b["tokens"], b["supervised_tokens"])
        )
    assert (stage / "student" / "model.safetensors").exists()
    assert not (stage / "checkpoints").exists()


def test_an_older_run_is_told_from_another_recipe(older):
    text = (older / "runs/stopped/recipe.yaml").read_text()
    (older / "again.yaml").write_text(text)
    refused = mmkd(older, "run", "again.yaml", "stages.1.optimizer.lr=0.5")
    assert refused.returncode != 0
    assert "optimizer.lr" in " ".join(refused.stderr.split())
    assert len(metrics(older / "runs/stopped/02-second/metrics.jsonl")) == 5


def test_a_teacher_cache_is_complete(older):
    (older / "again.yaml").write_text((older / "runs/stopped/recipe.yaml").read_text())
    before = {p.name: p.read_bytes() for p in (older / "cache").iterdir()}
    done = mmkd(older, "cache", "again.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {p.name: p.read_bytes() for p in (older / "cache").iterdir()} == before


@pytest.mark.parametrize("code", ["installed", "folder"])
def test_a_hybrid_student_answers(older, code):
    """Loaded by mmkd's own classes, and by the code that its folder brings."""
    folder = older / "runs" / "stopped" / "01-first" / "student"
    processor = AutoProcessor.from_pretrained(folder)
    if code == "installed":
        model = load_model(ModelConfig(model=str(folder)))
    else:
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.new("RGB", (64, 64), "red"), return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] > inputs["input_ids"].shape[1]
