"""A teacher's cache: bits, shards, and training from it."""

import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mmkd.cache import RowCodec, Store, StoreWriter, store
from mmkd.cache.codec import OTHERS, REST
from mmkd.commands import build_cache
from mmkd.commands.cache_stats import compare, stats
from mmkd.errors import CheckpointError, DataError, MmkdError, RecipeError
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from tests.support import warm
from tests.support.recipes import tiny_recipe
from tests.support.tiny import write_tiny_model


def rows(count, vocabulary, k, sharp=3.0, seed=0):
    """Likeliest tokens, their log-probabilities and the rest's mass of random distributions."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, vocabulary, generator=generator, dtype=torch.float64) * sharp
    log_p = logits.log_softmax(-1)
    log_probs, ids = log_p.topk(k)
    return ids, log_probs, log_p.exp().scatter(1, ids, 0).sum(1)


def test_a_row_of_a_large_vocabulary_has_128_bytes():
    assert RowCodec(151_936, 34).words * 8 == 128


@pytest.mark.parametrize(("vocabulary", "k"), [(2, 1), (7, 7), (719, 34), (5000, 20)])
@pytest.mark.parametrize("sharp", [0.1, 3.0, 30.0])
def test_rows_come_back_from_their_bits(vocabulary, k, sharp):
    ids, log_probs, rest = rows(50, vocabulary, k, sharp)
    codec = RowCodec(vocabulary, k)
    packed = codec.encode(ids, log_probs, rest)
    assert packed.shape == (50, codec.words)
    got_ids, got, got_rest = codec.decode(packed)
    assert torch.equal(got_ids, ids)
    inside = log_probs > -100
    step = 2.0 ** -(OTHERS.mantissa_bits + 1)
    close = (got[:, 1:] - log_probs[:, 1:]).abs() <= step * log_probs[:, 1:].abs() + 1e-7
    assert close[inside[:, 1:]].all()
    large = rest > 1e-20
    step = 2.0 ** -(REST.mantissa_bits + 1)
    close = (got_rest - rest.log()).abs() <= step * rest.log().abs() + 2.0**REST.low
    assert close[large].all()
    whole = got.double().exp().sum(1) + got_rest.double().exp()
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=2e-2)
    confident = log_probs[:, 0] > -0.7
    torch.testing.assert_close(
        got[confident, 0].double().exp(), log_probs[confident, 0].exp(), rtol=0, atol=1e-3
    )


SETTINGS = {
    "vocabulary": 40, "k": 4, "regions": ["response"], "hidden": None, "max_length": 64,
    "processor": "p", "teacher": {},
}  # fmt: skip


def fill(folder, keys, rank=0, **changes):
    writer = StoreWriter(folder, {**SETTINGS, **changes}, rank)
    made = {}
    for number, key in enumerate(keys):
        packed = writer.codec.encode(*rows(3 + number % 4, 40, 4, seed=number))
        if key not in writer.stored:
            writer.add(key, packed)
        made[key] = packed
    writer.flush()
    return writer, made


def key(number):
    return number.to_bytes(16, "big")


def test_shards_of_two_processes_make_one_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 10)
    _, first = fill(tmp_path, [key(i) for i in range(9)], rank=0)
    writer, second = fill(tmp_path, [key(i) for i in range(100, 107)], rank=1)
    with pytest.raises(CheckpointError, match="begun and not complete"):
        Store(tmp_path)
    writer.finish()
    cache = Store(tmp_path)
    assert len(cache.manifest["shards"]) > 3
    assert len(cache) == 16
    assert cache.rows == sum(map(len, [*first.values(), *second.values()]))
    for name, packed in {**first, **second}.items():
        assert np.array_equal(cache.get(name, ""), packed)
    with pytest.raises(DataError, match=r"row 7: its words and images are not in the teacher"):
        cache.get(key(999), "row 7")


def test_a_second_start_keeps_what_is_there(tmp_path):
    fill(tmp_path, [key(1), key(2)])
    writer, _ = fill(tmp_path, [key(1), key(2), key(3)])
    writer.finish()
    cache = Store(tmp_path)
    assert [s["records"] for s in cache.manifest["shards"]] == [2, 1]
    with pytest.raises(CheckpointError, match="another teacher's, data's or recipe's rows"):
        fill(tmp_path, [key(1)], k=5)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "manifest", "format"])
def test_damage_is_named(tmp_path, damage):
    writer, _ = fill(tmp_path, [key(1), key(2)])
    writer.finish()
    shard, manifest = tmp_path / "rows-0-0.safetensors", tmp_path / "manifest.json"
    if damage == "cut":
        os.truncate(shard, shard.stat().st_size - 8)
    elif damage == "missing":
        shard.unlink()
    elif damage == "flipped":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "manifest":
        manifest.write_text("{")
    else:
        manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 9'))
    said = {"cut": "missing or cut", "missing": "missing or cut", "flipped": "checksum"}
    with pytest.raises(CheckpointError, match=said.get(damage, "cannot be read|format 9")) as error:
        Store(tmp_path).get(key(1), "")
    assert "mmkd cache RECIPE" in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_what_is_damaged_is_made_again(tmp_path, damage, monkeypatch):
    monkeypatch.setattr(store, "SHARD_ROWS", 1)
    keys = [key(1), key(2), key(3)]
    writer, made = fill(tmp_path, keys)
    writer.finish()
    shard = tmp_path / "rows-0-1.safetensors"
    if damage == "missing":
        shard.unlink()
    else:
        content = shard.read_bytes()
        shard.write_bytes(content[:-8] if damage == "cut" else content[:-1] + b"x")
    assert store.drop_damaged(tmp_path) == [shard.name]
    writer, _ = fill(tmp_path, keys)
    writer.finish()
    cache = Store(tmp_path)
    assert len(cache) == 3
    for name, packed in made.items():
        assert np.array_equal(cache.get(name, ""), packed)


OBJECTIVES = [{"kind": "ce"}, {"kind": "kl"}, {"kind": "jsd", "name": "seen", "region": "vision"}]


@pytest.fixture
def raw(scenes_dir, tiny_model_dir, tmp_path):
    """`raw(name, source)` is a recipe whose teacher differs from its student."""
    teacher = tmp_path / "teacher"
    write_tiny_model(scenes_dir / "processor", teacher)
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(teacher)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    model.save_pretrained(teacher)

    def make(name, source="cache", *, k=10_000, stage=None, **changes):
        return tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            teacher={
                "model": str(teacher),
                "source": source,
                "cache": {"folder": str(tmp_path / "cache"), "k": k},
            },
            stage={"objectives": OBJECTIVES, **(stage or {})},
            **changes,
        )

    return make


def losses(recipe):
    folder = pipeline.run(load_recipe(recipe))
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line)[part] for part in ("ce", "kl", "seen")] for line in lines]


def test_training_from_all_tokens_is_training_beside_the_teacher(raw, tmp_path):
    """All of the vocabulary is stored; what is left is the bits' rounding, 2^-10 of -log p."""
    build_cache.build_cache(load_recipe(raw("any")))
    (tmp_path / "teacher" / "model.safetensors").rename(tmp_path / "away")  # not needed any more
    stored = losses(raw("stored"))
    (tmp_path / "away").rename(tmp_path / "teacher" / "model.safetensors")
    live = losses(raw("live", "live"))
    torch.testing.assert_close(torch.tensor(stored), torch.tensor(live), rtol=2e-3, atol=2e-3)
    again = losses(raw("split", stage={"batch": {"size": 1, "accumulate": 4}}))
    torch.testing.assert_close(torch.tensor(again), torch.tensor(stored), rtol=1e-4, atol=1e-5)


def test_hidden_states_serve_what_relates_tokens(raw, tmp_path):
    """Of 16 bits: the teacher's weights are not needed for LLaVA-KD's objectives either."""
    kinds = [
        {"kind": "ce"},
        {"kind": "kl"},
        {"kind": "relation", "name": "seen", "region": "vision"},
        {"kind": "relation", "name": "logits", "region": "vision", "features": "logits"},
        {"kind": "affinity"},
    ]

    def recipe(name, source="cache"):
        made = raw(name, source, stage={"objectives": kinds, "batch": {"size": 4}})
        made["teacher"]["cache"]["hidden"] = True
        return load_recipe(made)

    cache = build_cache.build_cache(recipe("any"))
    assert cache.hidden == {"regions": ["response", "vision"], "width": 32}
    assert stats(cache)["hidden"] == cache.hidden
    (tmp_path / "teacher" / "model.safetensors").rename(tmp_path / "away")

    def found(config):
        folder = pipeline.run(config)
        lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        names = ("kl", "seen", "logits", "affinity")
        return torch.tensor([[json.loads(line)[n] for n in names] for line in lines])

    stored = found(recipe("stored"))
    (tmp_path / "away").rename(tmp_path / "teacher" / "model.safetensors")
    torch.testing.assert_close(stored, found(recipe("live", "live")), rtol=2e-3, atol=1e-4)
    assert (stored[:, 1:] > 1e-3).all()
    (tmp_path / "cache" / "head.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"missing or cut|head.safetensors"):
        pipeline.run(recipe("headless"))


def test_two_processes_store_what_one_stores(raw, tmp_path):
    one = build_cache.build_cache(load_recipe(raw("one", k=5)))
    recipe = raw("two", k=5)
    recipe["teacher"]["cache"]["folder"] = str(tmp_path / "both")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(recipe))
    done = warm.run("cache", tmp_path / "two.yaml", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert "bytes a token" in done.stdout
    two = Store(tmp_path / "both")
    assert sorted(one.keys) == sorted(two.keys)
    assert one.rows == two.rows
    for name in one.keys:
        a, b = (c.codec.decode(c.get(name, "")) for c in (one, two))
        same = a[0] == b[0]  # equally likely tokens may change places
        assert same.float().mean() > 0.99
        torch.testing.assert_close(a[1][same], b[1][same], rtol=5e-3, atol=1e-3)


def test_a_cache_is_for_its_data_teacher_and_processor(raw, tmp_path, scenes_dir, capsys):
    recipe = raw("stale", k=5)
    with pytest.raises(CheckpointError, match="the teacher's cache is not there"):
        pipeline.run(load_recipe(recipe))
    build_cache.build_cache(load_recipe(recipe))
    table = pq.read_table(scenes_dir / "train.parquet").to_pylist()
    table[0]["conversations"][1]["value"] = "Something else."
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(table), tmp_path / "changed.parquet")
    changed = {**recipe, "data": {"train": str(tmp_path / "changed.parquet")}}
    with pytest.raises(DataError, match=r"record 0 .*not in the teacher's cache.*build the cache"):
        pipeline.run(load_recipe(changed))
    longer = {**recipe, "data": {**recipe["data"], "max_length": 100}}
    with pytest.raises(RecipeError, match="at max_length 2048, not response at 100"):
        pipeline.run(load_recipe(longer))
    wider = raw("stale", k=5, stage={"objectives": [{"kind": "kl", "region": "all"}]})
    with pytest.raises(RecipeError, match=r"has regions response, vision .* not all"):
        pipeline.run(load_recipe(wider))
    other = json.loads(json.dumps(recipe))
    other["teacher"]["model"] = recipe["student"]["model"]
    with pytest.raises(RecipeError, match="from other weights than"):
        pipeline.run(load_recipe(other))
    manifest = tmp_path / "cache" / "manifest.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "processor": "another"}))
    with pytest.raises(RecipeError, match="a processor other than the student's"):
        pipeline.run(load_recipe(recipe))
    assert not (tmp_path / "stale").exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"objectives": [{"kind": "relation"}]}, "it needs hidden states, .*hidden: true"),
        ({"objectives": [{"kind": "layer_l2"}]}, "tensors that a teacher's cache does not contain"),
        ({"objectives": [{"kind": "kl", "temperature": 2.0}]}, "at temperature 1, it needs 2"),
        ({"objectives": [{"kind": "preference"}]}, "it needs tensors that"),
        ({"objectives": [{"kind": "sinkhorn"}]}, "it needs tensors that"),
        (
            {"objectives": [{"kind": "kl"}], "on_policy": {"lmbda": 0.5}},
            "does not contain the student's own answers",
        ),
        ({"objectives": [{"kind": "ce"}]}, "no stage has an objective that reads a teacher"),
    ],
)
def test_what_no_cache_holds_is_refused(raw, tmp_path, stage, message):
    with pytest.raises(MmkdError, match=message):
        build_cache.build_cache(load_recipe(raw("refused", stage=stage)))
    assert not (tmp_path / "cache").exists()


def test_a_cache_needs_a_folder(raw):
    recipe = raw("nowhere")
    del recipe["teacher"]["cache"]
    with pytest.raises(RecipeError, match="'source: cache' needs 'cache'"):
        load_recipe(recipe)


def test_stats_tell_the_error(raw):
    recipe = load_recipe(raw("stats", k=10_000))
    cache = build_cache.build_cache(recipe)
    found = stats(cache) | compare(cache, recipe, None, 16)
    assert found["records"] == 64
    assert found["bytes_per_token"] > 8 * cache.codec.words
    assert found["rest_mass"] == pytest.approx(0, abs=1e-6)
    assert found["kl_stored"] == pytest.approx(found["kl"], rel=1e-3)
    assert 0 < found["difference_of_kl"] < 1e-2
