"""Lengths of records, computed by several processes."""

import pytest
from PIL import Image

from mmkd.data.encoder import Encoder
from mmkd.data.lengths import SharedLengths
from mmkd.data.stream import BatchStream
from mmkd.data.workers import work_ahead
from mmkd.errors import CheckpointError
from mmkd.recipe import BatchConfig, DataConfig
from tests.support.processors import FAMILIES
from tests.support.ranks import on_ranks
from tests.support.written_records import conversations, records


@pytest.fixture
def encoder(tmp_path):
    """Thirty-six records of different lengths, some of them bad."""
    Image.new("RGB", (40, 24), "red").save(tmp_path / "red.png")
    rows = []
    for i in range(36):
        words = "two cats " * (1 + i * 7 % 11)
        rows.append(
            {"id": str(i), "conversations": conversations([("human", "?"), ("gpt", words)])}
        )
        if i % 3 == 0:
            rows[-1]["image"] = "red.png" if i % 9 else "gone.png"
            rows[-1]["conversations"][0]["value"] = "<image>?"
    config = DataConfig(train="-", on_bad_record="skip")
    return Encoder(records(tmp_path, rows), FAMILIES["llava"](), config)


def counted(encoder):
    """The records whose lengths this process finds, as it finds them."""
    asked, own = [], encoder.length

    def length(index, **settings):
        asked.append(index)
        return own(index, **settings)

    encoder.length = length
    return asked


@pytest.mark.parametrize("batch", [BatchConfig(size=3), BatchConfig(tokens=150, total=9)])
def test_each_process_finds_the_lengths_of_its_share_only(encoder, tmp_path, batch):
    def work(rank):
        asked = counted(encoder)
        stream = BatchStream(encoder, batch, seed=3, rank=rank, world_size=3)
        made = [[b.indices for b in step] for step in stream.steps(0, 6)]
        return made, asked

    found = on_ranks(work, 3, tmp_path)
    asked = [index for _, mine in found for index in mine]
    # Four steps see all 36 records, and two more see some of them again.
    assert sorted(asked) == list(range(36))
    assert all(len(mine) == 12 for _, mine in found)
    for rank, (made, _) in enumerate(found):
        alone = BatchStream(encoder, batch, seed=3, rank=rank, world_size=3)
        assert made == [[b.indices for b in alone.batches(step)] for step in range(6)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_process_that_finds_all_lengths(encoder, tmp_path, workers):
    batch = BatchConfig(size=2, accumulate=3)

    def work(rank):
        stream = BatchStream(encoder, batch, seed=3, rank=rank, world_size=2, workers=workers)
        whole = [[b.indices for b in step] for step in stream.steps(0, 5)]
        again = BatchStream(encoder, batch, seed=3, rank=rank, world_size=2, workers=workers)
        return whole, [[b.indices for b in step] for step in again.steps(2, 5)]

    for rank, (whole, resumed) in enumerate(on_ranks(work, 2, tmp_path)):
        alone = BatchStream(encoder, batch, seed=3, rank=rank, world_size=2)
        assert whole == [[b.indices for b in alone.batches(step)] for step in range(5)]
        assert resumed == whole[2:]


def test_shares_may_be_uneven(encoder, tmp_path):
    chosen = [5, 0, 35, 17, 2, 9, 30]
    wanted = [encoder.length(index) for index in chosen]
    assert len(set(wanted)) > 2

    def work(rank):
        asked = counted(encoder)
        lengths = SharedLengths(encoder, rank=rank, world_size=3)
        return lengths.of(chosen), lengths.of(chosen[:2]), asked

    for rank, found in enumerate(on_ranks(work, 3, tmp_path)):
        assert found == (wanted, wanted[:2], chosen[rank::3])


def test_an_error_ends_all_processes(encoder, tmp_path):
    own = encoder.length

    def length(index, **settings):
        if index == 7:
            raise CheckpointError("the chat template was stopped")
        return own(index, **settings)

    encoder.length = length

    def work(rank):
        stream = BatchStream(encoder, BatchConfig(size=18), seed=3, rank=rank, world_size=2)
        return [[b.indices for b in step] for step in stream.steps(0, 2)]

    assert on_ranks(work, 2, tmp_path) == ["the chat template was stopped"] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_work_ahead_keeps_the_order_and_returns_errors(workers):
    def halved(number):
        if number % 2:
            raise CheckpointError(f"{number} is odd")
        return number // 2

    found = list(work_ahead(halved, iter(range(6)), workers))
    assert [str(f) for f in found] == ["0", "1 is odd", "1", "3 is odd", "2", "5 is odd"]


@pytest.mark.parametrize(("workers", "first", "later"), [(0, 1, 1), (2, 8, 1)])
def test_work_ahead_takes_few_tasks_ahead(workers, first, later):
    taken = []

    def tasks():
        for number in range(20):
            taken.append(number)
            yield number

    results = work_ahead(abs, tasks(), workers)
    next(results)
    begun = len(taken)
    assert begun == first + (later if workers else 0)
    next(results)
    assert len(taken) == begun + later
