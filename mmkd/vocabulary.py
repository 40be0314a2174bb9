"""Whether two tokenizers have the same tokens."""

from typing import Any

from mmkd.errors import CheckpointError


def shared_vocabulary(student: Any, teacher: Any) -> int:
    """How many token ids student and teacher share, from id 0 without a gap.

    Heads are often padded to different sizes; rows past the shared tokens get no mass.

    Args:
        student, teacher: the two tokenizers.

    Raises:
        CheckpointError: an id stands for different tokens in the two.
    """
    mine, theirs = ({i: t for t, i in v.get_vocab().items()} for v in (student, teacher))
    differing = sorted(i for i in mine.keys() & theirs.keys() if mine[i] != theirs[i])
    shared = next(i for i in range(len(mine) + 1) if i not in mine or i not in theirs)
    lost = sum(i >= shared for i in mine) + sum(i >= shared for i in theirs)
    if differing or lost:
        at = differing[0] if differing else shared
        raise CheckpointError(
            f"the vocabularies differ: id {at} is {mine.get(at)!r} for the student and "
            f"{theirs.get(at)!r} for the teacher",
            where="teacher and student",
            mend="distil between models of one tokenizer family, or train with 'ce' alone",
        )
    return shared


def same_vocabulary(student: Any, teacher: Any) -> bool:
    """Whether every token id stands for the same token in both tokenizers."""
    try:
        shared_vocabulary(student, teacher)
    except CheckpointError:
        return False
    return True
