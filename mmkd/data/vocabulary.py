"""Compare the vocabularies of tokenizers, and check the sizes of embeddings and heads."""

from typing import Any

from mmkd.errors import CheckpointError


def token_count(tokenizer: Any) -> int:
    """One more than the largest id of a tokenizer's tokens. Later rows of a head are padding."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def shared_vocabulary(student: Any, teacher: Any) -> int:
    """Number of token ids that student and teacher share, from id 0.

    Heads are often padded to different sizes. Rows after the shared tokens get probability 0.

    Args:
        student, teacher: tokenizers.

    Raises:
        CheckpointError: an id stands for different tokens, or only one tokenizer has it.
    """
    mine, theirs = ({i: t for t, i in v.get_vocab().items()} for v in (student, teacher))
    # Vocabularies may have gaps. An id that both lack is not a difference.
    differing = [i for i in mine.keys() | theirs.keys() if mine.get(i) != theirs.get(i)]
    if differing:
        at = min((i for i in differing if i in mine and i in theirs), default=min(differing))
        raise CheckpointError(
            f"the vocabularies differ: id {at} is {mine.get(at)!r} for the student and "
            f"{theirs.get(at)!r} for the teacher",
            where="teacher and student",
            hint="distil between models of the same tokenizer family, or train with 'ce' only",
        )
    return max(mine, default=-1) + 1


def check_head(model: Any, tokenizer: Any, where: str) -> None:
    """Check that a model has an embedding and a logit for every token of its tokenizer.

    Args:
        model: on any device, `meta` included.
        tokenizer: of its inputs.
        where: name of the model in messages.

    Raises:
        CheckpointError: there are fewer rows than tokens.
    """
    tokens = token_count(tokenizer)
    tables = {
        "head": model.get_output_embeddings(),
        "embedding": model.get_input_embeddings(),
    }
    for name, table in tables.items():
        if table is not None and table.weight.shape[0] < tokens:
            raise CheckpointError(
                f"the tokenizer has {tokens} tokens, and the model's {name} has "
                f"{table.weight.shape[0]} rows",
                where=where,
                hint="use the processor that belongs to it, or resize_token_embeddings and save it",
            )


def same_vocabulary(student: Any, teacher: Any) -> bool:
    """Whether each token id is the same token in both tokenizers."""
    try:
        shared_vocabulary(student, teacher)
    except CheckpointError:
        return False
    return True
