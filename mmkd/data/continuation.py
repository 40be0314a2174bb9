"""Append tokens of answers to encoded prompts."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor


def append_tokens(
    inputs: dict[str, Tensor],
    answers: Sequence[Sequence[int]],
    *,
    side: Literal["left", "right"],
    padding: int,
) -> dict[str, Tensor]:
    """Inputs of a model for prompts with the first tokens of their answers.

    Nothing is tokenized again, so the tokens of prompts and answers stay as they are.

    Args:
        inputs: of prompts, padded on any side, as `Encoder.prompts` returns them. Inputs with a
            value for each token, such as `token_type_ids`, are 0 for the tokens of answers, as for
            other text.
        answers: for each of the first rows, the tokens to append. Further rows stay as they are.
        side: of the padding of the result: left to sample the next tokens, right for a forward pass
            as in training.
        padding: id of the padding token.
    """
    ids, attention = inputs["input_ids"], inputs["attention_mask"].bool()  # [B, P]
    more = [*answers, *([()] * (len(ids) - len(answers)))]
    lengths = [n + len(a) for n, a in zip(attention.sum(1).tolist(), more, strict=True)]
    width = max(lengths)

    def longer(name: str, value: Tensor) -> Tensor:
        made = value.new_full((len(ids), width), padding if name == "input_ids" else 0)
        for row, (answer, length) in enumerate(zip(more, lengths, strict=True)):
            if name == "input_ids":
                end = value.new_tensor(list(answer))
            else:
                end = value.new_full((len(answer),), int(name == "attention_mask"))
            start = width - length if side == "left" else 0
            made[row, start : start + length] = torch.cat([value[row][attention[row]], end])
        return made

    return {k: longer(k, v) if v.shape == ids.shape else v for k, v in inputs.items()}
