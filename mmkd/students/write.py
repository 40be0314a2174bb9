"""A student on disk: a plain Hugging Face folder."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, set_seed

from mmkd.files import write_folder
from mmkd.loading import load_model, load_processor
from mmkd.recipe import StudentConfig
from mmkd.students.convert import ConversionReport, convert

SHARD_SIZE = "5GB"


def write_student(
    student: PreTrainedModel,
    processor: Any,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Config, safetensors and processor, and a converted student's code; whole or not there.

    `weights` are written in place of the student's own, which an engine may have spread over
    processes.
    """

    def write(partial: Path) -> None:
        student.save_pretrained(partial, state_dict=weights, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(partial)

    write_folder(folder, write)


def write_converted(config: StudentConfig, folder: Path, *, seed: int) -> ConversionReport:
    """Load a model, convert it and write it.

    Args:
        config: the model and its conversions.
        folder: to write; replaced if it is there.
        seed: of the weights that the model did not bring.

    Raises:
        CheckpointError: the model cannot be loaded.
        RecipeError: a conversion does not fit the model.
    """
    set_seed(seed)
    student, processor = load_model(config), load_processor(config)
    report = convert(student, config.convert)
    write_student(student, processor, folder)
    return report
