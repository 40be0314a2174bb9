"""Records that are not trained on: which ones, and files that do not fit."""

import json

import numpy as np
import pytest

from mmkd.data.left_out import LeftOut, section, write_left_out
from mmkd.data.mixture import Mixture
from mmkd.data.records import Records, Source
from mmkd.data.sources import open_rows
from mmkd.errors import DataError, RecipeError
from mmkd.recipe import DataConfig, SourceConfig, load_recipe
from tests.support.layouts import sample, turns, write_tar
from tests.support.recipes import tiny_recipe

COUNT = 40


@pytest.fixture
def train(tmp_path):
    return put(tmp_path / "a.json", COUNT)


def put(path, count, name="r"):
    rows = [{"id": f"{name}{n:04d}", "conversations": turns("?", "a")} for n in range(count)]
    path.write_text(json.dumps(rows))
    return str(path)


def listed(path, *sources):
    """A file that lists rows of sources: pairs of a source and its rows."""
    sections = []
    for config, numbers in sources:
        rows = open_rows(config)
        ids = Source(config, whole=True).id
        found = [LeftOut(record=n, id=ids(n), why="test") for n in numbers]
        sections.append(section(config, rows, found))
    write_left_out(path, sections, {"bits": 16})
    return str(path)


def ids(records):
    return {records[i].id for i in range(len(records))}


def test_listed_records_leave_training_and_no_others(tmp_path, train):
    out = {3, 17, 39}
    file = listed(tmp_path / "out.json", (SourceConfig(train=train), out))
    source = Source(SourceConfig(train=train, leave_out=file))
    assert (len(source), source.left_out) == (COUNT - 3, 3)
    assert ids(source) == {f"r{n:04d}" for n in set(range(COUNT)) - out}
    assert source.where(3) == f"{train}: record 4 (id r0004)"
    assert len(Source(SourceConfig(train=train, leave_out=file), whole=True)) == COUNT
    records = Records(DataConfig(train=train, leave_out=file))
    order = Mixture(records, seed=0).order(0)
    assert sorted(order) == list(range(COUNT - 3))
    assert order == Mixture(Records(DataConfig(train=train, leave_out=file)), seed=0).order(0)


def test_a_share_keeps_its_held_out_records(tmp_path, train):
    config = DataConfig(train=train, validation=0.2)
    held, trained = Records(config, held_out=True), Records(config)
    out = [int(trained.sources[0].rows[5]), int(held.sources[0].rows[0])]
    file = listed(tmp_path / "out.json", (SourceConfig(train=train), out))
    less = DataConfig(train=train, validation=0.2, leave_out=file)
    assert ids(Records(less, held_out=True)) == ids(held)
    assert ids(Records(less)) == ids(trained) - {f"r{out[0]:04d}"}
    assert Records(less).sources[0].left_out == 1  # the held-out one was not trained on


def test_a_source_may_name_a_file_of_its_own(tmp_path, train):
    other = put(tmp_path / "b.json", 10, "s")
    configs = [SourceConfig(train=name) for name in (train, other)]
    both = listed(tmp_path / "both.json", (configs[0], [0]), (configs[1], [1, 2]))
    own = listed(tmp_path / "own.json", (configs[1], [4]))
    data = {"sources": [{"train": train}, {"train": other}], "leave_out": both}
    sources = Records(DataConfig(**data)).sources
    assert [source.left_out for source in sources] == [1, 2]
    data["sources"][1]["leave_out"] = own
    sources = Records(DataConfig(**data)).sources
    assert [source.left_out for source in sources] == [1, 1]
    assert "s0004" not in ids(sources[1])


def test_samples_of_tars_are_known_by_their_keys(tmp_path):
    members = {k: v for n in range(6) for k, v in sample(n).items()}
    config = SourceConfig(train=str(write_tar(tmp_path / "a.tar", members)))
    file = listed(tmp_path / "out.json", (config, [2]))
    left = Source(config.model_copy(update={"leave_out": file}))
    assert np.array_equal(left.rows, [0, 1, 3, 4, 5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, t: put(t, COUNT + 1), "was written for other content (records: 40, now 41)"),
        (lambda f, t: put(t, COUNT, "s"), "other content (record 3 had the id 'r0003')"),
        (lambda f, t: put(t, COUNT, "longer"), "(files of another name or size)"),
        (lambda f, t: f.unlink(), "no such file -- check leave_out"),
        (lambda f, t: f.write_text("[]"), "it is no file of records to leave out"),
        (lambda f, t: f.write_text("{"), "it is no file of records to leave out"),
        (lambda f, t: listed(f, (SourceConfig(train=str(t)), range(COUNT))), "all of its records"),
        (
            lambda f, t: listed(f, (SourceConfig(train=put(t.parent / "b.json", 2)), [0])),
            "does not list this source",
        ),
    ],
    ids=["more", "ids", "size", "gone", "other", "cut", "all", "another source"],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, train, change, message):
    path = tmp_path / "out.json"
    file = listed(path, (SourceConfig(train=train), [3]))
    change(path, tmp_path / "a.json")
    with pytest.raises(DataError) as caught:
        Source(SourceConfig(train=train, leave_out=file))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"sources": [{"train": "hub:a/b", "stream": 9, "leave_out": "f"}]}, "not for streams"),
        ({"sources": [{"train": "hub:a/b", "stream": 9}], "leave_out": "f"}, "not for streams"),
        (
            {"train": "a.json", "validation": {"train": "b.json", "leave_out": "f"}},
            "'leave_out' is only for training",
        ),
    ],
)
def test_where_it_cannot_be_honoured_the_recipe_is_refused(tmp_path, data, message):
    raw = tiny_recipe(tmp_path, "model", tmp_path, data=data)
    with pytest.raises(RecipeError, match=message):
        load_recipe(raw)
