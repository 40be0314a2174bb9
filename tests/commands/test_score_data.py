"""`mmkd data score`: numbers of training records, in any batches and processes."""

import json
import os
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mmkd.cli import main
from mmkd.commands import score_data as command
from mmkd.commands import score_passes
from mmkd.commands.score_data import score_data
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import CheckpointError, DataError, RecipeError, StoppedError
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import DataConfig, ModelConfig, SourceConfig, load_recipe, to_yaml
from tests.data.test_left_out import listed
from tests.support import warm
from tests.support.layouts import turns, write_numbers
from tests.support.recipes import tiny_recipe

MEANS = ("nll", "margin", "entropy")


@pytest.fixture(scope="module")
def recipe(scenes_dir, tiny_model_dir, tmp_path_factory):
    """Ten records with images, a teacher, and a student of one layer less."""
    folder = tmp_path_factory.mktemp("scored")
    path = folder / "train.parquet"
    pq.write_table(pq.read_table(scenes_dir / "train.parquet").slice(0, 10), path)
    raw = tiny_recipe(scenes_dir, tiny_model_dir, folder, teacher={"model": str(tiny_model_dir)})
    raw["student"]["convert"] = [{"kind": "depth_pruning", "decoder": [0]}]
    raw["data"] = {"train": str(path), "validation": 0.2}
    return load_recipe(raw)


@pytest.fixture(scope="module")
def table(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "s.parquet"
    score_data(recipe, out, batch_size=3, device="cpu")
    assert sorted(os.listdir(out.parent)) == ["s.parquet"]
    return pq.read_table(out).to_pydict()


def twin(model, processor, recipe, index):
    """Numbers of one record from the model's own logits, row by row."""
    encoder = Encoder(Records(recipe.data), processor, recipe.data)
    batch = encoder.encode([index])
    with torch.no_grad():
        log_p = model(**batch.inputs).logits[0].double().log_softmax(-1)
    targets, rows = batch.targets, []
    for t in range(1, targets.input_ids.shape[1]):
        if targets.response[0, t]:
            p = log_p[t - 1].exp().sort(descending=True).values
            nll = -log_p[t - 1, targets.input_ids[0, t]]
            rows.append([float(nll), float(p[0] - p[1]), float(-(p * p.log()).sum())])
    said = encoder.records[index].messages
    text = "".join(m["content"][0]["text"] for m in said if m["role"] == "assistant")
    return len(rows), len(text), np.mean(rows, axis=0)


def test_numbers_are_those_of_the_models_logits(recipe, table, tiny_model_dir):
    records = Records(recipe.data)
    assert len(records) == len(table["id"]) == 8
    assert table["source"] == ["train"] * 8
    assert table["index"] == [records.sources[0].row_number(i) for i in range(8)]
    assert table["id"] == [records[i].id for i in range(8)]
    config = ModelConfig(model=str(tiny_model_dir))
    model, processor = load_model(config).eval(), load_processor(config)
    encoder = Encoder(records, processor, recipe.data)
    assert table["key"] == [encoder.load(i).key.hex() for i in range(8)]
    for index in (0, 5):
        tokens, characters, means = twin(model, processor, recipe, index)
        assert table["teacher.tokens"][index] == tokens
        assert abs(table["teacher.characters"][index] - characters) <= tokens  # spaces
        found = [table[f"teacher.{name}"][index] for name in MEANS]
        assert found == pytest.approx(means.tolist(), rel=1e-5)
    assert not np.allclose(table["teacher.nll"], table["student.nll"])


def same(table, out):
    found = pq.read_table(out).to_pydict()
    assert found.keys() == table.keys()
    for name, values in found.items():
        if name.rpartition(".")[2] in MEANS:
            assert values == pytest.approx(table[name], rel=1e-5)
        else:
            assert values == table[name]


def test_the_batch_size_changes_nothing(recipe, table, tmp_path):
    score_data(recipe, tmp_path / "s.parquet", batch_size=8, device="cpu")
    same(table, tmp_path / "s.parquet")


def test_two_processes_share_the_records(recipe, table, tmp_path):
    path, out = tmp_path / "recipe.yaml", tmp_path / "s.parquet"
    path.write_text(to_yaml(recipe))
    words = ["data", "score", path, "--out", out, "--batch-size", 3, "--device", "cpu"]
    done = warm.run(*words, "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert "8 records" in done.stdout
    same(table, out)


def test_a_stopped_command_continues_to_the_same_bits(recipe, table, tmp_path, monkeypatch):
    out, asked = tmp_path / "s.parquet", iter([False, False, True])
    with monkeypatch.context() as patched:
        patched.setattr(score_passes, "asked", lambda device: next(asked))
        with pytest.raises(StoppedError, match="teacher stopped at block 3 of 3"):
            score_data(recipe, out, batch_size=3, device="cpu")
    part = out.with_name("s.parquet.parts") / "teacher-0.jsonl"
    kept = part.read_bytes()
    cut = kept.rindex(b"\n", 0, -1)
    part.write_bytes(kept[: cut + 20])  # killed while it wrote the last block
    data = recipe.data.model_copy(update={"max_length": 512})
    shorter = recipe.model_copy(update={"data": data})
    with pytest.raises(DataError, match="answers to another request"):
        score_data(shorter, out, device="cpu")
    score_data(recipe, out, batch_size=3, device="cpu")
    assert pq.read_table(out).to_pydict() == table
    assert not part.exists()


def test_other_records_are_another_request(recipe, tmp_path, monkeypatch):
    """As many records, but others."""
    source = SourceConfig(train=recipe.data.train)
    first = Records(recipe.data).sources[0].rows[:2].tolist()
    lists = [listed(tmp_path / f"{n}.json", (source, [n])) for n in first]
    requests = []

    def keep(folder, name, request):
        requests.append(json.dumps(request))
        raise StoppedError("kept")

    monkeypatch.setattr(command, "Scores", keep)
    for keys in ({}, {"images": "elsewhere"}, {"leave_out": lists[0]}, {"leave_out": lists[1]}):
        other = recipe.model_copy(update={"data": recipe.data.model_copy(update=keys)})
        with pytest.raises(StoppedError, match="kept"):
            score_data(other, tmp_path / "s.parquet", models=["student"], device="cpu")
    assert len(set(requests)) == 4


def test_bad_records_have_no_numbers(recipe, tiny_model_dir, tmp_path):
    rows = [{"id": f"r{i}", "conversations": turns("?", f"a {i}")} for i in range(4)]
    rows[2]["conversations"] = turns("?", "")
    (tmp_path / "a.json").write_text(json.dumps(rows))
    config = DataConfig(train=str(tmp_path / "a.json"), on_bad_record="skip")
    changed = recipe.model_copy(update={"data": config})
    out = tmp_path / "s.parquet"
    found = score_data(changed, out, models=[f"own={tiny_model_dir}"], batch_size=2, device="cpu")
    assert found["models"]["own"]["records"] == 3
    table = pq.read_table(out).to_pydict()
    assert table["id"] == ["r0", "r1", "r2", "r3"]
    assert [key is None for key in table["key"]] == [False, False, True, False]
    assert [nll is None for nll in table["own.nll"]] == [False, False, True, False]
    stops = config.model_copy(update={"on_bad_record": "stop"})
    with pytest.raises(DataError, match=r"record 2 .*no response of the assistant"):
        score_data(recipe.model_copy(update={"data": stops}), tmp_path / "t.parquet", device="cpu")


def test_the_same_model_twice_leaves_nothing_to_choose_by(recipe, tiny_model_dir, tmp_path):
    write_numbers(tmp_path / "n.json", range(5))
    data = {"train": str(tmp_path / "n.json")}
    changed = recipe.model_copy(update={"data": DataConfig(**data)})
    out = tmp_path / "s.parquet"
    models = [f"a={tiny_model_dir}", f"b={tiny_model_dir}", "student"]
    score_data(changed, out, models=models, batch_size=2, device="cpu")
    select = {"kind": "difference", "scores": str(out), "large": "a", "small": "b"}
    with pytest.raises(DataError, match="nothing to choose the records of 'n' by: all values are"):
        Records(DataConfig(**data, select=select))
    assert len(Records(DataConfig(**data, select={**select, "small": "student"}))) == 2
    # a selection in the recipe does not change what is scored
    again = changed.model_copy(
        update={"data": DataConfig(**data, select={**select, "small": "student"})}
    )
    score_data(again, tmp_path / "t.parquet", models=["student"], batch_size=2, device="cpu")
    both = [pq.read_table(p).to_pydict()["student.nll"] for p in (out, tmp_path / "t.parquet")]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"models": ["techer"]}, RecipeError, "no model 'techer' -- did you mean 'teacher'?"),
        ({"models": ["a b=x"]}, RecipeError, "--model: got 'a b=x' -- write NAME=FOLDER"),
        ({"models": ["student", "student"]}, RecipeError, "two models have the same name"),
        ({"stage": "mimick"}, RecipeError, "no stage 'mimick' -- did you mean 'mimic'?"),
        ({"out": "s.csv"}, CheckpointError, "s.csv: scores are written as Parquet"),
        ({"out": "old.parquet"}, CheckpointError, "old.parquet: it is there already -- name a new"),
    ],
)
def test_what_cannot_be_scored_is_refused(changes, error, message, recipe, tmp_path):
    (tmp_path / "old.parquet").touch()
    out = tmp_path / changes.pop("out", "s.parquet")
    with pytest.raises(error, match=message):
        score_data(recipe, out, device="cpu", **changes)
    assert os.listdir(tmp_path) == ["old.parquet"]


def test_streams_are_refused(recipe, tmp_path):
    data = DataConfig(sources=[{"train": "hub:a/b", "stream": 5}])
    with pytest.raises(RecipeError, match="a stream has no fixed records to score"):
        score_data(recipe.model_copy(update={"data": data}), tmp_path / "s.parquet")


def test_the_command_prints_a_table_or_json(recipe, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    for words, wanted in (([], "nll a character"), (["--json"], '"nll_per_character"')):
        out = tmp_path / f"s{len(words)}.parquet"
        said = ["mmkd", "data", "score", str(path), "--out", str(out), "--model", "teacher"]
        monkeypatch.setattr(sys, "argv", [*said, "--device", "cpu", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code in (0, None)
        printed = capsys.readouterr().out
        assert wanted in printed
    assert json.loads(printed)["models"]["teacher"]["records"] == 8
