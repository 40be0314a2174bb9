"""Check that a processor from elsewhere has the tokens that a model was trained with."""

from contextlib import suppress
from typing import Any

from mmkd.errors import CheckpointError, MmkdError
from mmkd.modeling.loading import load_tokenizer
from mmkd.recipe import ModelConfig


def check_own_tokens(
    name: str, processor: Any, where: str, *, revision: str | None = None, trusted: bool = False
) -> None:
    """Check that each token id of a processor is the same token in the model's own tokenizer.

    Otherwise the model would read and write other words than the text says, without an error. A
    model without a tokenizer of its own is not checked.

    Args:
        name: folder or Hub id of the model.
        processor: the one to be used.
        where: name of the model in messages.
        revision: of the model.
        trusted: run code that comes with the model.

    Raises:
        CheckpointError: an id stands for another token.
    """
    own = None
    with suppress(MmkdError):
        own = load_tokenizer(name, revision=revision, trust_remote_code=trusted)
    if own is None:
        return
    mine, given = ({i: t for t, i in x.get_vocab().items()} for x in (own, processor.tokenizer))
    differing = [i for i in mine.keys() & given.keys() if mine[i] != given[i]]
    if differing:
        at = min(differing)
        raise CheckpointError(
            f"the processor has other tokens than the model: id {at} is {given[at]!r}, and "
            f"{mine[at]!r} in the model's own tokenizer",
            where=where,
            hint="leave 'processor' out, give a model whose embeddings belong to this tokenizer, "
            "or convert a student with {kind: tokenizer}",
        )


def check_source_tokens(source: ModelConfig, processor: Any, where: str) -> None:
    """`check_own_tokens` for a model of a recipe that has another processor."""
    if source.model is not None and source.processor not in (None, source.model):
        check_own_tokens(source.model, processor, where, revision=source.revision)
