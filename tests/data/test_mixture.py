"""Mixtures of sources: shares, order, and runs on them."""

import json
from collections import Counter

import pytest
import torch
import yaml

from mmkd.commands.build_cache import build_cache
from mmkd.commands.plan import make_plan
from mmkd.data.encoder import Encoder
from mmkd.data.mixture import Mixture, draws
from mmkd.data.records import Records
from mmkd.data.stream import BatchStream
from mmkd.errors import DataError, RecipeError
from mmkd.recipe import BatchConfig, DataConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.runtime.files import read_json
from tests.support.layouts import put, sample, turns, write_numbers, write_tar
from tests.support.processors import FAMILIES
from tests.support.recipes import tiny_recipe


def mixture(tmp_path, *sources, seed=3):
    made = []
    for number, (size, settings) in enumerate(sources):
        write_numbers(tmp_path / f"s{number}.json", [f"{number}.{i}" for i in range(size)])
        made.append({"train": str(tmp_path / f"s{number}.json"), **settings})
    return Mixture(Records(DataConfig(sources=made)), seed)


def test_records_of_an_epoch_by_weights_and_caps():
    for sizes, weights, caps, wanted in [
        ([10, 20], [None, None], [None, None], [10, 20]),
        ([10, 20], [None, None], [4, 99], [4, 20]),
        ([10, 20], [1, 1], [None, None], [15, 15]),
        ([10, 20], [3, 1], [None, None], [23, 7]),  # 22.5 and 7.5: the first of equals
        ([665, 558], [3, 1], [None, 100], [300, 100]),
        ([7, 7, 7], [1, 1, 1], [5, None, None], [5, 5, 5]),
    ]:
        assert draws(sizes, weights, caps) == wanted


@pytest.mark.parametrize("seed", range(20))
def test_shares_and_caps_hold_for_any_numbers(seed):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(50, 500, (4,), generator=generator).tolist()
    weights = torch.rand(4, generator=generator).add(0.05).tolist()
    caps = [None, *torch.randint(20, 200, (2,), generator=generator).tolist(), None]
    found = draws(sizes, weights, caps)
    total = sum(found)
    capped = [n if c is None else min(n, c) for n, c in zip(sizes, caps, strict=True)]
    assert total <= sum(capped)
    for count, weight, cap in zip(found, weights, caps, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1
        assert cap is None or count <= cap
    if total < sum(capped):  # then a cap is what ends the epoch
        shares = [(total + 1) * w / sum(weights) for w in weights]
        assert any(c is not None and s > c for s, c in zip(shares, caps, strict=True))


def test_one_source_is_shuffled_by_seed_and_epoch_alone(tmp_path):
    made = mixture(tmp_path, (10, {}))
    for epoch in range(3):
        generator = torch.Generator().manual_seed(3 * 1_000_003 + epoch)
        assert made.order(epoch) == torch.randperm(10, generator=generator).tolist()


def test_all_records_of_a_source_are_seen_equally_often(tmp_path):
    made = mixture(tmp_path, (10, {"weight": 3}), (30, {"weight": 1, "cap": 7}))
    assert made.draws == [13, 4]
    seen: Counter[int] = Counter()
    for epoch in range(13):
        order = made.order(epoch)
        assert sum(i < 10 for i in order) == 13
        assert order != sorted(order)
        seen.update(order)
        for part in (range(10), range(10, 40)):
            counts = [seen[i] for i in part]
            assert max(counts) - min(counts) <= 1
    assert made.order(5) == made.order(5)
    assert made.order(5) != mixture(tmp_path, (10, {"weight": 3}),
                                    (30, {"weight": 1, "cap": 7}), seed=4).order(5)  # fmt: skip


def stream(records, size, accumulate, rank=0, world=1):
    encoder = Encoder(records, FAMILIES["llava"](), DataConfig(train="-"))
    batch = BatchConfig(size=size, accumulate=accumulate)
    return BatchStream(encoder, batch, seed=3, rank=rank, world_size=world)


def ids(streams, first, last):
    """What each step's micro-batches hold, whichever process has them."""
    steps = [list(s.steps(first, last)) for s in streams]
    return [
        sorted(name for own in step for batch in own for name in batch.ids)
        for step in zip(*steps, strict=True)
    ]


def test_a_step_of_a_mixture_sees_the_same_on_any_processes_and_after_a_resume(tmp_path):
    for name, numbers in {"a": range(5), "b": range(5, 8)}.items():
        members = {k: v for n in numbers for k, v in sample(n).items()}
        write_tar(tmp_path / f"{name}.tar", members)
    write_numbers(tmp_path / "n.jsonl", range(9))
    records = Records(
        DataConfig(
            sources=[
                {"train": str(tmp_path / "*.tar"), "name": "tars", "weight": 2},
                {"train": str(tmp_path / "n.jsonl"), "weight": 1, "cap": 4},
            ]
        )
    )
    whole = ids([stream(records, 4, 1)], 0, 9)
    assert ids([stream(records, 2, 2)], 0, 9) == whole
    assert ids([stream(records, 2, 1, rank, 2) for rank in range(2)], 0, 9) == whole
    assert ids([stream(records, 4, 1)], 4, 9) == whole[4:]
    one = stream(records, 4, 1)
    names = {records[i].id for i in one.seen(9)}
    assert names == {name for step in whole for name in step}
    assert (len(one.mixture), one.steps_in(3)) == (12, 9)
    assert one.seen(200) == list(range(len(records)))


def test_bad_records_are_replaced_by_far_ones(tmp_path):
    rows = [{"id": f"r{i}", "image": "gone.jpg", "conversations": turns("<image>?", "a")}
            for i in range(400)]  # fmt: skip
    for row in rows[300:]:
        row["image"] = put(tmp_path, "there.png")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    config = DataConfig(train=str(tmp_path / "a.json"), on_bad_record="skip")
    batch = Encoder(Records(config), FAMILIES["llava"](), config).encode([*range(20)])
    assert len(batch.ids) == 20
    assert len(batch.skipped) < 120  # the good ones are 281 to 300 records away
    assert len(set(batch.ids)) > 10
    records = Records(config)
    assert sorted(records.tried(7)) == list(range(400))


def test_a_weight_too_small_for_one_record_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="an epoch of 20 records has none of s1"):
        mixture(tmp_path, (10, {"weight": 1e6}), (10, {"weight": 1}))


BASE = {"name": "x", "student": {"model": "m"},
        "stages": [{"name": "a", "objectives": [{"kind": "ce"}], "steps": 1}]}  # fmt: skip


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"train": "a.json", "sources": [{"train": "b.json"}]},
            "data: both of them or neither -- ",
        ),
        ({"sources": [{"train": "a/x.json"}, {"train": "b/x.json"}]}, "two sources have the same"),
        ({"sources": [{"train": "a", "weight": 1}, {"train": "b"}]}, "every source a 'weight', or"),
        ({"sources": [{"train": "a", "weight": float("inf")}]}, "data.sources.0.weight"),
        ({"sources": [{"train": "a", "cap": 0}]}, "data.sources.0.cap"),
        ({"sources": [{"train": "a.json", "split": "test"}]}, "'split' is for Hub data sets"),
        ({"sources": [{"train": "a.json", "wieght": 1}]}, "did you mean 'weight'?"),
    ],
)
def test_mixtures_that_say_nothing_clear_are_refused(data, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe({**BASE, "data": data})
    assert message in str(caught.value)


# runs


@pytest.fixture
def mixed(scenes_dir, tiny_model_dir, tmp_path):
    """A recipe on two sources of the scenes."""
    return tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path / "runs",
        data={
            "sources": [
                {"train": str(scenes_dir / "train.parquet"), "weight": 3, "cap": 12},
                {"train": str(scenes_dir / "captions.parquet"), "name": "words", "weight": 1},
            ]
        },
    )


def test_a_run_on_a_mixture_names_its_sources(mixed, scenes_dir):
    plan = make_plan(load_recipe(mixed))["members"]["student"]["stages"][0]
    assert (plan["records"], plan["epochs"]) == (16, 1.0)
    folder = pipeline.run(load_recipe(mixed))
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    counts = [json.loads(line)["sources"] for line in lines]
    assert all(sum(c.values()) == 4 for c in counts)
    assert {k: sum(c[k] for c in counts) for k in counts[0]} == {"train": 12, "words": 4}
    data = read_json(folder / "provenance.json")["data"]
    assert set(data) == {str(scenes_dir / n) for n in ("train.parquet", "captions.parquet")}
    assert all(v.startswith("sha256 ") for v in data.values())


def test_the_first_record_of_every_source_is_looked_at_before_a_run(mixed, tmp_path):
    rows = [{"id": "r1", "image": "gone.png", "conversations": turns("<image>?", "a")}]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    mixed["data"]["sources"][1]["train"] = str(tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"bad\.json: record 0 \(id r1\): no such image: gone\.png"):
        pipeline.run(load_recipe(mixed))
    assert not (tmp_path / "runs").exists()


def test_a_cache_of_the_sources_serves_their_mixture(mixed, scenes_dir, tiny_model_dir, tmp_path):
    store = {"folder": str(tmp_path / "cache"), "k": 8}
    teacher = {"model": str(tiny_model_dir), "source": "cache", "cache": store}
    stage = {**mixed["stages"][0], "objectives": [{"kind": "kl"}], "steps": 2}
    both = [scenes_dir / "train.parquet", scenes_dir / "captions.parquet"]
    plain = {"train": str(both[0])}
    apart = [
        {**stage, "name": n, "data": {"train": str(p)}} for n, p in zip("ab", both, strict=True)
    ]
    build_cache(load_recipe({**mixed, "teacher": teacher, "data": plain, "stages": apart}))
    folder = pipeline.run(load_recipe({**mixed, "teacher": teacher, "stages": [stage]}))
    assert (folder / "01-mimic" / "done.json").exists()
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["data"]["train"] is None
