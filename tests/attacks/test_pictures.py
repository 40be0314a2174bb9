"""All images are opened by one module, with limits on formats, sizes and folders."""

import ast
import io
import json
import shutil
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmkd.data.check import Look, check_source
from mmkd.data.images import LONGEST_SIDE, load_image
from mmkd.data.scenes.show import contact_sheet
from mmkd.errors import DataError
from mmkd.evaluation.pictures import UnreadablePicture, allow, find_picture, guarded
from mmkd.evaluation.run import evaluate
from mmkd.evaluation.samples import find_questions
from mmkd.making.local import LocalMaker
from mmkd.making.make import make_records
from mmkd.modeling.loading import load_processor
from mmkd.recipe import ModelConfig, SamplesConfig, SourceConfig, load_make
from mmkd.report.samples import _data_uri
from tests.support.drawn_pictures import png
from tests.support.places import ROOT

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
%%EndComments
(ran) (w) file closefile
showpage
%%EOF
"""


def saved(kind):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, kind)
    return out.getvalue()


CONTENT = {
    "eps": EPS,
    "eps in a dos header": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(EPS)) + bytes(18) + EPS,
    "ppm": saved("PPM"),
    "ico": saved("ICO"),
    "pcx": saved("PCX"),
    "tga": saved("TGA"),
    "a bomb": png(60_000, 60_000),
    "one long row": png(80_000_000, 1),
    "one long column": png(1, 1_000_000),
    "just too long": png(LONGEST_SIDE + 1, 1),
    "cut": saved("PNG")[:40],
    "empty": b"",
    "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The folder of the data, with a secret image beside it and a link that leads there."""
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
    Image.new("RGB", (8, 8), "red").save(data / "good.png")
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    return data


def outside(data):
    """Paths that must not be read."""
    secret = data.parent / "secret.png"
    return [
        str(secret),
        "../secret.png",
        "x/../../secret.png",
        "link.png",
        "folder.png",
        "http://127.0.0.1:9/a.png",
        "https://127.0.0.1:9/a.png",
        "HTTP://127.0.0.1:9/a.png",
        f"file://{secret}",
        f"zip://a.png::{secret}",
        "hf://datasets/a/b/c.png",
        "s3://bucket/a.png",
        "/proc/self/environ",
        "/dev/zero",
        "a\0b.png",
        "secret.png\n",
        "~/secret.png",
        "",
    ]


def document(value):
    """A document's image as lmms-eval gets it."""
    import datasets

    picture = datasets.Image().decode_example(value)
    picture.load()
    return picture


def opened(value):
    """What tasks' own functions do."""
    source = io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
    return Image.open(source).convert("RGB")


@pytest.mark.parametrize("name", CONTENT)
def test_no_door_decodes_what_training_refuses(name, places, capfd):
    content = CONTENT[name]
    value = {"bytes": content, "path": "a.png"}
    (places / "bad.png").write_bytes(content)
    record = {"id": "1", "image": "bad.png", "conversations": turns()}
    (places / "a.json").write_text(json.dumps([record]))
    doors = {
        "training": lambda: load_image("bad.png", places),
        "bytes": lambda: load_image(value, None),
        "report": lambda: _data_uri(value, places),
        "samples of records": lambda: find_questions(
            SamplesConfig(records=str(places / "a.json"), count=1)
        ),
        "samples of images": lambda: find_questions(
            SamplesConfig(images=[str(places / "bad.png")], prompts=["?"])
        ),
        "document": lambda: document(value),
        "document by path": lambda: document({"bytes": None, "path": "bad.png"}),
        "task": lambda: opened(value),
    }
    with guarded():
        allow(places)
        for door, use in doors.items():
            with pytest.raises((DataError, OSError)) as refused:
                use()
            assert refused.type is DataError or door == "task"
            assert "\n" not in str(refused.value)
    found = check_source(SourceConfig(train=str(places / "a.json")), Look(decode=True), 1)
    assert found.bad == 1
    assert not Path("ran").exists()
    assert capfd.readouterr().err == ""


def turns():
    return [{"from": "human", "value": "<image>\n?"}, {"from": "gpt", "value": "a"}]


def test_no_document_names_a_file_outside_of_its_folder(places):
    with guarded():
        allow(places)
        assert document({"bytes": None, "path": "good.png"}).getpixel((0, 0))[:3] == (255, 0, 0)
        assert opened({"bytes": None, "path": str(places / "good.png")}).size == (8, 8)
        for path in outside(places):
            for use in (document, opened):
                with pytest.raises((DataError, ValueError)):
                    use({"bytes": None, "path": path})
            with pytest.raises(DataError):
                find_picture(path)
            with pytest.raises(DataError):
                _data_uri({"bytes": None, "path": path}, places)
    with pytest.raises(DataError, match="format EPS"):
        load_image(Image.open(io.BytesIO(EPS)), None)  # opened by others, not decoded yet


def test_hostile_documents_count_as_wrong_and_tell_nothing(
    scenes_dir, tiny_model_dir, tmp_path, datasets_cache, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for name in ("tasks", "eval"):
        shutil.copytree(scenes_dir / name, tmp_path / "scenes" / name)
    Image.new("RGB", (8, 8), "blue").save("secret.png")
    path = tmp_path / "scenes" / "eval" / "pope.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    hostile = [
        {"bytes": EPS, "path": None},
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": "../../secret.png"},
        {"bytes": None, "path": "http://127.0.0.1:9/a.png"},
        {"bytes": png(80_000_000, 1), "path": None},
    ]
    for row, image in zip(rows, hostile, strict=False):
        row["image"] = image
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    out = tmp_path / "out"
    evaluate(
        tiny_model_dir,
        tasks=["scenes_pope"],
        include_path=tmp_path / "scenes" / "tasks",
        out=out,
        batch_size=4,
        limit=8,
    )
    written = json.loads((out / "results.json").read_text())
    assert written["unanswered"]["scenes_pope"]["documents"] == len(hostile)
    lines = (out / "samples" / "scenes_pope.jsonl").read_text().splitlines()
    said = [json.loads(line).get("unanswered", "") for line in lines]
    for reason, part in zip(
        said, ("cannot identify", "outside", "outside", "web", "large"), strict=False
    ):
        assert part in reason
    assert not any(said[len(hostile) :])
    assert not Path("ran").exists()


def test_a_contact_sheet_opens_no_other_format(scenes_dir, tmp_path):
    table = pq.read_table(scenes_dir / "train.parquet")
    rows = table.to_pylist()[:3]
    rows[1]["image"] = {"bytes": EPS, "path": None}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="not a readable image"):
        contact_sheet(tmp_path)


def test_limits_that_tasks_set_end_with_the_evaluation():
    before = Image.open, Image.MAX_IMAGE_PIXELS
    with guarded():
        Image.MAX_IMAGE_PIXELS = None
        with pytest.raises(DataError, match="too large"):
            load_image({"bytes": png(60_000, 60_000)}, None)
    assert (Image.open, Image.MAX_IMAGE_PIXELS) == before
    with guarded():
        Image.MAX_IMAGE_PIXELS = before[1]
    assert isinstance(UnreadablePicture("x"), Image.Image)


def test_own_photos_leave_out_what_is_hostile(places, tmp_path, tiny_model_dir):
    """`make` asks about a folder of a user's images."""
    for number, content in enumerate(CONTENT.values()):
        (places / f"bad{number}.png").write_bytes(content)
    out = tmp_path / "made.jsonl"
    settings = {"pictures": str(places), "prompts": ["What?"], "out": str(out),
                "sampling": {"max_new_tokens": 8}, "by": "model"}  # fmt: skip
    source = ModelConfig(model=str(tiny_model_dir))
    maker = LocalMaker("model", source, 4, torch.device("cpu"))
    made = make_records(
        load_make(settings, "make"), {"model": maker}, "make", load_processor(source)
    )
    assert [json.loads(line)["images"] for line in out.read_text().splitlines()] == [["good.png"]]
    assert made.answers == 1
    said = " ".join(made.asked.unreadable.values())
    assert "outside" in said
    assert "is not a readable image" in said


def test_nothing_else_opens_pictures():
    """`mmkd.data.images` is the door; sprites come with a package of mmkd's own."""
    known = {"mmkd/data/images.py", "mmkd/data/scenes/render.py", "mmkd/evaluation/pictures.py"}
    found = set()
    for folder in ("mmkd", "models", "examples", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                named = isinstance(node, ast.Attribute) and node.attr == "open"
                if named and ast.unparse(node.value) in ("Image", "PIL.Image", "PILImage"):
                    found.add(str(path.relative_to(ROOT)))
    assert found <= known
