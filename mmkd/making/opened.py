"""Open what an entry of `make` reads, and check it without asking a model."""

import torch

from mmkd.making.checks import build_checks
from mmkd.making.makers import build_makers
from mmkd.making.questions import Questions, first_readable, open_questions, questions_for_lists
from mmkd.making.requests import Context
from mmkd.making.state import is_made
from mmkd.making.writing import check_out
from mmkd.recipe import STUDENT, MakeConfig, Recipe, read_entry


def open_entry(config: MakeConfig, where: str) -> tuple[Questions, Questions | None, Context]:
    """The questions of an entry, those for lists of objects, and what only the model reads.

    Args:
        config: the entry.
        where: what messages call it.

    Raises:
        MmkdError: there are no questions, or something of them is not possible.
    """
    questions, lists = open_questions(config, where), questions_for_lists(config, where)
    asked = lists or questions
    check_out(config, first_readable(asked.at, len(asked)), where)
    return questions, lists, Context.of(config)


def check_entry(recipe: Recipe, name: str) -> None:
    """Check an entry that is made later, by a student that is not trained yet. Its questions are
    checked if they are there.

    Args:
        recipe: with the entry and its models.
        name: of the entry.

    Raises:
        MmkdError: settings, data or a model do not fit.
    """
    config, where = recipe.make[name], f"make.{name}"
    others = [model for model in config.models if model != STUDENT]
    build_makers(recipe, others, config.batch_size, torch.device("cpu"))
    read = read_entry(config, recipe.make)
    if read is None or is_made(recipe, read):
        build_checks(config, open_entry(config, where)[0])
