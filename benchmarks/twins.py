"""Perceptual hashes: how far changed copies and unrelated images are apart, and times.

    python -m benchmarks.twins --json runs/bench/twins.json

The scene images are those of `data/scenes`: `--copies` training images are changed, and each
held-out image (validation and tasks) is compared with all training images. The hashes are pHash
with 256 bits as mmkd uses it, pHash with 64 bits, and PDQ if the package pdqhash is installed. The
search for pairs is timed on hashes of training images with random bits changed.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from rich.table import Table

from benchmarks.measure import save
from mmkd.data.twins import BITS, HASH_BITS, as_array, image_hash, near_pairs, require_hash
from mmkd.runtime.progress import console, track

SCENES = Path("data/scenes")
HELD_OUT = ["validation", "eval/vqa", "eval/pope", "eval/caption", "eval/vqa_assets",
            "eval/vqa_attributes"]  # fmt: skip
Hash = Callable[[Image.Image], int]
Change = Callable[[Image.Image], Image.Image]


def images(names: Sequence[str]) -> list[Image.Image]:
    """The different images of Parquet files."""
    found: dict[bytes, None] = {}
    for name in names:
        rows = pq.read_table(SCENES / f"{name}.parquet", columns=["image"]).to_pylist()
        found |= dict.fromkeys(row["image"]["bytes"] for row in rows)
    return [Image.open(io.BytesIO(content)).convert("RGB") for content in found]


def hashes() -> dict[str, tuple[Hash, int]]:
    """Each hash, and the number of differing bits up to which images are twins."""
    imagehash = require_hash()

    def short(image: Image.Image) -> int:
        return int(str(imagehash.phash(image)), 16)

    found: dict[str, tuple[Hash, int]] = {"phash 64": (short, 4), "phash 256": (image_hash, BITS)}
    try:
        import pdqhash
    except ImportError:
        return found

    def pdq(image: Image.Image) -> int:
        return int.from_bytes(np.packbits(pdqhash.compute(np.asarray(image))[0]).tobytes())

    return {**found, "pdq 256": (pdq, 31)}


def changes() -> dict[str, Change]:
    def jpeg(quality: int) -> Change:
        def change(image: Image.Image) -> Image.Image:
            out = io.BytesIO()
            image.save(out, "JPEG", quality=quality)
            return Image.open(out).convert("RGB")

        return change

    def scale(factor: float) -> Change:
        return lambda i: i.resize((round(i.width * factor), round(i.height * factor)))

    return {
        "copy": lambda image: image.copy(),
        "JPEG, quality 75": jpeg(75),
        "JPEG, quality 30": jpeg(30),
        "scaled by 0.9": scale(0.9),
        "scaled by 4": scale(4),
        "scaled by 0.9, JPEG 75": lambda image: jpeg(75)(scale(0.9)(image)),
        "10 % brighter": lambda image: image.point(lambda level: min(255, int(level * 1.1))),
        "1 of 64 pixels cut off each edge": lambda i: i.crop((1, 1, i.width - 1, i.height - 1)),
        "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    }


def nearest(one: list[int], others: list[int]) -> list[int]:
    """For each hash, the distance of the nearest other one."""
    rows = as_array(others).view(np.uint64)
    queries = as_array(one).view(np.uint64)
    return [int(np.bitwise_count(rows ^ query).sum(axis=1).min()) for query in queries]


def measure(
    name: str, train: list[Image.Image], held_out: list[Image.Image], copies: int
) -> dict[str, Any]:
    compute, bits = hashes()[name]
    started = time.perf_counter()
    own = [compute(image) for image in track(train, name, len(train))]
    seconds = (time.perf_counter() - started) / len(train)
    far = nearest([compute(image) for image in held_out], own)
    changed = {}
    for what, change in changes().items():
        found = [
            (value ^ compute(change(image))).bit_count()
            for image, value in zip(train[:copies], own, strict=False)
        ]
        twins = sum(distance <= bits for distance in found) / len(found)
        changed[what] = {"median": float(np.median(found)), "most": max(found), "twins": twins}
    return {
        "hash": name,
        "bits": bits,
        "ms": 1000 * seconds,
        "changed": changed,
        "nearest unrelated": min(far),
        "false twins": sum(distance <= bits for distance in far) / len(far),
    }


def search_time(train: list[Image.Image], count: int) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    known = as_array([image_hash(image) for image in train[:2000]])
    chosen = known[draw.integers(0, len(known), count)]
    rows = np.unique(chosen ^ np.packbits(draw.random((count, HASH_BITS)) < 0.25, axis=1), axis=0)
    started = time.perf_counter()
    pairs = len(near_pairs(rows, BITS)[0])
    return {"images": len(rows), "pairs": pairs, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--copies", type=int, default=600)
    parser.add_argument("--search", type=int, nargs="*", default=[100_000, 665_000])
    asked = parser.parse_args()
    train, held_out = images(["train"]), images(HELD_OUT)
    found = [measure(name, train, held_out, asked.copies) for name in hashes()]
    table = Table(title=f"{len(train):,} training and {len(held_out):,} held-out images")
    table.add_column("")
    for row in found:
        table.add_column(f"{row['hash']}, {row['bits']} bits", justify="right")
    for what in changes():
        cells = [row["changed"][what] for row in found]
        table.add_row(
            what, *(f"{c['median']:.0f}, {c['most']}, {100 * c['twins']:.1f} %" for c in cells)
        )
    table.add_row("nearest unrelated image", *(str(row["nearest unrelated"]) for row in found))
    table.add_row("false twins", *(f"{100 * row['false twins']:.1f} %" for row in found))
    table.add_row("ms per image", *(f"{row['ms']:.2f}" for row in found))
    console.print(table)
    times = [search_time(train, count) for count in asked.search]
    for row in times:
        console.print(f"{row['images']:,} images: {row['seconds']:.1f} s, {row['pairs']} pairs")
    save(asked, hashes=found, search=times)


if __name__ == "__main__":
    main()
