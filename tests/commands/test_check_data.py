"""`mmkd data check` counts and names each problem, and reports no good records."""

import json
import os
import sys

import pytest
import yaml
from rich.console import Console

from mmkd.cli import main
from mmkd.commands import check_data
from mmkd.data import check, images
from mmkd.data.check import Look, check_source
from mmkd.errors import DataError
from mmkd.recipe import SourceConfig
from tests.support.layouts import LAYOUTS, encoded, put, sample, turns, write_tar
from tests.support.recipes import tiny_recipe

ASKED = turns("<image>\nWhat is it?", "a ball")


def run(monkeypatch, capsys, *words):
    """Exit status, and what is printed on both streams."""
    monkeypatch.setattr(check_data, "console", Console(width=120))
    monkeypatch.setattr(sys, "argv", ["mmkd", "data", "check", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def found(monkeypatch, capsys, *words):
    """Exit status and the findings."""
    status, out, err = run(monkeypatch, capsys, *words, "--json")
    assert out, err
    return status, json.loads(out)


@pytest.fixture
def folder(tmp_path):
    """Records of every kind of problem, and images."""
    put(tmp_path / "images", "good.png")
    (tmp_path / "secret.png").write_bytes(encoded())
    (tmp_path / "images" / "text.png").write_bytes(b"no image")
    (tmp_path / "images" / "cut.png").write_bytes(encoded(1)[:-30])
    (tmp_path / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    answered = turns("<image>?", "a", "And?", " ")
    rows = {
        "good": {"image": "good.png", "conversations": ASKED},
        "text": {"conversations": turns("?", "yes")},
        "gone": {"image": "gone.png", "conversations": ASKED},
        "gone too": {"image": "gone.png", "conversations": ASKED},
        "outside": {"image": "../secret.png", "conversations": ASKED},
        "[red]linked[/red]": {"image": "link.png", "conversations": ASKED},
        "no image": {"image": "text.png", "conversations": ASKED},
        "cut": {"image": "cut.png", "conversations": ASKED},
        "two": {"images": ["good.png"] * 2, "conversations": ASKED},
        "silent": {"image": "good.png", "conversations": ASKED[:1]},
        "half silent": {"image": "good.png", "conversations": answered},
        "robot": {"conversations": [{"from": "robot", "value": "beep"}]},
        "both": {"images": ["gone.png", "text.png"], "conversations": turns("<image><image>?", "")},
        "both too": {"images": ["gone.png", "text.png", "gone.png"],
                     "conversations": turns("<image><image><image>?", "a")},
        "box": {"conversations": turns("?", "a"),
                "objects": [{"name": "ball", "box": [0, 0, float("nan"), 1]}]},
    }  # fmt: skip
    lines = [json.dumps({"id": name, **row}) for name, row in rows.items()]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"id": "broken']))
    return tmp_path


COUNTS = {
    "no such image": 3,
    "image outside of its folder": 2,
    "image not readable": 2,
    "no response of the assistant": 2,
    "numbers of placeholders and images differ": 1,
    "an answer is empty": 1,
    "unknown role": 1,
    "an object's box is not valid": 1,
    "a record is not a JSON object": 1,
}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_problem_is_counted_and_placed(folder, monkeypatch, capsys, workers):
    monkeypatch.setattr(check, "CHUNK", 5)
    words = (folder / "a.jsonl", "--images", folder / "images", "--workers", workers)
    status, said = found(monkeypatch, capsys, *words)
    assert (status, said["good"], said["records"], said["bad"]) == (1, False, 16, 13)
    problems = {p["kind"]: p for p in said["sources"][0]["problems"]}
    assert {kind: p["records"] for kind, p in problems.items()} == COUNTS
    assert problems["no such image"]["share"] == 3 / 16
    assert problems["no such image"]["hint"] == "check data.images"
    places = problems["no such image"]["places"]
    assert places[0] == f"{folder}/a.jsonl: record 2 (id gone): no such image: gone.png"
    assert [p.split("(id ")[1].split(")")[0] for p in places] == ["gone", "gone too", "both too"]
    status, table, _ = run(monkeypatch, capsys, *words)
    assert status == 1
    assert "16 records, 11 images" in table
    assert "13 bad (81.25 %)" in table
    assert "(id [red]linked[/red]): link.png is outside of" in table
    for kind, count in COUNTS.items():
        assert any(kind in line and f" {count} " in line for line in table.splitlines()), kind


def test_decoding_finds_pictures_that_end_too_early(folder, monkeypatch, capsys):
    words = (folder / "a.jsonl", "--images", folder / "images", "--workers", 1, "--decode")
    _, said = found(monkeypatch, capsys, *words)
    broken = next(p for p in said["sources"][0]["problems"] if p["kind"] == "image not readable")
    assert broken["records"] == 3
    assert any("cut.png" in place for place in broken["places"])


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "sharegpt4v"])
def test_published_layouts_are_all_good(tmp_path, monkeypatch, capsys, layout):
    config = LAYOUTS[layout](tmp_path)
    where = ("--images", config.images) if config.images else ()
    status, out, _ = run(monkeypatch, capsys, config.train, *where, "--workers", 1, "--decode")
    assert status == 0
    assert "all good" in out
    assert "problem" not in out


def test_shards_and_bombs_are_looked_at(tmp_path, monkeypatch, capsys):
    path = write_tar(tmp_path / "a.tar", {k: v for n in range(4) for k, v in sample(n).items()})
    write_tar(tmp_path / "b.tar", sample(5))
    status, said = found(monkeypatch, capsys, tmp_path / "*.tar", "--workers", 1)
    assert (status, said["records"], said["pictures"]) == (0, 5, 5)
    monkeypatch.setattr(images.Image, "MAX_IMAGE_PIXELS", 48 * 32 - 1)
    status, said = found(monkeypatch, capsys, path, "--workers", 1)
    assert (status, said["bad"]) == (1, 4)
    [problem] = said["sources"][0]["problems"]
    assert problem["kind"] == "image too large"
    place = "a.tar: record 0 (id s0): part/0000.png is too large to decode"
    assert problem["places"][0].endswith(place)


def test_ids_that_come_twice_are_told_where_asked_for(tmp_path, monkeypatch, capsys):
    rows = [{"id": name, "conversations": turns("?", "a")} for name in (1, 2, "1", 1)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert found(monkeypatch, capsys, tmp_path / "a.json")[0] == 0
    status, said = found(monkeypatch, capsys, tmp_path / "a.json", "--unique-ids")
    assert (status, said["bad"]) == (1, 2)
    first = said["sources"][0]["problems"][0]["places"][0]
    assert first == f"{tmp_path}/a.json: record 2 (id 1): record 0 has the same id"
    rows = [{"id": name, "conversations": turns("?", "a")} for name in (0, 1, 0, "x" * 300, 4)]
    rows += [{"id": "x" * 299 + "y", "conversations": turns("?", "a")}, rows[0] | {"id": None}]
    (tmp_path / "b.json").write_text(json.dumps(rows))
    status, said = found(monkeypatch, capsys, tmp_path / "b.json", "--unique-ids")
    [problem] = said["sources"][0]["problems"]
    assert problem["places"] == [f"{tmp_path}/b.json: record 2 (id 0): record 0 has the same id"]


def test_a_source_that_cannot_be_read_hides_no_other(
    scenes_dir, tiny_model_dir, folder, monkeypatch, capsys
):
    sources = [
        {"train": str(folder / "a.jsonl"), "images": str(folder / "images")},
        {"train": str(folder / "none-*.tar")},
        {"train": str(scenes_dir / "train.parquet")},
    ]
    raw = tiny_recipe(scenes_dir, tiny_model_dir, folder, data={"sources": sources})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    status, said = found(monkeypatch, capsys, folder / "recipe.yaml", "--workers", 1)
    assert (status, said["good"], [s["bad"] for s in said["sources"]]) == (2, False, [13, 0])
    assert len(said["unreadable"]) == 1
    assert said["unreadable"][0].startswith(f"{folder}/none-*.tar: no such data file")
    status, out, _ = run(monkeypatch, capsys, folder / "recipe.yaml", "--workers", 1)
    assert status == 2
    assert "no such data file" in out
    assert "13 bad (16.25 %); 1 of the sources cannot be read" in out


def test_a_recipe_has_each_of_its_sources_looked_at_once(
    scenes_dir, tiny_model_dir, folder, monkeypatch, capsys
):
    train = {"train": str(scenes_dir / "train.parquet")}
    bad = {"train": str(folder / "a.jsonl"), "images": str(folder / "images")}
    raw = tiny_recipe(scenes_dir, tiny_model_dir, folder, data={**train, "max_length": 90})
    first = raw["stages"][0]
    mixed = {"sources": [{**train, "weight": 1}, {**bad, "weight": 1}]}
    raw["stages"] += [{**first, "name": "same"}, {**first, "name": "mixed", "data": mixed}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    status, said = found(monkeypatch, capsys, folder / "recipe.yaml", "--workers", 1)
    assert [s["name"] for s in said["sources"]] == ["train", "a"]
    assert (status, [s["bad"] for s in said["sources"]]) == (1, [0, 13])
    one, both = said["tokens"]
    assert (one["sampled"], one["max_length"], both["data"]) == (64, 90, "train, a")
    assert one["median"] <= one["95 %"] <= one["longest"]
    assert one["cut"] > 0
    assert both["sampled"] < 80  # the bad ones are passed over
    _, out, _ = run(monkeypatch, capsys, folder / "recipe.yaml", "--workers", 1)
    assert f"of 64 records the median has {one['median']} tokens" in out
    status, _, err = run(monkeypatch, capsys, folder / "recipe.yaml", "--images", folder)
    assert status == 2
    assert "--images is for a file" in err


def test_what_cannot_be_read_at_all_has_status_2(tmp_path, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, tmp_path / "none.json")
    assert status == 2
    assert err.strip() == f"mmkd: {tmp_path}/none.json: no such data file -- check data.train"


def test_a_process_that_dies_is_told(folder, monkeypatch):
    monkeypatch.setattr(check, "CHUNK", 5)
    monkeypatch.setattr(check, "image_size", lambda *_: os._exit(1))
    source = SourceConfig(train=str(folder / "a.jsonl"), images=str(folder / "images"))
    with pytest.raises(DataError, match="a process that checked it died"):
        check_source(source, Look(), workers=2)
