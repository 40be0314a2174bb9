"""What an engine adds to a training step, against plain torch.

    python -m benchmarks.engine --json runs/bench/engine.json
    torchrun --standalone --nproc_per_node 2 -m benchmarks.engine --json runs/bench/engine-2.json

The quickstart's student, cross-entropy on real batches, float32: one step is a forward, a backward,
clipping and AdamW. `plain` is that loop written down, under DistributedDataParallel where there are
several processes; the engines are those that a recipe names. All in turn in one process (in each of
the launched ones), medians. Then the collectives of one step of the quickstart's mimic stage on
each engine, counted.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from benchmarks.measure import Collectives, median_seconds, save
from mmkd.commands.bench import prepare
from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.stream import BatchStream
from mmkd.engines import build_engine
from mmkd.engines.optim import build_optimizer
from mmkd.engines.root import Root
from mmkd.modeling.capture import capture
from mmkd.modeling.loading import load_model, load_processor
from mmkd.objectives import Signals, build_objective
from mmkd.recipe import EngineConfig, Recipe, StageConfig, load_recipe
from mmkd.runtime import distributed
from mmkd.runtime.progress import console
from mmkd.students import convert, set_trainable

RECIPE = "configs/quickstart.yaml"
CPU = torch.device("cpu")
MANY = 10_000
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"kind": "torch"},
    **{f"ZeRO {z}": {"kind": "deepspeed", "zero": z} for z in range(4)},
    "ZeRO 3, offload": {"kind": "deepspeed", "zero": 3, "offload": "all"},
}


def make_student(recipe: Recipe) -> PreTrainedModel:
    torch.manual_seed(0)
    student = load_model(recipe.student)
    convert(student, recipe.student.convert)
    return student


class Steps:
    """Calls that make one step each, on the same batches in turn."""

    def __init__(self, recipe: Recipe, stage: StageConfig, batches: list[Batch]):
        self.recipe, self.stage, self.batches = recipe, stage, batches
        self.objective = build_objective(stage.objectives[0])

    def score(self, batch: Batch) -> Callable[[Signals], Tensor]:
        rows = self.objective.rows(batch.targets).sum().double()
        count = float(distributed.total(rows))
        return lambda student: self.objective(student, None, batch.targets, count).loss

    def plain(self) -> Callable[[], None]:
        student = make_student(self.recipe)
        set_trainable(student, ["all"])
        optimizer = build_optimizer(student.parameters(), self.stage.optimizer)
        root: Any = Root(student.train())
        if distributed.world_size() > 1:
            root = DistributedDataParallel(root, find_unused_parameters=True)
        number = 0

        def step() -> None:
            nonlocal number
            batch = self.batches[number % len(self.batches)]
            number += 1
            score = self.score(batch)
            loss = root(lambda model: score(capture(model, batch.inputs)))
            (loss * distributed.world_size()).backward()  # it averages over processes
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def on(self, engine: dict[str, Any]) -> Callable[[], None]:
        config = EngineConfig(device="cpu", **engine)
        stage = self.stage.model_copy(update={"engine": config})
        student = make_student(self.recipe)
        set_trainable(student, ["all"])
        runs = build_engine(stage, student, MANY, CPU)
        number = 0

        def step() -> None:
            nonlocal number
            batch = self.batches[number % len(self.batches)]
            number += 1
            runs.backward(runs.forward(batch.inputs, self.score(batch)))
            runs.step()

        return step


def count_collectives(engine: dict[str, Any]) -> dict[str, int]:
    """Collectives of the second step of the quickstart's mimic stage, by name."""
    changes = ["variants={}", "stages.0.batch={size: 4}", "stages.0.engine={device: cpu}"]
    changes += [f"stages.0.engine.{key}={value}" for key, value in engine.items()]
    with tempfile.TemporaryDirectory() as folder:
        stage, _ = prepare(load_recipe(RECIPE, changes), 0, Path(folder))
        for number in (1, 2):
            batches = stage.stream.batches(number)
            with Collectives() as found:
                stage.step(number, batches)
        stage.engine.close()
    return dict(found.counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=32, help="of all processes together")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.connect(CPU)
    processes = distributed.world_size()
    recipe = load_recipe(RECIPE, ["stages.0.objectives=[{kind: ce}]", "stages.0.precision=float32"])
    stage = recipe.stages[0]
    batch = stage.batch.model_copy(update={"size": args.records // processes, "total": None})
    stage = stage.model_copy(update={"batch": batch})
    encoder = Encoder.of(stage.objectives, recipe.data, load_processor(recipe.student))
    stream = BatchStream(encoder, batch, seed=0, rank=distributed.rank(), world_size=processes)
    steps = Steps(recipe, stage, [stream.batches(number)[0] for number in range(8)])
    methods = {"plain": steps.plain(), **{name: steps.on(e) for name, e in ENGINES.items()}}
    seconds = median_seconds(methods, args.repeats)
    collectives = {name: count_collectives(engine) for name, engine in ENGINES.items()}
    if distributed.rank() == 0:
        report(seconds, processes)
        console.print(collectives)
        save(args, processes=processes, seconds=seconds, collectives=collectives)
    distributed.disconnect()


def report(seconds: dict[str, float], processes: int) -> None:
    table = Table(title=f"ms a step, {processes} process(es)")
    for name in ("engine", "ms", "of plain torch"):
        table.add_column(name, justify="right")
    for name, taken in seconds.items():
        table.add_row(name, f"{1e3 * taken:.1f}", f"{taken / seconds['plain']:.2f}x")
    console.print(table)


if __name__ == "__main__":
    main()
