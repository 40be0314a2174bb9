"""`data.sources[].select`: which records are trained on, and what is refused."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmkd.data.mixture import Mixture
from mmkd.data.records import Records
from mmkd.errors import DataError, RecipeError
from mmkd.recipe import DataConfig, load_recipe
from mmkd.report.rundata import read_run
from mmkd.report.summary import provenance_rows
from mmkd.runs import pipeline
from mmkd.runs.provenance import collect
from mmkd.runtime.files import read_json
from tests.support.layouts import turns, write_numbers
from tests.support.recipes import tiny_recipe
from tests.support.score_files import put_scores

COUNT = 20
LARGE = np.linspace(0, 1, COUNT)
SMALL = np.random.default_rng(0).random(COUNT) * 3
DIFFERENCE = {"kind": "difference", "large": "large", "small": "small"}


@pytest.fixture
def train(tmp_path):
    write_numbers(tmp_path / "n.json", range(COUNT))
    return tmp_path / "n.json"


@pytest.fixture
def scores(tmp_path, train):
    return put_scores(
        tmp_path / "s.parquet", train, large={"nll": LARGE}, small={"nll": SMALL, "margin": LARGE}
    )


def records_of(train, select, **data):
    return Records(DataConfig(train=str(train), select=select, **data))


def numbers(train, select, **data):
    records = records_of(train, select, **data)
    return [int(records[i].id[1:]) for i in range(len(records))]


def test_the_records_with_the_largest_differences_are_kept_in_order(train, scores):
    kept = numbers(train, {**DIFFERENCE, "scores": scores, "keep": 0.3})
    assert kept == sorted(np.argsort(-(SMALL - LARGE))[:6].tolist())
    other = numbers(
        train, {**DIFFERENCE, "scores": scores, "large": "small", "small": "large", "keep": 0.7}
    )
    assert sorted(kept + other) == list(range(COUNT))


def test_all_records_are_the_source_untouched(train, scores):
    plain, whole = (
        Mixture(records_of(train, select), 3)
        for select in (None, {**DIFFERENCE, "scores": scores, "keep": 1.0})
    )
    assert [whole.order(epoch) for epoch in range(3)] == [plain.order(epoch) for epoch in range(3)]
    assert numbers(train, {**DIFFERENCE, "scores": scores, "keep": 1.0}) == list(range(COUNT))


def test_held_out_records_are_split_off_first_and_never_selected(train, scores):
    config = DataConfig(
        train=str(train), validation=0.25, select={**DIFFERENCE, "scores": scores, "keep": 0.4}
    )
    kept, held_out = Records(config), Records(config, held_out=True)
    left = [i for i in range(COUNT) if i not in {int(held_out[j].id[1:]) for j in range(5)}]
    assert (len(held_out), len(left), len(kept)) == (5, 15, 6)
    order = sorted(left, key=lambda i: -(SMALL - LARGE)[i])
    assert [int(kept[i].id[1:]) for i in range(6)] == sorted(order[:6])
    assert str(kept.sources[0].selection) == "keeps 6 of 15 records (select: difference)"


def test_losses_of_two_tokenizers_are_compared_per_character(tmp_path, train):
    tokens, characters = np.arange(1, COUNT + 1), np.arange(COUNT, 0, -1)
    path = put_scores(
        tmp_path / "two.parquet",
        train,
        ("one", "other"),
        large={"nll": LARGE, "tokens": 2 * tokens, "characters": characters},
        small={"nll": SMALL, "tokens": tokens, "characters": characters},
    )
    wanted = np.argsort(-(SMALL * tokens - LARGE * 2 * tokens) / characters)[:10]
    assert numbers(train, {**DIFFERENCE, "scores": path}) == sorted(wanted.tolist())


def test_a_robust_choice_is_a_function_of_its_settings(train, scores):
    select = {
        "kind": "robust",
        "scores": scores,
        "model": "small",
        "budget": 8,
        "seed": 1,
        "wrong": 0.5,
    }
    kept = numbers(train, select)
    assert len(set(kept)) == 8
    assert kept == numbers(train, select)
    assert kept != numbers(train, {**select, "seed": 2})
    assert COUNT - 1 not in kept  # its margin is 1
    first = numbers(train, {**select, "wrong": 0.0})
    assert first == list(range(8))  # those of the smallest margins


def write_made(path, rates):
    rows = [
        {
            "id": f"r{i}",
            "conversations": turns("?", "a"),
            "made": {"pass_rate": rate},
            "score": i % 3,
        }
        for i, rate in enumerate(rates)
    ]
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_fields_of_records_decide(name, tmp_path):
    path = write_made(tmp_path / name, [0.0, 0.25, 1.0, None, 0.75, 0.99, 0.5])
    rate = {"kind": "difficulty", "field": "made.pass_rate"}
    assert numbers(path, rate) == [1, 4, 5, 6]
    assert numbers(path, {**rate, "least": 0.25, "most": 0.8}) == [4, 6]
    assert str(records_of(path, rate).sources[0].selection) == (
        "keeps 4 of 7 records; 1 have no number to choose by (select: difficulty)"
    )
    even = numbers(path, {"kind": "balance", "field": "score", "to": 1.0})
    assert Counter(i % 3 for i in even) == {0: 3, 1: 3, 2: 3}
    assert even == sorted(even)
    assert numbers(path, {"kind": "balance", "field": "score", "to": 0.0, "bins": 2}) != even


def test_columns_of_scores_decide(train, scores):
    select = {"kind": "difficulty", "scores": scores, "field": "large.nll", "most": 0.5}
    assert numbers(train, select) == [i for i in range(COUNT) if 0 < LARGE[i] < 0.5]
    select = {"kind": "balance", "scores": scores, "field": "small.nll", "bins": 3, "to": 0.5}
    groups = Counter(
        min(int((SMALL[i] - SMALL.min()) / (np.ptp(SMALL) / 3)), 2) for i in numbers(train, select)
    )
    assert len(set(groups.values())) == 1


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"scores": "none.parquet"}, "none.parquet: no such file of scores -- check the path"),
        ({"scores": "n.json"}, "n.json: it is damaged, or `mmkd data score` has not written it"),
        ({"large": "lrge"}, "it has no scores of a model 'lrge' -- did you mean 'large'?"),
        ({"scores": "same.parquet"}, "nothing to choose the records of 'n' by: all values are"),
        ({"scores": "more.parquet"}, "it is of a source of 21 records, and 'n' has 20 -- score"),
        ({"scores": "others.parquet"}, "it is of another record than .*n.json: record 0"),
        ({"scores": "m.parquet"}, "it has no records of the source 'n' -- known: m"),
        ({"kind": "difficulty", "field": "rate"}, "no record has a number in 'rate' -- check"),
        ({"kind": "difficulty", "field": "large.nlm", "scores": "s.parquet"}, "no column 'large"),
        ({"kind": "difficulty", "field": "large.nll", "scores": "s.parquet", "least": 1, "most": 2},
         "its selection keeps no record -- change the bounds"),
    ],
)  # fmt: skip
def test_what_cannot_be_chosen_is_refused(select, message, tmp_path, train, scores, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_scores(tmp_path / "same.parquet", train, large={"nll": LARGE}, small={"nll": LARGE})
    for name, count, path in (("n", 21, "more"), ("m", 20, "m"), ("n", 20, "others")):
        folder = tmp_path / path
        folder.mkdir()
        write_numbers(folder / f"{name}.json", range(100, 100 + count))
        put_scores(tmp_path / f"{path}.parquet", folder / f"{name}.json", large={}, small={})
    if "kind" not in select:
        select = {**DIFFERENCE, "scores": scores, **select}
    with pytest.raises(DataError, match=message):
        numbers(train, select)


def test_records_that_were_not_scored_are_refused(tmp_path, train, scores):
    table = pq.read_table(scores)
    pq.write_table(table.slice(0, 15), tmp_path / "part.parquet")
    with pytest.raises(DataError, match="it does not have all training records of 'n'"):
        numbers(train, {**DIFFERENCE, "scores": str(tmp_path / "part.parquet")})


def test_many_values_need_bins(tmp_path):
    path = write_made(tmp_path / "a.json", [i / 2000 for i in range(1001)])
    with pytest.raises(DataError, match=r"'made.pass_rate' has 1,001 different values -- give 'bi"):
        numbers(path, {"kind": "balance", "field": "made.pass_rate"})


BASE = {"name": "x", "student": {"model": "m"},
        "stages": [{"name": "a", "objectives": [{"kind": "ce"}], "steps": 1}]}  # fmt: skip
FIELD = {"kind": "difficulty", "field": "a"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "a.json", "select": {**FIELD, "kind": "hard"}}, "unknown kind 'hard'"),
        ({"train": "a.json", "select": {"field": "a"}}, "data.select: the key 'kind' is missing"),
        ({"train": "a.json", "select": {**FIELD, "least": 1}}, "no number is above 'least' and"),
        ({"train": "a.json", "select": {**DIFFERENCE, "scores": "s", "small": "large"}},
         "both models are 'large' -- name two models"),
        ({"train": "a.json", "select": {"kind": "robust", "scores": "s", "model": "m"}},
         "give either 'keep' \\(a share\\) or 'budget'"),
        ({"sources": [{"train": "a.json"}], "select": FIELD}, "move it into a source"),
        ({"sources": [{"train": "hub:a/b", "stream": 5, "select": FIELD}]}, "leave 'stream' out"),
        ({"train": "a.json", "validation": [{"train": "b.json", "select": FIELD}]},
         "'select' is only for training"),
    ],
)  # fmt: skip
def test_settings_that_contradict_are_refused(data, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe({**BASE, "data": data})


def test_a_run_says_and_notes_what_it_keeps(tmp_path, train, scores, tiny_model_dir, capsys):
    select = {**DIFFERENCE, "scores": scores}
    raw = tiny_recipe(tmp_path, tiny_model_dir, tmp_path / "runs", stage={"steps": 2})
    raw["data"] = {"sources": [{"train": str(train), "select": select}]}
    recipe = load_recipe(raw)
    path = pipeline.run(recipe)
    assert "n keeps 10 of 20 records (select: difference)" in capsys.readouterr().out
    (facts,) = read_json(path / "provenance.json")["selections"]["n"]
    assert (facts["kept"], facts["records"]) == (10, 20)
    assert facts == collect(recipe)["selections"]["n"][0]
    assert facts["settings"]["keep"] == 0.5
    assert scores in read_json(path / "01-mimic" / "inputs.json")["files"]
    said = dict(provenance_rows(read_run(path)))["selection of n"]
    assert said == f"difference: 10 of 20 records, sha256 {facts['sha256_of_indices']}"
