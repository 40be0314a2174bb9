"""`mmkd data check --twins`: twins in training data, held-out records and tasks leave training."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from mmkd.commands import twins_report
from mmkd.commands.find_twins import Side, compare, divide, task_sides, wanted_texts
from mmkd.data import check
from mmkd.data.check import Look, check_source
from mmkd.data.fingerprints import Wanted
from mmkd.data.records import Records
from mmkd.errors import CheckpointError
from mmkd.evaluation.documents import Document, TaskDocuments, read_documents
from mmkd.recipe import SourceConfig, load_recipe
from mmkd.runs.pipeline import run as run_recipe
from tests.commands.test_check_data import found, run
from tests.support.layouts import turns
from tests.support.recipes import tiny_recipe

TASKS = ("--against", "scenes_pope,scenes_vqa")


def changed(content, *, scale=1.0, kind="PNG"):
    """An image file, scaled or compressed."""
    image, out = Image.open(io.BytesIO(content)).convert("RGB"), io.BytesIO()
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    image.save(out, kind)
    return {"bytes": out.getvalue(), "path": None}


def jpeg(content):
    return changed(content, kind="JPEG")


def row(name, image, question):
    talk = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": "yes"}]
    return {"id": name, "image": image, "conversations": talk}


@pytest.fixture(scope="module")
def leaked(scenes_dir, tmp_path_factory):
    """Training records, of which some show images of held-out records and of tasks."""
    folder = tmp_path_factory.mktemp("leaked")
    own = pq.read_table(scenes_dir / "train.parquet").slice(0, 20).to_pylist()
    rows = [{key: r[key] for key in ("id", "image", "conversations")} for r in own]
    held = pq.read_table(scenes_dir / "validation.parquet").to_pylist()
    pope = pq.read_table(scenes_dir / "eval" / "pope.parquet").to_pylist()[0]
    vqa = pq.read_table(scenes_dir / "eval" / "vqa.parquet").to_pylist()[-1]
    rows[3:3] = [
        row("held copy", held[2]["image"], "What?"),
        row("held jpeg", jpeg(held[5]["image"]["bytes"]), "What?"),
        row("pope small", changed(pope["image"]["bytes"], scale=0.9), pope["question"].upper()),
        row("vqa jpeg", jpeg(vqa["image"]["bytes"]), "Another question?"),
        row("own jpeg", jpeg(rows[0]["image"]["bytes"]), "What?"),
        {**rows[1], "id": "again"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    return folder


@pytest.fixture
def recipe(leaked, scenes_dir, tiny_model_dir, tmp_path):
    data = {
        "train": str(leaked / "train.parquet"),
        "validation": str(scenes_dir / "validation.parquet"),
    }
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path / "runs", data=data)
    raw["stages"][0]["steps"] = 1
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def write(recipe, **data):
    raw = yaml.safe_load(recipe.read_text())
    raw["data"].update(data)
    recipe.write_text(yaml.safe_dump(raw))
    return load_recipe(recipe)


LEAKED = {"held copy", "held jpeg", "pope small", "vqa jpeg"}


def named(places):
    return [place.split("(id ")[1].rstrip(")") for place in places]


def test_leaked_images_are_found_and_leave_training(
    recipe, scenes_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(check, "CHUNK", 7)
    words = [recipe, "--twins", *TASKS, "--include", scenes_dir / "tasks"]
    out = tmp_path / "out.json"
    status, said = found(monkeypatch, capsys, *words, "--drop", out, "--workers", 2)
    assert (status, said["good"], said["bad"]) == (1, False, 0)
    twins = said["twins"]
    own = twins["training"]
    assert (own["records"], own["images"], own["repeated records"]) == (26, 25, 1)
    assert own["images of several records"] == 1
    [group] = own["groups"]
    assert [named(places) for places in group["images"]] == [["train-000000"], ["own jpeg"]]
    assert 0 < group["bits"] <= 16
    sides = {side["name"]: side for side in twins["against"]}
    assert [*sides] == ["held out", "scenes_pope", "scenes_vqa"]
    held, pope, vqa = sides.values()
    assert held["pairs"][0]["bits"] == 0
    assert [named(p["training"]) for p in held["pairs"]] == [["held copy"], ["held jpeg"]]
    assert (held["images"], held["training records"], held["same question"]) == (16, 2, 0)
    # All questions about the image are affected, and one of them is asked in training.
    [pair] = pope["pairs"]
    assert (named(pair["training"]), len(pair["of"]) > 1) == (["pope small"], True)
    documents = pq.read_table(scenes_dir / "eval" / "pope.parquet").to_pylist()
    asked = documents[0]["question"]
    same = [d["id"] for d in documents if d["id"] in pair["of"] and d["question"] == asked]
    assert pair["same question"] == same
    assert 0 < len(same) < len(pair["of"])
    assert (pope["same question"], vqa["same question"]) == (len(same), 0)
    assert named(vqa["pairs"][0]["training"]) == ["vqa jpeg"]
    assert twins["drop"] == {"file": str(out), "records": {"train": 4}}
    listed = json.loads(out.read_text())["sources"][0]["leave_out"]
    assert {record["id"] for record in listed} == LEAKED
    assert listed[2]["why"] == f"scenes_pope: image of {pair['of'][0]}"

    loaded = write(recipe, leave_out=str(out))
    records = Records(loaded.data)
    assert len(records) == 22
    assert not LEAKED & {records[i].id for i in range(len(records))}
    status, said = found(monkeypatch, capsys, *words, "--workers", 1)
    assert (status, said["good"], said["records"]) == (0, True, 26 + 16)
    assert [side["training records"] for side in said["twins"]["against"]] == [0, 0, 0]
    status, _, err = run(monkeypatch, capsys, *words, "--drop", out)
    assert status == 2
    assert "check the recipe without 'leave_out'" in err


def test_a_run_says_and_notes_what_it_leaves_out(recipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.json"
    words = [recipe, "--twins", "--drop", out, "--workers", 1]
    _, said = found(monkeypatch, capsys, *words)
    assert said["twins"]["drop"]["records"] == {"train": 2}
    loaded = write(recipe, leave_out=str(out))
    with monkeypatch.context() as patched:
        lines = []
        patched.setattr("mmkd.training.build.say", lines.append)
        folder = run_recipe(loaded)
    assert f"train: 2 of 26 records are left out ({out})" in lines
    facts = json.loads((folder / "provenance.json").read_text())["left_out"]
    [[fact]] = facts.values()
    assert (fact["file"], fact["records"], len(fact["sha256"])) == (str(out), 2, 64)
    changed = json.loads(out.read_text())
    changed["sources"][0]["leave_out"].pop()
    out.write_text(json.dumps(changed))
    (next(folder.rglob("01-mimic")) / "done.json").unlink()
    with pytest.raises(CheckpointError, match="has changed since the run began"):
        run_recipe(loaded)


def test_a_held_out_share_keeps_its_records(leaked, recipe, tmp_path, monkeypatch, capsys):
    """One of two equal images is held out: the other one leaves training."""
    rows = pq.read_table(leaked / "train.parquet").to_pylist()
    path = tmp_path / "twice.parquet"
    pq.write_table(pa.Table.from_pylist([*rows, *({**r, "id": r["id"] + "2"} for r in rows)]), path)
    out = tmp_path / "out.json"
    loaded = write(recipe, train=str(path), validation=0.25)
    _, said = found(monkeypatch, capsys, recipe, "--twins", "--drop", out, "--workers", 1)
    held = Records(loaded.data, held_out=True)
    loaded = write(recipe, leave_out=str(out))
    trained = Records(loaded.data)
    assert len(Records(loaded.data, held_out=True)) == len(held) == 13
    assert trained.sources[0].left_out == said["twins"]["drop"]["records"]["twice"] > 5

    def shown(records):
        return {records[i].images[0]["bytes"] for i in range(len(records))}

    assert not shown(held) & shown(trained)


def test_the_terminal_and_the_sheet_show_pairs(recipe, scenes_dir, tmp_path, monkeypatch, capsys):
    console = twins_report.console.__class__(width=100)
    monkeypatch.setattr(twins_report, "console", console)
    sheet = tmp_path / "sheet.png"
    words = [recipe, "--twins", "--against", "scenes_vqa", "--include", scenes_dir / "tasks"]
    status, out, _ = run(monkeypatch, capsys, *words, "--sheet", sheet, "--workers", 1)
    assert status == 1
    tables = [line for line in out.splitlines() if line[:1] in "┏┃┡│└"]
    assert {len(line) for line in tables} == {80}
    assert any("scenes_vqa" in line and " 6 " in line and " 1 " in line for line in tables)
    assert "3 training records have twins in held-out records or tasks" in out
    assert "training records repeat the images and questions" in out
    assert f"wrote {sheet}" in out
    with Image.open(sheet) as image:
        # own jpeg, held copy, held jpeg, vqa jpeg: four pairs in rows of three
        assert image.size == (3 * 2 * twins_report.CELL, 2 * (twins_report.CELL + 52))
        assert len(image.convert("RGB").getcolors(2**24)) > 100


def test_documents_that_cannot_be_read_are_counted(scenes_dir, tmp_path):
    shutil.copytree(scenes_dir / "tasks", tmp_path / "tasks")
    rows = pq.read_table(scenes_dir / "eval" / "caption.parquet")
    broken = rows.to_pylist()
    broken[1]["image"] = {"bytes": b"no image", "path": None}
    (tmp_path / "eval").mkdir()
    table = pa.Table.from_pylist(broken, schema=rows.schema)
    pq.write_table(table, tmp_path / "eval" / "caption.parquet")
    [task] = read_documents(["scenes_caption"], tmp_path / "tasks", None, thumbnail=20)
    assert len(task.documents) == len(broken) - 1
    [line] = task.unreadable
    assert line.startswith(f"scenes_caption {broken[1]['id']}: ")
    assert {max(image.size) for image in task.thumbnails.values()} == {20}
    assert task.documents[0].question == broken[0]["question"]


def test_texts_without_images_are_compared(tmp_path):
    long = "a man of forty walks with his two dogs along the river every single morning"
    template = "please read the text and give the one letter of the choice that is right"
    own = [f"{template} {n} {n + 1}?" for n in range(40)]
    documents = [Document("long", f"{long}. How old is he?", ()), Document("short", "Who?", ())]
    documents += [Document(f"d{n}", text, ()) for n, text in enumerate(own)]
    documents.append(Document("image", "Who is it?", (5,)))
    sides = task_sides([TaskDocuments("quiz", documents)])
    said = ["Tell me: " + long.upper(), "who", f"{template} 77", "Who is it?", "Nothing"]
    rows = [{"id": s, "conversations": turns(s, "a")} for s in said]
    rows.append({"id": "answer", "conversations": turns("?", f"Well, {long}.")})
    (tmp_path / "a.json").write_text(json.dumps(rows))
    look = Look(fingerprints=Wanted(wanted_texts(sides)))
    checked = check_source(SourceConfig(train=str(tmp_path / "a.json")), look, workers=1)
    everything = np.ones(len(rows), dtype=bool)
    training, _ = divide([checked], [everything], [~everything])
    twins = compare(training, sides, bits=16)
    assert twins.texts == [{0: [(0, 0), (0, 5)], 1: [(0, 1)]}]
    assert [*twins.left_out().values()] == [
        "quiz: text of long",
        "quiz: text of short",
        "quiz: text of long",
    ]


def test_a_side_without_images_has_no_pairs(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": turns("?", "a")}]))
    look = Look(fingerprints=Wanted(wanted_texts([])))
    checked = check_source(SourceConfig(train=str(tmp_path / "a.json")), look, workers=1)
    one = np.ones(1, dtype=bool)
    training, held = divide([checked], [one], [one])
    twins = compare(training, [held, Side("empty")], bits=0)
    assert (twins.groups, twins.pairs, twins.left_out()) == ([], [[], []], {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", 4], "--bits is for --twins"),
        (["--drop", "x.json"], "--drop is for --twins"),
        (["--twins", "--against", ","], "--against names no task"),
        (["--twins", "--against", "none,scenes_vqa"], "names tasks and none"),
        (["--twins", "--against", "none", "--include", "."], "--include is for tasks"),
        (["--twins", "--sheet", "x.jpg"], "--sheet writes PNG"),
        (["--twins", "--drop", "RECIPE"], "would overwrite a file of another kind"),
    ],
)
def test_options_that_do_not_fit_are_refused(recipe, monkeypatch, capsys, words, message):
    words = [recipe if word == "RECIPE" else word for word in words]
    before = recipe.read_text()
    status, _, err = run(monkeypatch, capsys, recipe, *words)
    assert (status, recipe.read_text()) == (2, before)
    assert message in err


def test_a_missing_package_is_named_before_data_is_read(recipe, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "imagehash", None)
    status, _, err = run(monkeypatch, capsys, recipe, "--twins")
    assert status == 2
    assert err.strip().endswith("need the package ImageHash -- pip install 'mmkd[data]'")


def test_nothing_to_compare_with_is_refused(leaked, tmp_path, monkeypatch, capsys):
    words = [leaked / "train.parquet", "--twins", "--drop", tmp_path / "out.json"]
    status, _, err = run(monkeypatch, capsys, *words)
    assert status == 2
    assert "--drop lists twins of held-out records and tasks, and there are none" in err
