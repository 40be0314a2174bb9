"""Answers of a model's own: prompts to ask it with, and conversations with what it said."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmkd.data.encoder import Encoder
from mmkd.data.schema import Record
from mmkd.recipe import SamplingConfig

Generate = Callable[..., Tensor]
"""(inputs, **options of transformers' `generate`) -> [B, prompt + answer] token ids."""


def answers_of(record: Record) -> list[int]:
    """Which messages of a conversation are the assistant's."""
    return [i for i, m in enumerate(record.messages) if m["role"] == "assistant"]


def asked(record: Record, message: int) -> Record:
    """The conversation before one of its messages, with the pictures shown until then."""
    before = record.messages[:message]
    shown = sum(p["type"] == "image" for m in before for p in m["content"])
    return replace(record, messages=before, images=record.images[:shown], rejected=None)


def answered(record: Record, text: str) -> Record:
    """A prompt with an answer to it, which alone counts as response."""
    said = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return replace(record, messages=[*record.messages, said], last_answer_only=True)


@torch.no_grad()
def sample(
    generate: Generate,
    encoder: Encoder,
    prompts: list[Record],
    settings: SamplingConfig,
    *,
    seed: int,
    device: torch.device,
    count: int = 1,
) -> list[str]:
    """What a model answers; the random streams outside are left as they were.

    Args:
        generate: runs the model.
        encoder: of the model's processor.
        prompts: conversations that end before an answer.
        settings: how to sample.
        seed: decides the answers.
        device: that the model runs on.
        count: answers to each prompt, neighbours in the result.
    """
    inputs = {k: v.to(device) for k, v in encoder.prompts(prompts).items()}
    options: dict[str, Any] = {"max_new_tokens": settings.max_new_tokens, "do_sample": False}
    if settings.temperature > 0:
        options |= {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "num_return_sequences": count,
        }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids = generate(inputs, **options)
    said = ids[:, inputs["input_ids"].shape[1] :]
    tokenizer = encoder.processor.tokenizer
    texts = tokenizer.batch_decode(said, skip_special_tokens=True)
    # A model can spell a placeholder, which the processor would take for a picture.
    return [t.replace(encoder.processor.image_token, "").strip() for t in texts]
