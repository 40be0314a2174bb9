"""`leave_out`, `select`, a share for validation and `data.sampling` in one recipe: which records
are trained on, held out and measured."""

import numpy as np
import pytest

from mmkd.commands.check_twins import _roles
from mmkd.data.mixture import MovingMixture
from mmkd.data.records import Records
from mmkd.recipe import DataConfig, SourceConfig, load_recipe
from mmkd.runs.provenance import collect
from mmkd.training import build
from tests.data.test_left_out import ids, listed
from tests.support.layouts import write_numbers
from tests.support.recipes import tiny_recipe
from tests.support.score_files import put_scores

COUNT, SHARE, APART = 60, 0.1, 8
OUT = {"a": {*range(0, 60, 7)}, "b": {*range(30)}}
MASK = 2**64 - 1


def mixed(number):
    """SplitMix64 of a whole number."""
    key = (number + 1) * 0x9E3779B97F4A7C15 & MASK
    key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & MASK
    key = (key ^ key >> 27) * 0x94D049BB133111EB & MASK
    return key ^ key >> 31


@pytest.fixture
def data(tmp_path):
    parts = []
    for seed, name in enumerate(OUT):
        path = tmp_path / f"{name}.json"
        write_numbers(path, [f"{name}{n}" for n in range(COUNT)])
        nll = np.random.default_rng(seed).random(COUNT)
        scores = put_scores(tmp_path / f"{name}.parquet", path, large={}, small={"nll": nll})
        select = {"kind": "difference", "scores": scores, "large": "large", "small": "small"}
        out = listed(tmp_path / f"{name}-out.json", (SourceConfig(train=str(path)), OUT[name]))
        parts.append({"train": str(path), "select": {**select, "keep": 0.4}, "leave_out": out})
    sampling = {"kind": "domain", "every": 3, "held_out": APART}
    return {"sources": parts, "validation": SHARE, "sampling": sampling}


def twin(name):
    """Ids of the records of a source that are held out, measured and trained on, and the number of
    records that `leave_out` removes."""
    order = sorted(range(COUNT), key=mixed)
    first = round(SHARE * COUNT)
    rest = order[first + APART :]
    left = [n for n in rest if n not in OUT[name]]
    nll = np.random.default_rng([*OUT].index(name)).random(COUNT)
    kept = sorted(left, key=lambda n: -nll[n])[: round(0.4 * len(left))]
    parts = order[:first], order[first : first + APART], kept
    return *({f"r{name}{n}" for n in part} for part in parts), len(rest) - len(left)


def test_each_record_has_one_role(data):
    config = DataConfig.model_validate(data)
    held_out, measured, trained = (
        Records(config, held_out=role == 0, measured=role == 1) for role in range(3)
    )
    for role, records in enumerate((held_out, measured, trained)):
        assert [ids(s) for s in records.sources] == [twin(name)[role] for name in OUT]
    assert [s.left_out for s in trained.sources] == [twin(name)[3] for name in OUT]
    unselected = Records(config.without_selection())
    assert [len(s) + s.left_out for s in unselected.sources] == [COUNT - 6 - APART] * 2
    mixture = MovingMixture(trained, seed=3, period=40)
    mixture.add([0.7, 0.3])
    seen = {trained[i].id for interval in range(2) for i in mixture.order(interval)}
    assert seen == twin("a")[2] | twin("b")[2]


def test_twins_are_searched_among_the_records_that_are_trained_on(data):
    config = DataConfig.model_validate(data).without_selection()
    trained, held_out = _roles(config.parts[0], [config])
    out, measured, _, left = twin("a")
    assert {f"ra{n}" for n in np.flatnonzero(held_out)} == out
    assert trained.sum() == COUNT - 6 - APART - left
    assert measured.isdisjoint(f"ra{n}" for n in np.flatnonzero(trained))


def test_what_is_left_out_and_selected_is_said_and_noted(
    data, tmp_path, tiny_model_dir, monkeypatch
):
    raw = tiny_recipe(tmp_path, tiny_model_dir, tmp_path / "runs", variants={
        "plain": ["data.sources.0.select=null", "data.sources.0.leave_out=null"],
        "fewer": [f"data.sources.0.leave_out={tmp_path / 'fewer.json'}"],
        "other": ["stages.0.data={train: missing.json}"],
    })  # fmt: skip
    train = SourceConfig(train=str(tmp_path / "a.json"))
    fewer = listed(tmp_path / "fewer.json", (train, sorted(OUT["a"])[:3]))
    recipe = load_recipe({**raw, "data": data})
    said = []
    monkeypatch.setattr(build, "say", said.append)
    build._say_left_out(Records(recipe.data))
    counts = [twin(name)[3] for name in OUT]
    assert [line.partition(" records")[0] for line in said] == [
        f"{name}: {count} of {COUNT - 6 - APART}" for name, count in zip(OUT, counts, strict=True)
    ]
    facts = collect(recipe)
    left = [facts["left_out"][str(tmp_path / f"{name}.json")] for name in OUT]
    assert left[0][0]["records"] == counts[0]
    assert [part["file"] for part in left[0]] == [data["sources"][0]["leave_out"], fewer]
    assert [part["records"] for part in left[1]] == [counts[1]]
    records = [[s["records"] for s in facts["selections"][name]] for name in OUT]
    assert records[1] == [COUNT - 6 - APART - counts[1]]
    assert len(records[0]) == 2
    (tmp_path / "fewer.json").unlink()  # the student of the variant may be trained already
    again = collect(recipe)
    assert [len(part) for part in again["left_out"].values()] == [1, 1]
    assert [len(part) for part in again["selections"].values()] == [1, 1]
