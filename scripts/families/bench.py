"""One family's processor, records and tiny models, and mmkd's own path over them."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.data.batch import Batch
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.modeling.capture import capture
from mmkd.modeling.loading import load_pretrained, load_pretrained_processor
from mmkd.recipe import DataConfig, StageConfig
from mmkd.students import write_student
from mmkd.teachers import LiveTeacher, LoadedTeachers
from mmkd.training.build import StageInputs, build_stage
from mmkd.training.stage import Stage

SAID = ("two cats and a dog", "No hat: none at all.")
SIZES = ((40, 24), (24, 50), (64, 64), (33, 33))
PICTURES = {"one": 1, "other": 1, "several": 2, "none": 0, "frames": 4}


class CheckError(Exception):
    """Something ran, and what came out is wrong."""


class Workbench:
    """Everything the checks of one family need.

    Args:
        make: a new model of a seed.
        processor: the family's.
        folder: to write into.
        reloads: packages are there that transformers wants to load the processor.
    """

    def __init__(
        self,
        make: Callable[[int], PreTrainedModel],
        processor: Any,
        folder: Path,
        *,
        reloads: bool = True,
    ):
        self.reloads = reloads
        self.make = make
        self.processor = processor
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for number, size in enumerate(SIZES):
            Image.effect_noise(size, 90).convert("RGB").save(folder / f"{number}.png")

    def data(self, *kinds: str, **settings: Any) -> DataConfig:
        """A data file with a record of each kind of `PICTURES`, one after another."""
        rows = []
        for row, kind in enumerate(kinds):
            names = [f"{(row + n) % len(SIZES)}.png" for n in range(PICTURES[kind])]
            asked = "<image>\n" * len(names) + "How many?" + " And a hat?" * row
            turns = [("human", asked), ("gpt", SAID[0]), ("human", "And?"), ("gpt", SAID[1])]
            said = [{"from": who, "value": what} for who, what in turns]
            rows.append({"id": kind, "images": names, "conversations": said})
        path = self.folder / f"{'-'.join(kinds)}.json"
        path.write_text(json.dumps(rows))
        return DataConfig(train=str(path), **settings)

    def encoder(self, *kinds: str, **settings: Any) -> Encoder:
        data = self.data(*kinds, **settings)
        return Encoder(Records(data), self.processor, data)

    def batch(self, *kinds: str, **settings: Any) -> Batch:
        """Records of these kinds in one batch."""
        return self.encoder(*kinds, **settings).encode(list(range(len(kinds))))

    @cached_property
    def model(self) -> PreTrainedModel:
        """One that is only looked at."""
        return self.make(0)

    def stage(
        self,
        student: PreTrainedModel,
        *kinds: str,
        teacher: PreTrainedModel | None = None,
        **settings: Any,
    ) -> Stage:
        """A stage of one step over one batch of these records."""
        objectives = [{"kind": "ce"}]
        if teacher is not None:
            objectives += [{"kind": "kl"}, {"kind": "jsd", "region": "vision"}]
        settings["batch"] = {"size": len(kinds), **settings.get("batch", {})}
        config = {"name": "step", "objectives": objectives, "steps": 1, **settings}
        config |= {"optimizer": {"lr": 1e-3}, "engine": {"device": "cpu"}}
        teachers = LoadedTeachers()
        if teacher is not None:
            live = LiveTeacher(teacher, torch.device("cpu"))
            teachers = LoadedTeachers({"teacher": live}, processor=self.processor)
        inputs = StageInputs(
            config=StageConfig.model_validate(config),
            student=student,
            processor=self.processor,
            teachers=teachers,
            data=self.data(*kinds),
            folder=self.folder / "stage",
            seed=0,
        )
        return build_stage(inputs)

    def step(self, stage: Stage) -> dict[str, Any]:
        """Run the stage's step; its metrics."""
        return stage.step(1, next(iter(stage.stream.steps(0, 1))))

    def written(self, stage: Stage, student: PreTrainedModel) -> PreTrainedModel:
        """The student as it loads from the folder that the stage's end writes."""
        folder = self.folder / "student"
        write_student(
            student, self.processor, folder, stage.engine.weights(), stage.config.train.lora
        )
        if self.reloads:
            self._check_processor(load_pretrained_processor(str(folder)))
        return load_pretrained(str(folder))

    def _check_processor(self, loaded: Any) -> None:
        """A loaded processor makes the tokens that the saved one made."""
        data = self.data("several", "none", "one")
        found = [
            Encoder(Records(data), p, data).encode([0, 1, 2]) for p in (loaded, self.processor)
        ]
        if not torch.equal(*(batch.targets.input_ids for batch in found)):
            raise CheckError("the loaded processor makes other tokens")


@torch.no_grad()
def hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Final hidden states of a batch's real tokens, [n, H]."""
    found = capture(model.eval(), batch.inputs).hidden[: len(batch.targets.attention)]
    return found[batch.targets.attention]


def same(what: str, got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Raise CheckError unless two tensors are one but for rounding."""
    if got.shape != want.shape:
        raise CheckError(f"{what}: {list(got.shape)} in place of {list(want.shape)}")
    distance = float((got - want).norm() / want.norm())
    if not distance <= tolerance:
        raise CheckError(f"{what} differ by {distance:.1e}")
