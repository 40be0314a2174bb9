"""Runs a recipe in the processes that started it, and writes how many collectives each of its
steps took: `python -m tests.support.counted_run RECIPE OUT` under a launcher.

A step ends with `on_step_end`. Those of the first one include what a stage's start takes.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.measure import Collectives
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from mmkd.runtime import distributed
from mmkd.training.callbacks import Callback


class Steps(Callback):
    def __init__(self, collectives: Collectives):
        self.collectives = collectives
        self.found: list[dict[str, int]] = []

    def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
        self.found.append(dict(self.collectives.counts))
        self.collectives.counts.clear()


def main(recipe: str, out: str) -> None:
    with Collectives() as collectives:
        steps = Steps(collectives)
        pipeline.run(load_recipe(Path(recipe)), callbacks=[steps])
    if distributed.rank() == 0:
        Path(out).write_text(json.dumps(steps.found))
    distributed.disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
