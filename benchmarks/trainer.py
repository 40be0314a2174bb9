"""A whole distillation step against TRL's trainer: same models, same batch, same loss.

    pip install -e '.[bench]'
    python -m benchmarks.trainer --json runs/bench/trainer.json
    python -m benchmarks.trainer --vocabulary 32000 --json runs/bench/trainer-32k.json

Forward KL over the responses of 32 real records, AdamW, clipping, float32, no activation
checkpoints. The teacher is the quickstart's, the student a copy of it with noise on its weights.
TRL's trainer samples its responses: here it is given the records', so that neither side's
generation nor its reading of images is in the time. Losses are compared before the first step.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from benchmarks.measure import median_seconds, peak_bytes, save
from mmkd.commands.bench import prepare
from mmkd.data.batch import Batch
from mmkd.recipe import load_recipe
from mmkd.runtime.progress import console
from mmkd.training.stage import Stage

RECIPE = "configs/quickstart.yaml"
TEACHER = "assets/scenes_teacher"
LR = 1e-4
NOISE = 0.01


def write_models(folder: Path, vocabulary: int | None) -> None:
    """Teacher and student, with further tokens that no record uses if `vocabulary` says so."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_pretrained(TEACHER, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(TEACHER)
    if vocabulary is not None:
        known = len(processor.tokenizer)
        processor.tokenizer.add_tokens([f"<unused {i}>" for i in range(known, vocabulary)])
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    for name in ("teacher", "student"):
        if name == "student":
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(NOISE * torch.randn_like(weight))
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


def build_stage(folder: Path, records: int) -> tuple[Stage, Batch]:
    """mmkd's stage and a batch of it."""
    recipe = load_recipe(
        RECIPE,
        [
            "variants={}",
            f"teacher.model={folder / 'teacher'}",
            f"student={{model: {folder / 'student'}}}",
            f"stages.0.batch={{size: {records}}}",
            "stages.0.objectives=[{kind: kl}]",
            f"stages.0.optimizer={{lr: {LR}, max_grad_norm: 1.0}}",
            "stages.0.schedule={kind: constant, warmup: 0}",
            "stages.0.precision=float32",
            "stages.0.engine={device: cpu}",
        ],
    )
    stage, _ = prepare(recipe, 0, folder)
    return stage, stage.stream.batches(0)[0]


def trl_inputs(batch: Batch) -> dict[str, Tensor]:
    """The batch as TRL's trainer lays it out: prompts padded on the left, what follows on the
    right, with a mask of the tokens that count."""
    prompts, completions, counted = [], [], []
    for ids, real, response in zip(
        batch.targets.input_ids, batch.targets.attention, batch.targets.response, strict=True
    ):
        first, end = int(response.nonzero()[0]), int(real.sum())
        prompts.append(ids[:first])
        completions.append(ids[first:end])
        counted.append(response[first:end].long())

    def left(rows: list[Tensor]) -> Tensor:
        return pad_sequence([r.flip(0) for r in rows], batch_first=True).flip(1)

    def right(rows: list[Tensor]) -> Tensor:
        return pad_sequence(rows, batch_first=True)

    return {
        "prompt_ids": left(prompts),
        "prompt_mask": left([torch.ones_like(r) for r in prompts]),
        "completion_ids": right(completions),
        "completion_mask": right([torch.ones_like(r) for r in completions]),
        "tool_mask": right(counted),
        "num_items_in_batch": batch.targets.response.sum(),
        "pixel_values": batch.inputs["pixel_values"],
    }


def build_trainer(folder: Path, batch: Batch) -> Any:
    """TRL's trainer on copies of the same models, whose every batch is this one."""
    from trl import DistillationConfig, DistillationTrainer

    class Given(DistillationTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Tensor]:
            return {**trl_inputs(batch), "num_images": [1] * len(batch.ids)}

    def model(name: str) -> PreTrainedModel:
        return AutoModelForImageTextToText.from_pretrained(folder / name, dtype=torch.float32)

    config = DistillationConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=len(batch.ids),
        gradient_accumulation_steps=1,
        activation_checkpointing=False,
        learning_rate=LR,
        adam_beta2=0.95,
        beta=0.0,
        bf16=False,
        use_cpu=True,
        report_to=[],
        max_steps=1000,
    )
    asked = [{"role": "user", "content": "?"}]
    trainer = Given(
        model=model("student"),
        teacher_model=model("teacher"),
        args=config,
        train_dataset=datasets.Dataset.from_list([{"prompt": asked}] * 2),
        processing_class=AutoProcessor.from_pretrained(folder / "student", padding_side="left"),
    )
    trainer.create_optimizer()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_step(trainer: Any) -> float:
    """What TRL's loop does in a step, without its logging."""
    loss = trainer.training_step(trainer.model, [], None)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return float(loss)


def make(folder: str, name: str, records: int) -> Callable[[], Any]:
    """A step of mmkd or TRL, as a call."""
    stage, batch = build_stage(Path(folder), records)
    if name == "TRL":
        trainer = build_trainer(Path(folder), batch)
        return lambda: trl_step(trainer)
    return lambda: stage.step(1, [batch])["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, help="tokens; the teacher's own if left out")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        write_models(Path(name), args.vocabulary)
        calls = {which: make(name, which, args.batch) for which in ("mmkd", "TRL")}
        losses = {which: call() for which, call in calls.items()}
        seconds = median_seconds(calls, args.repeats)
        peaks = {w: peak_bytes(make, (name, w, args.batch), (name, w, 2)) for w in calls}
    report(losses, seconds, peaks)
    save(args, losses=losses, seconds=seconds, peak_bytes=peaks)


def report(losses: dict[str, float], seconds: dict[str, float], peaks: dict[str, int]) -> None:
    table = Table(title="a step")
    for name in ("", "loss", "ms", "mmkd's part", "MB", "mmkd's part "):
        table.add_column(name, justify="right")
    for name, taken in seconds.items():
        table.add_row(
            name,
            f"{losses[name]:.6f}",
            f"{1e3 * taken:.0f}",
            f"{seconds['mmkd'] / taken:.2f}",
            f"{peaks[name] / 1e6:.0f}",
            f"{peaks['mmkd'] / peaks[name]:.2f}",
        )
    console.print(table)


if __name__ == "__main__":
    main()
