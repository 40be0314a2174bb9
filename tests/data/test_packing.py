"""Packing: records in a row are isolated, and losses do not change."""

import json
import random

import pytest
import torch

from mmkd.commands import build_cache
from mmkd.data.encoder import Encoder
from mmkd.data.packing import best_fit_decreasing, even_bins
from mmkd.data.records import Records
from mmkd.errors import RecipeError
from mmkd.recipe import DataConfig, load_recipe
from mmkd.runs import pipeline
from tests.support.processors import llava
from tests.support.recipes import tiny_recipe


def lengths(count, seed=0):
    draw = random.Random(seed)
    return [min(4000, max(8, round(draw.lognormvariate(5.5, 0.8)))) for _ in range(count)]


@pytest.mark.parametrize("pack", [best_fit_decreasing, even_bins])
def test_every_item_is_in_one_bin_and_fits(pack):
    sizes = lengths(2000)
    bins = pack(sizes, 4096)
    assert sorted(i for b in bins for i in b) == list(range(2000))
    fullest = max(sum(sizes[i] for i in b) for b in bins)
    assert fullest <= 4096
    assert sum(sizes) / (len(bins) * 4096) > 0.99
    assert pack([7], 7) == [[0]]


def test_even_bins_are_as_many_and_shorter():
    sizes = [190 + i for i in range(32)]
    some, even = (pack(sizes, 1100) for pack in (best_fit_decreasing, even_bins))
    assert len(even) == len(some)
    width = max(sum(sizes[i] for i in b) for b in even)
    assert sum(sizes) / (len(even) * width) > 0.9


def encoded(tmp_path, pack, **settings):
    turns = [
        [("human", "cats ?"), ("gpt", "two cats")],
        [("human", "And a dog ?"), ("gpt", "a dog and a hat")],
        [("human", "No ?"), ("gpt", "No")],
    ]
    rows = [
        {"id": str(i), "conversations": [{"from": a, "value": b} for a, b in said]}
        for i, said in enumerate(turns)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    records = Records(DataConfig(train=str(tmp_path / "data.json")))
    encoder = Encoder(records, llava(), DataConfig(train="-"), pack=pack, **settings)
    return encoder.encode([0, 1, 2])


@pytest.mark.parametrize("filler", [False, True])
def test_regions_end_with_their_record(tmp_path, filler):
    apart = encoded(tmp_path, None, filler=filler)
    packed = encoded(tmp_path, 10_000, filler=filler)
    assert packed.inputs["input_ids"].shape[0] == 1
    assert "attention_mask" not in packed.inputs
    starts = (packed.inputs["position_ids"][0] == 0).sum()
    assert starts == 3 + filler
    for region in ("response", "prompt", "all"):
        mine, theirs = (b.targets.predicts(region) for b in (packed, apart))
        assert mine.sum() == theirs.sum()
        for pick in (lambda t: t.input_ids, lambda t: t.next_ids()):
            a = pick(packed.targets)[mine].tolist()
            b = pick(apart.targets)[theirs].tolist()
            if region != "all":  # whose last rows predict nothing
                assert sorted(a) == sorted(b)
    assert packed.ids == apart.ids


OBJECTIVES = [
    {"kind": "ce"},
    {"kind": "kl"},
    {"kind": "jsd", "region": "vision"},
    {"kind": "hidden_mse", "layers": [1], "teacher_layers": [1]},
    {"kind": "token_labels", "weight": 0.1},
]
STUDENTS = {
    "dense": [],
    "hybrid": [{"kind": "mamba", "keep_attention": [0], "init": "mimic"}],
    "linear": [{"kind": "mamba", "keep_attention": [], "init": "mimic"}],
    "sparse": [{"kind": "moe", "experts": 4, "top_k": 2, "layers": "all"}],
}


@pytest.fixture
def metrics(scenes_dir, tiny_model_dir, tmp_path):
    def run(name, convert, batch, *, source="live", objectives=OBJECTIVES, engine=None):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            teacher={
                "model": str(tiny_model_dir),
                "source": source,
                "cache": {"folder": str(tmp_path / "cache"), "k": 50},
            },
            student={"model": str(tiny_model_dir), "convert": convert},
            stage={
                "objectives": objectives,
                "batch": batch,
                "optimizer": {"lr": 1e-3, "eps": 1e-4},
                "engine": {"device": "cpu", **(engine or {})},
            },
        )
        if source == "cache":
            build_cache.build_cache(load_recipe(raw))
        folder = pipeline.run(load_recipe(raw))
        lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return run


def same(packed, apart, names):
    for a, b in zip(packed, apart, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("student", STUDENTS)
def test_packed_training_is_the_same_training(metrics, student):
    """Attention, convolution, state and images: a leak would change the losses."""
    convert = STUDENTS[student]
    packed = metrics("packed", convert, {"size": 8, "pack": 700})
    apart = metrics("apart", convert, {"size": 8})
    names = ("loss", "grad_norm", "ce", "kl", "jsd", "hidden_mse", "token_labels", "tokens")
    same(packed, apart, names)
    assert packed[0]["padding"] < 0.2


def test_packed_rows_from_a_cache_and_on_zero(metrics):
    objectives = OBJECTIVES[:3]
    apart = metrics("apart", [], {"size": 8}, source="cache", objectives=objectives)
    packed = metrics("packed", [], {"size": 8, "pack": 700}, source="cache", objectives=objectives)
    same(packed, apart, ("loss", "grad_norm", "ce", "kl", "jsd"))
    pytest.importorskip("deepspeed")
    engine = {"kind": "deepspeed", "zero": 2}
    spread = metrics("zero", [], {"size": 8, "pack": 700}, objectives=objectives, engine=engine)
    live = metrics("live", [], {"size": 8}, objectives=objectives)
    same(spread, live, ("loss", "grad_norm"))


@pytest.mark.parametrize("kind", ["relation", "affinity"])
def test_objectives_that_relate_a_rows_tokens_are_refused(metrics, kind):
    with pytest.raises(RecipeError, match=f"objective {kind} relates the tokens of a row"):
        metrics("refused", [], {"size": 4, "pack": 500}, objectives=[{"kind": kind}])


def test_a_model_that_mixes_records_is_refused(metrics, monkeypatch):
    """One that is told of no borders, as families with positions of their own would be."""
    from mmkd.data import packing

    whole = packing.pack_inputs

    def without_borders(inputs, packed, *rest):
        made = whole(inputs, packed, *rest)
        made["position_ids"] = torch.arange(made["input_ids"].shape[1]).expand_as(made["input_ids"])
        return made

    monkeypatch.setattr("mmkd.data.packer.pack_inputs", without_borders)
    with pytest.raises(RecipeError, match="does not isolate packed records"):
        metrics("mixed", [], {"size": 4, "pack": 500}, objectives=[{"kind": "ce"}])
