"""Mixtures of sources: shares, order, and runs on them."""

import hashlib
import json
from collections import Counter

import pytest
import torch
import yaml

from mmkd.commands.build_cache import build_cache
from mmkd.commands.plan import make_plan
from mmkd.data.encoder import Encoder
from mmkd.data.mixture import Mixture, MovingMixture, draws
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


def naive_order(sizes, counts, seed, epoch):
    """The order of an epoch, as recipes without `data.sampling` have always had it."""
    parts = []
    for number, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if count == size:
            own = list(range(size))
        else:
            own, first = [], epoch * count
            for which in range(first // size, -(-(first + count) // size)):
                words = f"{seed} {number} {which}".encode()
                key = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest()) % 2**63
                own += torch.randperm(size, generator=torch.Generator().manual_seed(key)).tolist()
            own = own[first - first // size * size :][:count]
        parts += [sum(sizes[:number]) + i for i in own]
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]


@pytest.mark.parametrize(
    "settings", [[{}, {}, {}], [{"cap": 4}, {}, {}], [{"weight": 5}, {"weight": 1}, {"weight": 2}]]
)
def test_fixed_shares_draw_the_records_that_they_always_drew(tmp_path, settings):
    sizes = [11, 6, 7]
    made = mixture(tmp_path, *zip(sizes, settings, strict=True))
    for epoch in range(5):
        assert made.order(epoch) == naive_order(sizes, made.draws, 3, epoch)


def test_shares_that_do_not_move_are_a_mixture_of_these_weights(tmp_path):
    weights = [3, 1, 2]
    made = mixture(
        tmp_path, *[(size, {"weight": w}) for size, w in zip([11, 6, 7], weights, strict=True)]
    )
    moving = MovingMixture(made.records, 3, len(made))
    moving.shares.clear()
    moving._counts.clear()
    for epoch in range(6):
        moving.add([3 / 6, 1 / 6, 2 / 6])
        assert moving.order(epoch) == made.order(epoch)


def test_intervals_begin_where_earlier_draws_of_a_source_ended(tmp_path):
    moving = MovingMixture(mixture(tmp_path, (10, {}), (30, {})).records, 3, 12)
    assert moving.drawn(0) == ([3, 9], [0, 0])
    seen = Counter(moving.order(0))
    shares = [[0.9, 0.1], [0.0, 1.0], [0.5, 0.5], [0.25, 0.75]]
    for interval, share in enumerate(shares, 1):
        with pytest.raises(ValueError, match=f"shares of interval {interval} are not known"):
            moving.order(interval)
        moving.add(share)
        order = moving.order(interval)
        assert len(order) == 12
        seen.update(order)
        for part in (range(10), range(10, 40)):
            counts = [seen[i] for i in part]
            assert max(counts) - min(counts) <= 1
    assert moving.drawn(4)[1] == [3 + 11 + 0 + 6, 9 + 1 + 12 + 6]
    assert [moving.order(i) for i in range(5)] == [moving.order(i) for i in range(5)]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_of_an_interval_is_read_before_its_shares_are_known(tmp_path, workers):
    for name, numbers in {"a": range(20), "b": range(100, 130)}.items():
        write_numbers(tmp_path / f"{name}.json", numbers)
    sources = [{"train": str(tmp_path / f"{name}.json")} for name in "ab"]
    sampling = {"kind": "domain", "every": 3, "held_out": 2}
    config = DataConfig(sources=sources, sampling=sampling)

    def steps(first, shares):
        encoder = Encoder(Records(config), FAMILIES["llava"](), config)
        batch = BatchConfig(size=2, accumulate=2)  # grouped by length, which is found ahead
        made = BatchStream(encoder, batch, seed=3, workers=workers)
        for share in shares:
            made.moving.add(share)
        return made, made.steps(first, 8)

    made, found = steps(0, [])
    named = []
    for number in range(8):
        named.append([sorted(b.ids) for b in next(found)])
        if number % 3 == 2:
            made.moving.add([number / 10, 1 - number / 10])
    assert [len(records) for records in made.mixture.records.sources] == [18, 28]
    again = [[sorted(b.ids) for b in step] for step in steps(4, [[0.2, 0.8], [0.5, 0.5]])[1]]
    assert again == named[4:]
    counts = Counter(int(i[1:]) < 100 for step in named[3:6] for batch in step for i in batch)
    assert counts == {True: 2, False: 10}


def test_measured_records_are_neither_trained_on_nor_held_out(tmp_path):
    write_numbers(tmp_path / "a.json", range(20))
    write_numbers(tmp_path / "b.json", range(100, 110))
    sources = [{"train": str(tmp_path / f"{name}.json")} for name in "ab"]
    sampling = {"kind": "domain", "held_out": 3}
    config = DataConfig(sources=sources, sampling=sampling, validation=0.1)
    parts = [Records(config), Records(config, held_out=True), Records(config, measured=True)]
    assert [list(map(len, r.sources)) for r in parts] == [[15, 6], [2, 1], [3, 3]]
    names = [r[i].id for r in parts for i in range(len(r))]
    assert len(set(names)) == 30
    small = DataConfig(sources=sources, sampling={"kind": "domain", "held_out": 10})
    with pytest.raises(DataError, match=r"b\.json: it has 10 records, of which 10 would not be tr"):
        Records(small)
