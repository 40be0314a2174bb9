"""Data sets in the layouts of published ones: keys, types and paths as theirs, content made up."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from mmkd.data.records import Records
from mmkd.data.schema import Record
from mmkd.recipe import DataConfig

Turns = list[dict[str, str]]


def drawn(number: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """An image with a shape on it, another for each number."""
    picture = Image.new("RGB", size, (40 * number % 256, 90, 160))
    ImageDraw.Draw(picture).ellipse((4, 4, 20 + number % 9, 24), fill=(250, 200, 30))
    return picture


def encoded(number: int = 0, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    drawn(number).save(out, kind)
    return out.getvalue()


def put(root: Path, path: str, number: int = 0) -> str:
    """Draw an image at a path below a root; returns the path."""
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    drawn(number).save(root / path)
    return path


def turns(*said: str, first: str = "human") -> Turns:
    """LLaVA's turns, the two roles in alternation."""
    roles = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(said)]


def llava_pretrain(folder: Path) -> DataConfig:
    """blip_laion_cc_sbu_558k.json: a caption each, the placeholder before or behind the request."""
    images = folder / "images"
    asked = ["Give a brief description of the image.\n<image>", "<image>\nWhat is this?"]
    rows = [
        {
            "id": f"00453{i:04d}",
            "image": put(images, f"00453/00453{i:04d}.jpg", i),
            "conversations": turns(asked[i % 2], f"a yellow ball number {i} on blue"),
        }
        for i in range(4)
    ]
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(rows))
    return DataConfig(train=str(folder / "blip_laion_cc_sbu_558k.json"), images=str(images))


def llava_665k_rows(images: Path) -> list[dict[str, Any]]:
    short = "\nAnswer the question using a single word or phrase."
    return [
        {
            "id": "000000033471",
            "image": put(images, "coco/train2017/000000033471.jpg", 1),
            "conversations": turns("<image>\nWhat is yellow?", "A ball.", "And blue?", "The sky."),
        },
        {
            "id": 2354786,
            "image": put(images, "vg/VG_100K_2/2354786.jpg", 2),
            "conversations": turns("<image>\nWhere is the ball?" + short, "left"),
        },
        {
            "id": "wgByO4Y_0",
            "model": "",
            "conversations": turns("Write a word.", "Ball."),
        },
        {
            "id": "wgByO4Y_17",
            "model": "",
            "conversations": turns("... go on.", "And now?", "Now a dog.", first="gpt"),
        },
        {
            "id": "140031996X",
            "image": put(images, "ocr_vqa/images/140031996X.jpg", 3),
            "conversations": turns("<image>\nWho wrote it?" + short, "Nobody"),
        },
    ]


def llava_665k(folder: Path) -> DataConfig:
    """llava_v1_5_mix665k.json: ids of words and numbers, records without image, with a key of
    their own, or beginning with an answer."""
    images = folder / "images"
    rows = llava_665k_rows(images)
    (folder / "llava_v1_5_mix665k.json").write_text(json.dumps(rows, indent=2))
    return DataConfig(train=str(folder / "llava_v1_5_mix665k.json"), images=str(images))


def sharegpt4v(folder: Path) -> DataConfig:
    """sharegpt4v_mix665k_*.json: the same, and images (SAM) that not everybody has."""
    images = folder / "images"
    rows = [
        {
            "id": "sa_545504",
            "image": "sam/images/sa_545504.jpg",
            "conversations": turns("<image>\nWhat is this photo about?", "A ball, a large one."),
        },
        {"id": "sa_545505", "image": None, "conversations": turns("Is it so?", "Yes.")},
        *llava_665k_rows(images)[:3],
    ]
    (folder / "sharegpt4v_mix665k.json").write_text(json.dumps(rows))
    return DataConfig(
        train=str(folder / "sharegpt4v_mix665k.json"), images=str(images), on_bad_record="skip"
    )


def allava(folder: Path) -> DataConfig:
    """ALLaVA-4V: captions, instructions and text alone in files of different keys."""
    caption = {
        "id": "allava_laion_cap_100277305",
        "image": put(folder, "allava_laion/images/100277305.jpeg", 1),
        "conversations": turns("<image>\nPlease depict the image in words.", "A ball, yellow."),
        "original_caption": "ball shop [new]",
        "url": "https://example.org/ball.jpg",
    }
    instruct = {
        "id": "allava_vflan_inst_7",
        "image": put(folder, "allava_vflan/images/images_191task_1k/ball-5.png", 2),
        "conversations": turns("<image>\nHow large is it?", "Small.", "And then?", "Gone."),
    }
    evolved = {"id": 5, "conversations": turns("Name a colour.", "Blue.")}
    (folder / "texts").mkdir()
    for name, row in {"1-Caption": caption, "2-Instruct": instruct, "3-Evol": evolved}.items():
        (folder / "texts" / f"{name}.json").write_text(json.dumps([row]))
    return DataConfig(train=str(folder / "texts" / "*.json"), images=str(folder))


def rlaif_rows() -> list[dict[str, Any]]:
    return [
        {
            "ds_name": "RLAIF-V",
            "image": {"bytes": encoded(i, "JPEG"), "path": f"{i}.jpg"},
            "question": "What is on the picture?",
            "chosen": f"A ball, number {i}.",
            "rejected": "A ball and a cat.",
            "origin_dataset": "LCS-558K",
            "origin_split": '{"model": "x", "type": "detailed description"}',
            "idx": f"{20 + i}",
            "image_path": f"llava/{i}.jpg",
        }
        for i in range(5)
    ]


def rlaif_v(folder: Path) -> DataConfig:
    """RLAIF-V-Dataset_000.parquet and so on: pairs with their images."""
    rows = rlaif_rows()
    for number, some in enumerate((rows[:3], rows[3:])):
        table = pa.Table.from_pylist(some)
        pq.write_table(table, folder / f"RLAIF-V-Dataset_00{number}.parquet")
    return DataConfig(train=str(folder))


LAYOUTS = {f.__name__: f for f in (llava_pretrain, llava_665k, sharegpt4v, allava, rlaif_v)}


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of plain files, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(number: int) -> dict[str, bytes]:
    """A sample of a webdataset shard: image and record."""
    said = turns("<image>\nWhich one?", f"ball {number}")
    record = {"id": f"s{number}", "image": "../../not/looked/up.jpg", "conversations": said}
    return {
        f"part/{number:04d}.png": encoded(number),
        f"part/{number:04d}.json": json.dumps(record).encode(),
    }


def write_numbers(path: Path, numbers: Iterable[Any]) -> None:
    """Records without images, as a list or one a line."""
    rows = [{"id": f"r{n}", "conversations": turns("?", f"answer {n}")} for n in numbers]
    path.write_text(
        "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    )


def words(record: Record) -> list[str]:
    """What each message says."""
    return ["".join(p.get("text", "<image>") for p in m["content"]) for m in record.messages]


def read(train: Path | str) -> Records:
    """The records of one source."""
    return Records(DataConfig(train=str(train)))
