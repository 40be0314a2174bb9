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
from mmkd.training import stage


class BrokenOffError(Exception):
    pass


def main(path: str) -> None:
    sharded.WHOLE_BELOW = 0  # tiny weights are spread too
    torch_engine.BUCKET_BYTES = 50_000  # their gradients take several messages
    step = stage.Stage.step
    for raw, stop in json.loads(Path(path).read_text()):

        def watched(self, number, batches, stop=stop):
            if number == stop:
                raise BrokenOffError
            return step(self, number, batches)

        stage.Stage.step = watched
        try:
            pipeline.run(load_recipe(raw))
        except BrokenOffError:
            distributed.barrier()
    distributed.disconnect()


if __name__ == "__main__":
    main(sys.argv[1])
