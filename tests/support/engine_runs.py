"""Runs recipes one after another in the processes that started it: a JSON file lists them.

Each entry is a recipe and the step before which its run breaks off, or null.
"""

import json
import sys
from pathlib import Path

from mmkd.engines import torch_engine
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from mmkd.runtime import distributed
from mmkd.teachers import sharded
from tests.support.breaking import broken_off


def main(path: str) -> None:
    sharded.WHOLE_BELOW = 0  # tiny weights are spread too
    torch_engine.BUCKET_BYTES = 50_000  # their gradients take several messages
    for raw, stop in json.loads(Path(path).read_text()):
        with broken_off(lambda stage, number, stop=stop: number == stop):
            pipeline.run(load_recipe(raw))
        distributed.barrier()
    distributed.disconnect()


if __name__ == "__main__":
    main(sys.argv[1])
