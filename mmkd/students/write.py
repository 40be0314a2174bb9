"""A student on disk: a plain Hugging Face folder."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, set_seed

from mmkd.adapters import merged, save_adapters
from mmkd.files import write_folder
from mmkd.loading import load_model, load_processor
from mmkd.recipe import LoraConfig, StudentConfig
from mmkd.students.convert import ConversionReport, convert

SHARD_SIZE = "5GB"
ADAPTER = "adapter"


def write_student(
    student: PreTrainedModel,
    processor: Any,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
    lora: LoraConfig | None = None,
) -> None:
    """Config, safetensors and processor, and a converted student's code; whole or not there.

    Answers end where the tokenizer's do: a model made from a config may know another end token.

    Args:
        student: adapters become part of the layers that have them.
        processor: the student's.
        folder: to write; replaced if it is there.
        weights: in place of the student's own, which an engine may have spread over processes.
        lora: what its adapters are; its `adapter` folder keeps them if that says so.
    """
    whole = weights if lora is None else merged(student, weights)
    _end_answers(student.generation_config, processor.tokenizer)

    def write(partial: Path) -> None:
        student.save_pretrained(partial, state_dict=whole, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(partial)
        if lora is not None and lora.keep:
            save_adapters(student, lora, weights, partial / ADAPTER)

    write_folder(folder, write)


def _end_answers(settings: GenerationConfig | None, tokenizer: Any) -> None:
    if settings is None:
        return
    known = settings.eos_token_id
    ends = {*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id} - {None}
    if ends:
        settings.eos_token_id = sorted(ends) if len(ends) > 1 else ends.pop()
    if settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.pad_token_id


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
