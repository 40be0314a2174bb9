"""Planning of steps: the time that one process of many takes to cut a global batch.

    python -m benchmarks.planning --json runs/bench/planning.json

Each process trains on 16 records of a step, in micro-batches of alike length, for which it needs
the lengths of all records of the step. The first process is timed; the others' lengths are found
before and reach it as bytes that it unpickles. `cold`: no length is known. `warm`: all are, as from
the second epoch on. `waits`: cold, with worker processes, how long training waits for the plan of
a step on average, the first one too, if training takes `--training` seconds a step. Records are
LLaVA-like conversations of 1 to 6 questions with a photo of 640 x 480; they are not encoded.
"""

import argparse
import json
import pickle
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from PIL import Image
from rich.table import Table

from benchmarks.measure import save
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.data.stream import BatchStream
from mmkd.modeling.loading import load_pretrained_processor
from mmkd.recipe import BatchConfig, DataConfig
from mmkd.runtime import distributed
from mmkd.runtime.progress import console, track

OWN = 16
"""Records of one process."""
PROCESSOR = Path("assets/scenes_teacher")
WORDS = ["the", "red", "blue", "small", "large", "cat", "dog", "car", "tree", "is", "left", "of"]


def write_records(folder: Path, count: int) -> DataConfig:
    Image.new("RGB", (640, 480)).save(folder / "photo.jpg")
    draw = random.Random(0)

    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    rows = []
    for number in range(count):
        turns = []
        for _ in range(draw.randint(1, 6)):
            turns.append({"from": "human", "value": words(5, 20) + "?"})
            turns.append({"from": "gpt", "value": words(5, 60) + "."})
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        rows.append({"id": str(number), "image": "photo.jpg", "conversations": turns})
    (folder / "records.json").write_text(json.dumps(rows))
    return DataConfig(train=str(folder / "records.json"))


class Planner:
    """The first process of a stage's data, which encodes nothing.

    Args:
        data: the records.
        processor: of the model.
        lengths: of each record, from which the other processes' answers are made.
        size: of the global batch.
        workers: processes that work ahead.
    """

    def __init__(
        self, data: DataConfig, processor: Any, lengths: list[int], size: int, workers: int
    ):
        self.encoder = Encoder(Records(data), processor, data)
        self.encoder.encode = lambda indices: indices  # type: ignore[assignment, method-assign]
        self.lengths, self.processes = lengths, size // OWN
        self.stream = BatchStream(
            self.encoder,
            BatchConfig(size=OWN),
            seed=0,
            world_size=self.processes,
            workers=workers,
        )

    def seconds(self, steps: int, training: float = 0.0) -> float:
        """Seconds that a step waits for its plan: the median, with workers the mean, since a wait
        may be for several steps."""
        answers = iter([self._answers(step) for step in range(steps)])

        def gather(found: list[Any]) -> list[Any]:
            return found + [pair for part in next(answers) for pair in pickle.loads(part)]

        taken = []
        with mock.patch.object(distributed, "gather", gather):
            planned = self.stream.steps(0, steps)
            for _ in range(steps):
                start = time.perf_counter()
                next(planned)
                taken.append(time.perf_counter() - start)
                time.sleep(training)
        return statistics.mean(taken) if self.stream.workers else statistics.median(taken)

    def _answers(self, step: int) -> list[bytes]:
        """What each of the other processes sends for a step."""
        size = self.processes * OWN
        order = self.stream.mixture.order(0)[step * size : (step + 1) * size]
        parts = [order[rank :: self.processes] for rank in range(1, self.processes)]
        return [pickle.dumps([(r, self.lengths[r]) for r in part]) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--training", type=float, default=0.25)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    processor = load_pretrained_processor(str(PROCESSOR))
    found: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_records(Path(folder), max(args.sizes) * args.steps)
        encoder = Encoder(Records(data), processor, data)
        count = len(encoder.records)
        lengths = [encoder.length(i) for i in track(range(count), "lengths", count)]
        for size in args.sizes:
            alone = Planner(data, processor, lengths, size, workers=0)
            helped = Planner(data, processor, lengths, size, workers=args.workers)
            found[size] = {
                "cold": alone.seconds(args.steps),
                "warm": alone.seconds(args.steps),
                "waits": helped.seconds(args.steps, args.training),
            }
    table = Table(title="milliseconds of a step")
    for name in ("global batch", "cold", "warm", "waits"):
        table.add_column(name, justify="right")
    for size, times in found.items():
        table.add_row(f"{size:,}", *(f"{1000 * t:,.1f}" for t in times.values()))
    console.print(table)
    save(args, planning=found)


if __name__ == "__main__":
    main()
