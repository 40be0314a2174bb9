"""Near-duplicates of images, among each other and of held-out images, are not asked about."""

import io
import json
import os
import random
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from mmkd.errors import MmkdError
from mmkd.making import against, image_hashes
from mmkd.making.against import Side
from mmkd.making.make import make_answers
from mmkd.making.near_duplicates import kept_places
from mmkd.making.show import print_made
from mmkd.making.state import is_made
from mmkd.recipe import load_recipe
from mmkd.runs.members import members
from tests.support import warm
from tests.support.slow import slow

CPU = torch.device("cpu")
SAMPLING = {"n": 1, "temperature": 0.0, "max_new_tokens": 4}


def similar(content, kind="JPEG"):
    """The file of a slightly smaller, compressed image."""
    image, out = Image.open(io.BytesIO(content)).convert("RGB"), io.BytesIO()
    image.resize((image.width - 4, image.height - 4)).save(out, kind, quality=95)
    return out.getvalue()


@pytest.fixture(scope="module")
def album(scenes_dir, tmp_path_factory):
    """Twelve images: a to d, twins of a, b and d, twins of a held-out image and of two of a task,
    text and a file that is no image."""
    folder = tmp_path_factory.mktemp("album")
    photos, held = folder / "photos", folder / "held"
    (photos / "below").mkdir(parents=True)
    held.mkdir()
    rows = pq.read_table(scenes_dir / "train.parquet").slice(0, 5).to_pylist()
    own = [row["image"]["bytes"] for row in rows]
    for name, content in zip("abcd", own, strict=False):
        (photos / f"{name}.png").write_bytes(content)
    (photos / "a2.jpg").write_bytes(similar(own[0]))
    (photos / "z.png").write_bytes(own[1])
    (photos / "below" / "d.webp").write_bytes(similar(own[3], "WEBP"))
    (held / "held.png").write_bytes(own[4])
    (photos / "h.jpg").write_bytes(similar(own[4]))
    pope = pq.read_table(scenes_dir / "eval" / "pope.parquet").to_pylist()
    shown = list(dict.fromkeys(row["image"]["bytes"] for row in pope))
    (photos / "p.jpg").write_bytes(similar(shown[0]))
    (photos / "q.png").write_bytes(shown[1])
    (photos / "bad.png").write_bytes(b"no image")
    return folder


LEFT = ["a.png", "b.png", "below/d.webp", "c.png"]


@pytest.fixture
def entry(album, recipe, scenes_dir):
    """Writes a recipe that leaves near-duplicates out."""

    def write(**changes):
        task = {"evaluate": {"tasks": [], "decode": [8], "include": str(scenes_dir / "tasks")}}
        settings = {
            "pictures": str(album / "photos"), "sampling": SAMPLING, "checks": [], "twins": 16,
            "against": ["scenes_pope", str(album / "held")], "top": task,
        }  # fmt: skip
        return recipe(**{**settings, **changes})

    return write


def make(path, *overrides):
    return make_answers(load_recipe(path, list(overrides)), "photos", CPU)


def names(rows):
    return list(dict.fromkeys(row["images"][0] for row in rows()))


def test_what_is_not_asked(entry, rows, album, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("mmkd.making.show.say", lines.append)
    made = make(entry())
    print_made(made)
    assert names(rows) == LEFT  # sorted by name, so below/d.webp comes before d.png
    assert made.left_out.twins == 3
    assert made.left_out.against == {"scenes_pope": 2, str(album / "held"): 1}
    assert "  3 images are near-duplicates of others, 2 of images of scenes_pope, 1 of" in lines[1]
    assert (made.questions, made.answers) == (10, 8)  # bad.png is asked about, and is unreadable
    assert any("bad.png is not a readable image" in line for line in lines)
    whole = (tmp_path / "made.jsonl").read_bytes()

    def again(*given, **settings):
        raise AssertionError("an image was hashed again")

    monkeypatch.setattr(image_hashes, "image_hash", again)
    monkeypatch.setattr(against, "read_documents", again)
    second = make(entry())
    assert (second.left_out, second.asked.answers) == (made.left_out, 0)
    assert (tmp_path / "made.jsonl").read_bytes() == whole


def test_processes_batches_and_the_file_system_change_nothing(entry, tmp_path, monkeypatch):
    path = entry()
    make(path)
    whole = (tmp_path / "made.jsonl").read_bytes()
    out = tmp_path / "two.jsonl"
    words = ("data", "answers", path, f"make.photos.out={out}", "--nproc", "2")
    command = warm.Command(*words)
    text, _ = command.communicate(timeout=120)
    assert command.returncode == 0, text
    assert out.read_bytes() == whole
    assert "2 of images of scenes_pope" in text
    hashes = sorted((tmp_path / "two.jsonl.answers").glob("hashes-*.jsonl"))
    counts = [len(file.read_text().splitlines()) for file in hashes]
    assert (len(counts), sum(counts)) == (2, 10)  # b.png and z.png are the same file
    listed = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, name: reversed([*listed(self, name)]))
    out = tmp_path / "other.jsonl"
    make(path, f"make.photos.out={out}", "make.photos.batch_size=1")
    assert out.read_bytes() == whole


@pytest.mark.parametrize("processes", [1, slow(2)])
def test_a_task_that_is_not_there(entry, processes):
    path = entry(against=["scenes_popes"])
    command = warm.Command("data", "answers", path, "--nproc", processes)
    text, _ = command.communicate(timeout=120)
    assert command.returncode != 0
    assert "unknown task 'scenes_popes' -- did you mean scenes_pope" in text
    assert "Traceback" not in text


def test_refusals(entry, album, tmp_path, monkeypatch):
    with pytest.raises(MmkdError, match="no image is left: 1 image is a near-duplicate of"):
        make(entry(pictures=str(album / "held"), against=[str(album / "held")]))
    empty = tmp_path / "held.jsonl"
    empty.write_text(json.dumps({"messages": [{"role": "user", "content": "What?"}]}))
    with pytest.raises(MmkdError, match="can be compared, the first: no record has any"):
        make(entry(against=[str(empty)]))
    with pytest.raises(MmkdError, match="no such data file"):
        make(entry(against=["gone/held.jsonl"]))
    log = tmp_path / "made.jsonl.answers" / "hashes-00000.jsonl"
    make(entry(against=[]))
    log.write_text('{"image": "a", "hash": "b"}\n')
    with pytest.raises(MmkdError, match=r"hashes-00000.jsonl: line 1: it is not a hash of an im"):
        make(entry())
    monkeypatch.setitem(sys.modules, "imagehash", None)
    with pytest.raises(MmkdError, match="twins of images need the package ImageHash"):
        make(entry(against=[]))
    monkeypatch.setattr(against, "read_documents", None)  # not needed
    assert make(entry(twins=None, against=[])).left_out.twins == 0


def test_records_with_questions_of_their_own(entry, rows, album, tmp_path):
    """The same image with another question is another record."""
    asked = [("a.png", "What?"), ("a2.jpg", "what"), ("a2.jpg", "Where?"), ("h.jpg", "What?"),
             ("b.png", "What?"), ("z.png", "What?"), ("b.png", "Who?")]  # fmt: skip
    records = [
        {"id": str(n), "images": [image],
         "messages": [{"role": "user", "content": f"<image>{text}"}]}
        for n, (image, text) in enumerate(asked)
    ]  # fmt: skip
    both = {"images": ["a.png", "b.png"],
            "messages": [{"role": "user", "content": "<image><image>What?"}]}  # fmt: skip
    records += [both, both]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    source = {"pictures": None, "records": str(tmp_path / "r.jsonl"),
              "images": str(album / "photos"), "against": [str(album / "held")]}  # fmt: skip
    made = make(entry(**source, prompts=None))
    assert [row["id"] for row in rows()] == ["0", "2", "4", "6", "7"]
    assert (made.left_out.twins, [*made.left_out.against.values()]) == (3, [1])
    made = make(entry(**source))  # the same prompts about all images
    assert names(rows) == ["a.png", "b.png"]
    assert made.left_out.twins == 5
    # lists of objects are asked for once for each image
    ask = {"ask": ["Where is the {name}?"], "least_images": 1, "names": ["cat"]}
    made = make(entry(**source, prompts=None, objects=ask))
    assert made.asked.answers == 3


def test_what_the_file_depends_on(entry, album, scenes_dir, tmp_path):
    path = entry()
    make(path)
    assert is_made(load_recipe(path), "photos")
    for override in ("twins=15", "twins=null", "against=[scenes_pope]", "against=[]"):
        assert not is_made(load_recipe(path, [f"make.photos.{override}"]), "photos")
    for file in (album / "held" / "held.png", scenes_dir / "eval" / "pope.parquet"):
        status = file.stat()
        os.utime(file, (1, 1))
        assert not is_made(load_recipe(path), "photos")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert is_made(load_recipe(path), "photos")


def test_a_definition():
    """Against the definition, on chains of near-duplicates."""
    chance = random.Random(0)

    def near(a, b):
        return (a ^ b).bit_count() <= 9

    base = [chance.getrandbits(256) for _ in range(6)]
    values = [
        (chance.choice(base) if chance.random() < 0.9 else chance.getrandbits(256))
        ^ sum(1 << n for n in chance.sample(range(24), chance.randrange(9)))
        for _ in range(300)
    ]
    shown = [tuple(values[n : n + chance.randrange(3)]) for n in range(0, 300, 2)]
    held = Side("held", frozenset(v ^ 0b111 for v in base[:1]))
    kept, twice, leaked = [], 0, 0
    for place, own in enumerate(shown):
        if any(near(a, b) for a in own for b in held.hashes):
            leaked += 1
        elif own and any(len(own) == len(shown[k]) and all(map(near, own, shown[k])) for k in kept):
            twice += 1
        else:
            kept.append(place)
    found, left = kept_places(shown, [held], 9)
    assert min(twice, leaked) > 10
    assert (found, left.twins, left.against) == (kept, twice, {"held": leaked})
    part, _ = kept_places(shown[:100], [held], 9)
    assert part == [place for place in kept if place < 100]
    every, left = kept_places(shown, [held], 9, twins=False)
    assert (len(every), left.twins) == (len(shown) - leaked, 0)


@pytest.mark.parametrize("first", ["run", "answers"])
def test_a_run_finds_tasks_where_its_evaluation_does(entry, scenes_dir, tmp_path, first):
    """Also of its variants; and records that `mmkd data answers` has made are not made again."""
    path = entry(against=["scenes_pope"])
    raw = yaml.safe_load(path.read_text())
    raw["evaluate"] = {"tasks": ["scenes_pope"], "limit": 2, "include": str(scenes_dir / "tasks")}
    raw["variants"] = {"slow": ["stages.0.optimizer.lr=1e-4"]}
    raw["stages"][0]["objectives"] = [{"kind": "ce"}]
    path.write_text(yaml.safe_dump(raw))
    if first == "answers":
        make(path)
    command = warm.Command("run", path, "evaluate.tasks=[]", "evaluate.decode=[8]")
    text, _ = command.communicate(timeout=200)
    assert command.returncode == 0, text
    assert ("2 images are near-duplicates" in text or "2 of images of" in text) is (first == "run")
    recipe = load_recipe(path)
    assert all(is_made(member.recipe, "photos") for member in members(recipe))
    # Another evaluation does not change what a student is trained on.
    command = warm.Command("run", path, "evaluate.tasks=[]", "evaluate.decode=[16]")
    text, _ = command.communicate(timeout=200)
    assert command.returncode == 0, text
    assert text.count("already trained") == 2
