"""Convert, evaluate and ask models."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from mmkd.api.loaded import Loaded, ModelLike, dtype_name, load
from mmkd.errors import CheckpointError
from mmkd.evaluation.run import EvaluationResult
from mmkd.evaluation.run import evaluate as run_tasks
from mmkd.modeling.conversation import Conversation, Picture, Reply, load_answering
from mmkd.recipe import SamplingConfig, load_student
from mmkd.runtime.progress import say
from mmkd.runtime.seeds import set_seed
from mmkd.students import convert as convert_in_place
from mmkd.students import write_student


def convert(
    model: ModelLike,
    conversions: Sequence[Mapping[str, Any]],
    *,
    out: str | Path | None = None,
    processor: Any = None,
    dtype: str = "float32",
    seed: int = 42,
) -> PreTrainedModel:
    """Change a model's structure: fewer layers, Mamba mixers, experts.

    What changed goes to the logger `mmkd`, a line for each conversion.

    Args:
        model: a model in memory, which is changed in place; or a folder or Hub id.
        conversions: as in a recipe's `student.convert`, such as `[{"kind": "moe", "experts": 4}]`.
        out: a new folder to write the student to, with its processor and code.
        processor: for `out`; None for the one that came with the model.
        dtype: of a model that is named.
        seed: of new weights. Random streams of the whole program start again with it.

    Returns:
        The student: `model` itself if it was given in memory.

    Raises:
        CheckpointError: the model cannot be loaded, or `out` is there already.
        RecipeError: a conversion is unknown, or does not fit the model.
    """
    in_memory = isinstance(model, PreTrainedModel)
    config = load_student(
        {
            "model": "student" if in_memory else str(model),
            "dtype": dtype_name(model) if isinstance(model, PreTrainedModel) else dtype,
            "convert": [dict(conversion) for conversion in conversions],
        }
    )
    if out is not None and Path(out).exists():
        raise CheckpointError("it is there already", where=str(out), hint="name a new folder")
    if isinstance(model, PreTrainedModel) and out is None:
        loaded = Loaded(model, None)
    else:
        loaded = load(model, processor, "student", config)
    set_seed(seed)
    report = convert_in_place(loaded.model, config.convert, loaded.processor)
    for line in report.lines:
        say(line)
    if out is not None:
        write_student(loaded.model, report.processor, Path(out), new=True)
    return loaded.model


def evaluate(
    model: ModelLike,
    tasks: Sequence[str],
    *,
    processor: Any = None,
    include: str | Path | None = None,
    local: str | Path | None = None,
    out: str | Path | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    calibration: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> EvaluationResult:
    """Score a model on lmms-eval tasks; `result.scores[task][metric]` is a number.

    Args:
        model: a model in memory, or a folder or Hub id.
        tasks: names of tasks, groups or tags.
        processor: required for a model in memory.
        include: folder of task files, such as `data/scenes/tasks`.
        local: folder of the tasks' data; None loads it from the Hub.
        out: folder for `results.json` and `samples/`; None writes nothing.
        batch_size: questions per call of `generate`.
        limit: documents of each task; None is all.
        calibration: also compute the expected calibration error, see `result.calibration`.
        device: where a model that is named runs; `auto` is the GPU if there is one.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        MmkdError: lmms-eval is missing, or a task is unknown or cannot be scored.
        CheckpointError: the model or its processor cannot be used.
        DataError: a task's data is missing.
        EvaluationError: some of the tasks failed.
    """

    def path(given: str | Path | None) -> Path | None:
        return None if given is None else Path(given)

    return run_tasks(
        model,
        processor=processor,
        tasks=[*tasks],
        include_path=path(include),
        local=path(local),
        out=path(out),
        batch_size=batch_size,
        limit=limit,
        calibration=calibration,
        device=device,
        trust_remote_code=trust_remote_code,
    )


def generate(
    model: ModelLike,
    question: str,
    images: Picture | Sequence[Picture] = (),
    *,
    processor: Any = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Reply:
    """The answer of a student or teacher to a question about images; `reply.text` is the text.

    A model that is named is loaded for this one question. For several questions, load it once,
    with transformers or `mmkd.modeling.conversation`.

    Args:
        model: a model in memory, which runs where it is; or a folder or Hub id.
        question: of the user.
        images: an image, or several: paths or open Pillow images.
        processor: None for the one that came with the model.
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token always.
        seed: of sampling.
        device: where a model that is named runs.
        trust_remote_code: run Python code that comes with the model.
        on_text: called with each new piece of the answer.

    Raises:
        CheckpointError: the model or its processor cannot be loaded.
        DataError: an image cannot be read.
    """
    if isinstance(model, PreTrainedModel):
        loaded = load(model, processor, "model", None)
        answering, words = loaded.model, loaded.processor
    else:
        answering, words = load_answering(
            str(model),
            processor=str(processor) if isinstance(processor, Path) else processor,
            device=device,
            trust_remote_code=trust_remote_code,
        )
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=max_new_tokens)
    pictures = images if isinstance(images, Sequence) and not isinstance(images, str) else [images]
    training = answering.training
    answering.eval()
    try:
        conversation = Conversation(answering, words, sampling=sampling, seed=seed)
        return conversation.ask(question, pictures, on_text=on_text)
    finally:
        answering.train(training)
