"""Making data: answers a second of `mmkd data answers`, and of the same model in `generate` calls.

    python -m benchmarks.making --json runs/bench/making.json

The shipped scene teacher answers a prompt about scene images, greedily. `one by one` and `batched`
are plain calls of its processor and `generate`, with the images read from their files, on batches
of 1 and of the maker's size. `make` reads, hashes, asks, stores, checks and writes. Everything runs
in one process, in turns. `checks and files` is the share of `make` outside of the maker.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.table import Table

from benchmarks.measure import save
from mmkd.making.local import LocalMaker
from mmkd.making.make import make_records
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import ModelConfig, load_make
from mmkd.runtime.progress import console

TEACHER = ModelConfig(model="assets/scenes_teacher")
PROMPT = "Describe the picture."
MOST = 64
"""Tokens of an answer."""


def write_images(train: Path, folder: Path, count: int) -> list[Path]:
    """Write the first images of a data set as files."""
    rows = pq.read_table(train, columns=["image"]).slice(0, count).to_pylist()
    paths = [folder / f"{number:04d}.png" for number in range(len(rows))]
    for path, row in zip(paths, rows, strict=True):
        path.write_bytes(row["image"]["bytes"])
    return paths


def plain(model: Any, processor: Any, paths: list[Path], size: int) -> int:
    """Answers in plain calls of transformers; returns their number."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
    text = processor.apply_chat_template([turn], add_generation_prompt=True)
    answers: list[str] = []
    for first in range(0, len(paths), size):
        part = paths[first : first + size]
        images = [Image.open(path).convert("RGB") for path in part]
        inputs = processor(
            text=[text] * len(part), images=images, return_tensors="pt", padding=True,
            padding_side="left",
        )  # fmt: skip
        with torch.no_grad():
            found = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)
        rows = found[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(rows, skip_special_tokens=True)
    return len(answers)


class Timed(LocalMaker):
    """A maker that adds up the seconds of its model."""

    seconds = 0.0

    def _sample(self, *given: Any) -> Any:
        start = time.perf_counter()
        found = super()._sample(*given)
        self.seconds += time.perf_counter() - start
        return found

    def release(self) -> None:
        """Keep the model for the next turn."""


def made(maker: Timed, processor: Any, folder: Path, turn: int) -> None:
    """Make records of all images."""
    out = folder.parent / f"made{turn}.jsonl"
    config = load_make(
        {
            "pictures": str(folder),
            "prompts": [PROMPT],
            "sampling": {"max_new_tokens": MOST},
            "checks": ["empty", "cut", {"kind": "repeats", "ngram": 4, "most": 3}],
            "out": str(out),
        },
        "make",
    )
    make_records(config, {"teacher": maker}, "make", processor)


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(train: Path, count: int, size: int, turns: int) -> dict[str, Any]:
    """Medians of answers a second, and the share of `make` outside of the model."""
    model: Any = load_model(TEACHER)
    processor = load_processor(TEACHER)
    maker = Timed("teacher", TEACHER, size, torch.device("cpu"))
    rates: dict[str, list[float]] = {"one by one": [], "batched": [], "make": []}
    outside = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "images"
        folder.mkdir()
        paths = write_images(train, folder, count)
        with mock.patch("mmkd.making.local.load_model", return_value=model):
            maker._load()
        for turn in range(turns):
            rates["one by one"].append(count / timed(lambda: plain(model, processor, paths, 1)))
            rates["batched"].append(count / timed(lambda: plain(model, processor, paths, size)))
            maker.seconds = 0.0
            whole = timed(lambda turn=turn: made(maker, processor, folder, turn))  # type: ignore[misc]
            rates["make"].append(count / whole)
            outside.append(1 - maker.seconds / whole)
    return {
        "images": count,
        "batch": size,
        "answers_per_second": {k: statistics.median(v) for k, v in rates.items()},
        "make_over_batched": statistics.median(
            m / b for m, b in zip(rates["make"], rates["batched"], strict=True)
        ),
        "checks_and_files": statistics.median(outside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", default="data/scenes/train.parquet")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = measure(Path(given.train), given.images, given.batch, given.turns)
    table = Table(title=f"{found['images']} images, batches of {found['batch']}")
    table.add_column("")
    table.add_column("answers/s", justify="right")
    for name, rate in found["answers_per_second"].items():
        table.add_row(name, f"{rate:.1f}")
    console.print(table)
    console.print(
        f"make: {found['make_over_batched']:.2f} times the answers of batched; "
        f"{found['checks_and_files']:.1%} of its time is outside of the model"
    )
    save(given, making=found)


if __name__ == "__main__":
    main()
