"""Checks of the student that need no weights."""

from typing import Any

from mmkd.data.chat import prompt_ends_in_blank
from mmkd.data.templates import check_processor
from mmkd.data.vocabulary import check_head
from mmkd.modeling.adapters import targets
from mmkd.modeling.capture import check_supported
from mmkd.modeling.loading import load_processor, skeleton
from mmkd.modeling.own_tokens import check_source_tokens
from mmkd.recipe import StudentConfig
from mmkd.recipe.context import StageContext
from mmkd.runtime import distributed
from mmkd.runtime.progress import say_once
from mmkd.students.convert import converted_processor
from mmkd.students.groups import check_groups


def check_student(source: StudentConfig) -> Any:
    """The model is of a supported family, and its processor can render conversations.

    Args:
        source: the model that the student is made from.

    Returns:
        The processor of the student, after its conversions.

    Raises:
        CheckpointError: the model or its processor cannot be used.
        RecipeError: a conversion does not fit the processor.
    """
    own = load_processor(source)
    student = skeleton(source)
    check_supported(student, "student")
    check_head(student, own.tokenizer, "student")
    check_source_tokens(source, own, "student")
    check_processor(own)
    processor = converted_processor(source)
    if prompt_ends_in_blank(processor) and distributed.rank() == 0:
        say_once(
            "student: the chat template's generation prompt ends in a space. In training, that "
            "space is part of the answer's first token, so the student may begin its answers in "
            "another way than it was trained to -- remove the space from the generation prompt"
        )
    return processor


def check_trained(context: StageContext) -> None:
    """The student has the groups that train, and layers for adapters.

    Raises:
        RecipeError: it lacks some.
    """
    train = context.stage.train
    check_groups(context.student, train.groups, train.lora)
    if train.lora is not None:
        targets(context.student, train.lora, train.groups)
