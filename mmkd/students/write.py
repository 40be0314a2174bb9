"""A student on disk: a plain Hugging Face folder."""

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mmkd.data.generation import set_ends
from mmkd.modeling.adapters import merged, save_adapters
from mmkd.modeling.loading import load_model, load_processor
from mmkd.modeling.quiet import quiet_libraries
from mmkd.recipe import LoraConfig, StudentConfig
from mmkd.runtime.files import write_folder
from mmkd.runtime.seeds import set_seed
from mmkd.students.convert import ConversionReport, convert

SHARD_SIZE = "5GB"
ADAPTER = "adapter"


def write_student(
    student: PreTrainedModel,
    processor: Any,
    folder: Path,
    weights: dict[str, Tensor] | None = None,
    lora: LoraConfig | None = None,
    *,
    from_config: bool = False,
    new: bool = False,
) -> None:
    """Write config, safetensors, processor and, if it was converted, code; atomically.

    Its `generation_config.json` names every token that ends an answer, including the end of turn
    of the chat template, which may differ from the tokenizer's end token.

    Args:
        student: its adapters are merged into their layers.
        processor: the student's.
        folder: to write; an existing one is replaced.
        weights: used instead of the student's own, which an engine may have sharded.
        lora: settings of the adapters; with `keep`, they are also written to the folder `adapter`.
        from_config: the student was made from a config, with random weights.
        new: do not replace the folder.
    """
    whole = weights if lora is None else merged(student, weights)
    if student.generation_config is not None:
        set_ends(student.generation_config, processor, from_config=from_config)

    def write(partial: Path) -> None:
        with quiet_libraries():
            student.save_pretrained(partial, state_dict=whole, max_shard_size=SHARD_SIZE)
        processor.save_pretrained(partial)
        if lora is not None and lora.keep:
            save_adapters(student, lora, weights, partial / ADAPTER)

    write_folder(folder, write, new=new)


def write_converted(
    config: StudentConfig, folder: Path, *, seed: int, new: bool = False
) -> ConversionReport:
    """Load a model, convert it and write it.

    Args:
        config: the model and its conversions.
        folder: to write; an existing one is replaced.
        seed: for weights that the model does not have.
        new: do not replace an existing folder.

    Raises:
        CheckpointError: the model cannot be loaded.
        RecipeError: a conversion does not fit the model.
    """
    set_seed(seed)
    student = load_model(config)
    report = convert(student, config.convert, load_processor(config))
    write_student(student, report.processor, folder, from_config=config.config is not None, new=new)
    return report
