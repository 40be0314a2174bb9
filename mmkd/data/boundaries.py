"""Tokens before which a text is cut for sure: those that begin with white space, or are special.

Tokenizers that split at white space never join such a token with the text before it. So if the next
token is one of them, the text before is complete, however it is cut into tokens.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mmkd.data.chat import special_tokens
from mmkd.data.token_text import decoder
from mmkd.errors import CheckpointError


@lru_cache(maxsize=32)
def boundary_tokens(tokenizer: Any) -> Tensor:
    """[V] bool: the tokens that begin with white space or are special, computed once for each
    tokenizer. V is one more than the largest id.

    Raises:
        CheckpointError: there is no such token.
    """
    tokens = {i: token for token, i in tokenizer.get_vocab().items()}
    specials, text = {*special_tokens(tokenizer).values()}, decoder(tokenizer)
    mask = torch.zeros(max(tokens, default=-1) + 1, dtype=torch.bool)
    for number, token in tokens.items():
        mask[number] = number in specials or text(token)[:1].isspace()
    if not mask.any():
        raise CheckpointError(
            "no token begins with white space or is special",
            where="tokenizer",
            hint="use the processor that belongs to the model",
        )
    return mask
