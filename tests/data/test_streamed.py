"""Streamed data sets of the Hub, which are read in windows of rows."""

import json
import shutil
import time

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets.packaged_modules.parquet.parquet import Parquet
from pydantic import ValidationError

from mmkd.data.mixture import Mixture
from mmkd.data.records import Records
from mmkd.data.sources import streamed
from mmkd.errors import DataError
from mmkd.recipe import DataConfig, SourceConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.training import stage
from tests.support.recipes import tiny_recipe
from tests.support.slow import only

SHARDS, IN_EACH, WINDOW = 3, 25, 10
WHOLE = SHARDS * IN_EACH


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Windows of a test are its own; `HF_DATASETS_CACHE` is for the processes that it starts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def repository(tmp_path):
    """A data set in the Hub's layout: 75 records in three shards, each of three row groups."""
    folder = tmp_path / "someone" / "words"
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        rows = [
            {
                "id": str(shard * IN_EACH + i),
                "image": {"bytes": bytes([shard, i]), "path": None},
                "conversations": [
                    {"from": "human", "value": "<image>\n?"},
                    {"from": "gpt", "value": f"word {shard * IN_EACH + i}"},
                ],
            }
            for i in range(IN_EACH)
        ]
        file = folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=10)
    return folder


@pytest.fixture
def alone(monkeypatch):
    """No process reads ahead."""
    monkeypatch.setattr(streamed.StreamedRows, "_read_ahead", lambda self, number: None)


def source(repository, **settings):
    settings = {"stream": WHOLE, "window": WINDOW, **settings}
    return SourceConfig(train=f"hub:{repository}", **settings)


def rows(repository, **settings):
    return streamed.StreamedRows(source(repository, **settings))


def kept(cache):
    """The tables on the disk."""
    return sorted(cache.glob("generator/**/*.arrow"))


@pytest.mark.parametrize("order", [range(WHOLE), [70, 3, 41, 40, 69, 0, 12, 74]])
def test_rows_are_those_of_the_data_set_in_any_order(repository, alone, order):
    found, whole = rows(repository), Records(DataConfig(train=f"hub:{repository}"))
    assert len(found) == WHOLE
    for index in order:
        row = found.row(index)
        assert row["id"] == str(index) == whole[index].id
        assert row["image"]["bytes"] == bytes(divmod(index, IN_EACH))
        assert found.place(index) == f"hub:{repository}: record {index}"


def test_a_window_is_read_once_and_few_are_on_the_disk(repository, alone, cache, monkeypatch):
    found = rows(repository)
    for index in range(WHOLE):
        found.row(index)
        # the first one, this one and the one before
        assert len(kept(cache)) == min(3, index // WINDOW + 1)

    def refuse(*_, **__):
        raise AssertionError("read a second time")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for index in range(60, WHOLE):
        assert found.row(index)["id"] == str(index)
    assert rows(repository).row(3)["id"] == "3"
    with pytest.raises(DataError, match="read a second time"):
        found.row(WINDOW)


def test_nothing_before_a_window_is_read_for_it(repository, alone, monkeypatch):
    """The place behind the last window is known, by shard and row group."""
    touched = []
    generate = Parquet._generate_tables

    def watched(self, *arguments, **settings):
        for key, table in generate(self, *arguments, **settings):
            touched.append(table["id"][0].as_py())
            yield key, table

    monkeypatch.setattr(Parquet, "_generate_tables", watched)
    found = rows(repository)
    for number in range(4):
        found.row(number * WINDOW)
    touched.clear()
    found.row(4 * WINDOW)
    assert min(map(int, touched)) >= IN_EACH  # nothing of the first shard
    expected = found.row(49)
    shutil.rmtree(streamed.state_file(found._source, 0).parent)
    assert rows(repository).row(49) == expected


def test_the_next_window_is_read_by_a_process_of_its_own(repository, monkeypatch):
    found = rows(repository)
    state = streamed.state_file(found._source, 2 * WINDOW)
    for index in range(WINDOW // 2):  # as what only looks does
        found.row(index)
    assert not state.with_name(f"{WINDOW}.begun").exists()
    found.row(0)
    end = time.monotonic() + 120
    while not state.is_file() and time.monotonic() < end:
        time.sleep(0.1)

    def refuse(*_, **__):
        raise AssertionError("read in this process")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    assert found.row(WINDOW)["id"] == str(WINDOW)


def test_a_data_set_that_is_shorter_than_asked(repository, alone):
    assert len(rows(repository, stream=1000, window=100)) == WHOLE
    found = rows(repository, stream=1000)
    assert len(found) == 1000
    with pytest.raises(DataError, match=r"ends after 75 records -- set stream to 75"):
        found.row(76)
    (repository / "README.md").write_text(
        "---\ndataset_info:\n  splits:\n  - name: train\n    num_examples: 75\n---\n"
    )
    assert len(rows(repository, stream=1000, window=WINDOW + 1)) == WHOLE


def test_windows_pass_in_their_order_and_are_shuffled(repository, alone, tmp_path):
    plain = tmp_path / "plain.parquet"
    pq.write_table(pq.read_table(repository / "train-00000-of-00003.parquet"), plain)
    records = Records(DataConfig(sources=[source(repository), SourceConfig(train=str(plain))]))
    mixture = Mixture(records, seed=3)
    epochs = [mixture.order(epoch) for epoch in range(2)]
    for order in epochs:
        assert sorted(order) == list(range(WHOLE + IN_EACH))
        mine = [record for record in order if record < WHOLE]
        assert [m // WINDOW for m in mine] == [i // WINDOW for i in range(WHOLE)]
        assert mine != sorted(mine)
        places = torch.tensor([i for i, record in enumerate(order) if record >= WHOLE])
        assert places[: IN_EACH // 2].float().mean() < 50 < places[IN_EACH // 2 :].float().mean()
    assert epochs[0] != epochs[1]
    assert epochs == [Mixture(records, seed=3).order(epoch) for epoch in range(2)]
    assert {m for m in mixture.sample(50) if m < WHOLE} <= set(range(WINDOW))


def test_a_weighted_stream_goes_on_where_the_epoch_before_ended(repository, alone):
    records = Records(
        DataConfig(
            sources=[source(repository, weight=1), source(repository, weight=3, name="again")]
        )
    )
    mixture = Mixture(records, seed=0)
    few, many = mixture.draws
    walked = [m for epoch in range(4) for m in mixture.order(epoch) if m < WHOLE]
    assert few < WHOLE < many
    assert [m // WINDOW for m in walked[:WHOLE]] == [i // WINDOW for i in range(WHOLE)]
    assert sorted(walked[:WHOLE]) == list(range(WHOLE))


def test_a_bad_record_is_replaced_from_its_window(repository, alone):
    records = Records(DataConfig(sources=[source(repository)]))
    assert sorted(records.tried(34)) == list(range(30, 40))
    assert next(records.tried(34)) == 34
    assert sorted(records.tried(72)) == list(range(70, 75))


def test_windows_of_other_sizes_are_told_apart(repository, alone):
    """A worker that took one for the other would wait for ever."""
    found = rows(repository)
    assert streamed.is_kept(found._source, 0, WINDOW)
    assert not streamed.is_kept(found._source, 0, WINDOW + 1)


def test_a_window_without_a_stream_is_refused(repository):
    with pytest.raises(ValidationError, match="'window' is for streams"):
        SourceConfig(train="hub:a/b", window=5)


@pytest.mark.parametrize("workers", only([2], [0, 2]))
def test_a_run_on_a_stream_goes_on_where_it_stopped(
    scenes_dir, tiny_model_dir, tmp_path, monkeypatch, workers
):
    """Over more than an epoch of windows, with their reading ahead."""
    folder = tmp_path / "hub" / "scenes"
    folder.mkdir(parents=True)
    shutil.copy(scenes_dir / "train.parquet", folder / "train-00000-of-00001.parquet")
    data = {
        "sources": [{"train": f"hub:{folder}", "stream": 64, "window": 16}],
        "workers": workers,
    }

    step = stage.Stage.step

    def losses(name, stop=None):
        def watched(self, number, batches):
            if number == stop:
                raise KeyboardInterrupt
            return step(self, number, batches)

        with monkeypatch.context() as patch:
            patch.setattr(stage.Stage, "step", watched)
            raw = tiny_recipe(
                scenes_dir,
                tiny_model_dir,
                tmp_path / "runs",
                name=name,
                data=data,
                stage={"steps": 10, "batch": {"size": 8}, "checkpoint": {"interval": 2}},
            )
            out = pipeline.run(load_recipe(raw))
        lines = (out / "01-mimic" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    want = losses("whole")
    with pytest.raises(KeyboardInterrupt):
        losses("again", stop=6)
    assert losses("again") == want
    assert len(want) == 10
