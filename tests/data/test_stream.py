"""The order of records, and the micro-batches of a step."""

import pytest
import torch
from PIL import Image

from mmkd.data.encoder import Encoder
from mmkd.data.microbatches import by_tokens
from mmkd.data.stream import BatchStream
from mmkd.recipe import BatchConfig, DataConfig
from tests.support.processors import FAMILIES
from tests.support.written_records import TURNS, conversations, records


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "red.png")
    return tmp_path


def stream(folder, size, accumulate, rank=0, world=1):
    rows = [
        {"id": str(i), "image": "red.png", "conversations": conversations(TURNS[:2])}
        for i in range(10)
    ]
    encoder = Encoder(records(folder, rows), FAMILIES["llava"](), DataConfig(train="-"))
    batch = BatchConfig(size=size, accumulate=accumulate)
    return BatchStream(encoder, batch, seed=3, rank=rank, world_size=world)


def seen(streams, steps):
    return [
        sorted(i for s in streams for indices in s.plan(step) for i in indices)
        for step in range(steps)
    ]


def test_every_epoch_sees_every_record_once_in_another_order(folder):
    order = [i for step in range(10) for i in stream(folder, 2, 1).plan(step)[0]]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_a_step_sees_the_same_records_at_any_layout(folder):
    whole = seen([stream(folder, 4, 1)], 7)
    assert seen([stream(folder, 2, 2)], 7) == whole
    assert seen([stream(folder, 1, 4)], 7) == whole
    assert seen([stream(folder, 2, 1, r, 2) for r in range(2)], 7) == whole


def test_grouping_by_length_pads_less_and_moves_no_record_between_steps(folder):
    words = ("two", "two cats", "two cats and a dog", "cats and a dog and two cats and a dog")
    rows = [
        {"id": str(i), "conversations": conversations([("human", "?"), ("gpt", words[i % 4])])}
        for i in range(16)
    ]
    encoder = Encoder(records(folder, rows), FAMILIES["llava"](), DataConfig(train="-"))

    def streams(grouped):
        batch = BatchConfig(size=2, accumulate=2, group_by_length=grouped)
        return [BatchStream(encoder, batch, seed=3, rank=r, world_size=2) for r in range(2)]

    def padding(found):
        masks = [b.targets.attention for s in found for step in s.steps(0, 2) for b in step]
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)

    grouped, apart = streams(True), streams(False)
    assert seen(grouped, 4) == seen(apart, 4)
    assert padding(grouped) < 0.5 * padding(apart)


@pytest.mark.parametrize("packed", [False, True])
def test_a_token_budget_is_kept_and_shared_evenly(packed):
    random = torch.Generator().manual_seed(0)
    for processes in (1, 2, 3):
        for _ in range(20):
            lengths = torch.randint(1, 100, (24,), generator=random).tolist()
            order = sorted(range(24), key=lengths.__getitem__)
            cut = by_tokens(order, dict(enumerate(lengths)), 200, processes, packed=packed)
            assert [record for part in cut for record in part] == order
            assert len(cut) % processes == 0
            for part in cut:
                mine = [lengths[record] for record in part]
                assert (sum(mine) if packed else max(mine) * len(mine)) <= 200
    assert by_tokens([0, 1], {0: 999, 1: 999}, 200, 1) == [[0], [1]]  # longer than the budget
    assert by_tokens([0, 1], {0: 1, 1: 1}, 200, 2) == [[0], [1]]


@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_are_known_without_reading_pictures(folder, family):
    Image.new("RGB", (300, 120)).save(folder / "wide.png")
    rows = [
        {"id": "a", "image": "wide.png", "conversations": conversations(TURNS)},
        {"id": "b", "images": ["red.png", "wide.png"], "messages": [
            {"role": "user", "content": "what?"}, {"role": "assistant", "content": "two cats"}]},
        {"id": "c", "conversations": conversations([("human", "?"), ("gpt", "no")])},
    ]  # fmt: skip
    for row in rows:  # alone: columns would be made alike
        encoder = Encoder(records(folder, [row]), FAMILIES[family](), DataConfig(train="-"))
        batch = encoder.encode([0])
        assert encoder.length(0) == batch.inputs["input_ids"].shape[1], row["id"]
    bad = [{"id": "d", "image": "none.png", "conversations": conversations(TURNS)}]
    assert Encoder(records(folder, bad), FAMILIES[family](), DataConfig(train="-")).length(0) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_token_budget_gives_each_process_as_many_micro_batches(folder, workers):
    words = ("two", "two cats", "two cats and a dog", "cats and a dog and two cats and a dog")
    rows = [
        {"id": str(i), "conversations": conversations([("human", "?"), ("gpt", words[i % 4])])}
        for i in range(16)
    ]
    encoder = Encoder(records(folder, rows), FAMILIES["llava"](), DataConfig(train="-"))
    batch = BatchConfig(tokens=40, total=8)
    streams = [
        BatchStream(encoder, batch, seed=3, rank=r, world_size=2, workers=workers) for r in (0, 1)
    ]
    one = BatchStream(encoder, BatchConfig(size=8), seed=3)
    assert seen(streams, 3) == seen([one], 3)
    for mine, theirs in zip(*(s.steps(0, 3) for s in streams), strict=True):
        assert len(mine) == len(theirs) > 1
        assert all(b.inputs["input_ids"].numel() <= 40 for b in mine + theirs)


def test_a_token_budget_holds_with_what_is_read_in_place_of_bad_records(folder):
    """They stand in a step's order where their replacements' lengths belong."""
    rows = [
        {"id": str(i), "conversations": conversations([("human", "?"), ("gpt", "two cats " * 5)])}
        for i in range(16)
    ]
    for row in rows[::2]:
        row["image"] = "gone.png"
        row["conversations"][0]["value"] = "<image>?"
    config = DataConfig(train="-", on_bad_record="skip")
    encoder = Encoder(records(folder, rows), FAMILIES["llava"](), config)
    batch = BatchConfig(tokens=2 * encoder.length(1), total=8)
    steps = list(BatchStream(encoder, batch, seed=3).steps(0, 2))
    assert sum(len(b.skipped) for step in steps for b in step) >= 8
    for made in (b for step in steps for b in step):
        assert len(made.ids) == 2
        assert made.inputs["input_ids"].numel() <= batch.tokens


def test_a_stream_can_start_anywhere(folder):
    late = [[b.ids for b in step] for step in stream(folder, 2, 2).steps(3, 6)]
    whole = [[b.ids for b in step] for step in stream(folder, 2, 2).steps(0, 6)]
    assert late == whole[3:]


def test_batches_move_as_a_whole(folder):
    batch = next(stream(folder, 2, 1).steps(0, 1))[0].to(torch.device("meta"))
    tensors = [*batch.inputs.values(), *vars(batch.targets).values()]
    found = [t.device.type for t in tensors if isinstance(t, torch.Tensor)]
    assert len(found) >= 7
    assert set(found) == {"meta"}
