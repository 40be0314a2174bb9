"""Sample answers from a model: prompts, generation, and the resulting conversations."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from mmkd.data.continuation import append_tokens
from mmkd.data.encoder import Encoder
from mmkd.data.generation import end_tokens, neutral_settings, padding_token
from mmkd.data.schema import Record
from mmkd.data.seeded import SeededSampling
from mmkd.data.templates import without_media_tokens
from mmkd.errors import NonFiniteLossError
from mmkd.recipe import SamplingConfig

Generate = Callable[..., Tensor]
"""(inputs, **options of transformers' `generate`) -> [B, prompt + answer] token ids."""


@dataclass(frozen=True)
class Sampled:
    """One answer of a model.

    Attributes:
        text: without its end tokens.
        finished: the model ended it; False if `max_new_tokens` was reached.
        tokens: ids that the model has generated, with the end token if it is finished.
    """

    text: str
    finished: bool
    tokens: tuple[int, ...] = ()


def generate_of(model: Any) -> Generate:
    """The `generate` method of a model of transformers, with pixel values in the model's dtype."""

    def generate(inputs: dict[str, Tensor], **options: Any) -> Tensor:
        dtype = model.dtype
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        return model.generate(**inputs, **options)

    return generate


def answers_of(record: Record) -> list[int]:
    """Indices of the assistant's messages in a conversation; without any, the index of the next
    message."""
    found = [i for i, m in enumerate(record.messages) if m["role"] == "assistant"]
    return found or [len(record.messages)]


def asked(record: Record, message: int) -> Record:
    """The conversation before a message, with the images up to there: a prompt for the message."""
    before = record.messages[:message]
    shown = sum(p["type"] == "image" for m in before for p in m["content"])
    return replace(record, messages=before, images=record.images[:shown], rejected=None)


def answered(record: Record, text: str, *, finished: bool = True) -> Record:
    """A prompt with an answer appended. Only this answer is trained on, with its end of turn if it
    is finished."""
    said = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    return replace(
        record,
        messages=[*record.messages, said],
        last_answer_only=True,
        unfinished=not finished,
    )


def sample(
    generate: Generate,
    encoder: Encoder,
    prompts: list[Record],
    settings: SamplingConfig,
    **more: Any,
) -> list[str]:
    """The texts of `sample_answers`, with the same arguments."""
    return [a.text for a in sample_answers(generate, encoder, prompts, settings, **more)]


@torch.no_grad()
def sample_answers(
    generate: Generate,
    encoder: Encoder,
    prompts: list[Record],
    settings: SamplingConfig,
    *,
    seed: int,
    device: torch.device,
    count: int = 1,
    ends: int | Iterable[int] | None = None,
    inputs: dict[str, Tensor] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Sampled]:
    """Sample answers from a model. The global random state is not changed.

    Only the end tokens of the checkpoint's generation settings are used. Temperature 0 is greedy
    decoding.

    Args:
        generate: runs the model.
        encoder: encoder with the model's processor.
        prompts: conversations that end before an answer.
        settings: sampling parameters.
        seed: of the random numbers.
        device: of the model.
        count: number of answers per prompt; they are neighbours in the result.
        ends: `eos_token_id` of the model's generation settings, in addition to the chat template's
            end of turn and the tokenizer's end token.
        inputs: of the prompts, if they are encoded already; further rows are ignored.
        seeds: of the random numbers of each prompt, instead of `seed`. An answer then does not
            depend on the other prompts, up to the rounding of logits. `count` must be 1.

    Raises:
        NonFiniteLossError: the model's probabilities are not finite, because it has diverged.
    """
    stops = end_tokens(encoder.processor, ends)
    inputs = encoder.prompts(prompts) if inputs is None else inputs
    inputs = {k: v.to(device) for k, v in inputs.items()}
    said = _generated(generate, encoder, prompts, inputs, settings, stops, seed, count, seeds)
    return [_sampled(row, stops, encoder.processor) for row in said[: len(prompts) * count]]


@torch.no_grad()
def continue_answers(
    generate: Generate,
    encoder: Encoder,
    prompts: list[Record],
    inputs: dict[str, Tensor],
    beginnings: Mapping[int, Sequence[int]],
    settings: SamplingConfig,
    *,
    seed: int,
    device: torch.device,
    ends: int | Iterable[int] | None = None,
) -> dict[int, Sampled]:
    """Sample the rest of answers. An answer has at most `max_new_tokens` tokens, together with its
    beginning. One that ends with its beginning, or has reached this length, is not continued.

    Args:
        generate, encoder, prompts, settings, seed, device, ends: as in `sample_answers`.
        inputs: of the prompts, as `encoder.prompts` returns them.
        beginnings: by index of a prompt, the first tokens of its answer.

    Returns:
        The whole answers, by index of the prompt.

    Raises:
        NonFiniteLossError: as in `sample_answers`.
    """
    stops = end_tokens(encoder.processor, ends)
    left = {
        row: settings.max_new_tokens - len(tokens)
        for row, tokens in beginnings.items()
        if tokens[-1] not in stops and len(tokens) < settings.max_new_tokens
    }
    new: dict[int, list[int]] = {}
    if left:
        # All prompts run, because the rows of pixel values are not known. A prompt whose answer is
        # not continued is answered anew, and this answer is dropped.
        tails = [beginnings[row] if row in left else () for row in range(len(prompts))]
        padding = padding_token(encoder.processor, stops) or 0
        longer = append_tokens(inputs, tails, side="left", padding=padding)
        longer = {k: v.to(device) for k, v in longer.items()}
        shorter = settings.model_copy(update={"max_new_tokens": max(left.values())})
        said = _generated(generate, encoder, prompts, longer, shorter, stops, seed)
        new = {row: said[row][:count] for row, count in left.items()}
    return {
        row: _sampled([*tokens, *new.get(row, [])], stops, encoder.processor)
        for row, tokens in beginnings.items()
    }


def _generated(
    generate: Generate,
    encoder: Encoder,
    prompts: list[Record],
    inputs: dict[str, Tensor],
    settings: SamplingConfig,
    stops: list[int],
    seed: int,
    count: int = 1,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """Tokens that the model generates after each row of the inputs, with padding after the end."""
    options = neutral_settings() | {
        "max_new_tokens": settings.max_new_tokens,
        "eos_token_id": stops or None,
        "pad_token_id": padding_token(encoder.processor, stops),
    }
    if settings.temperature > 0 and seeds is not None:
        options |= {"logits_processor": LogitsProcessorList([SeededSampling(settings, seeds)])}
    elif settings.temperature > 0:
        options |= {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "num_return_sequences": count,
        }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            ids = generate(inputs, **options)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise NonFiniteLossError(
                "the model's probabilities are not finite, no answer can be sampled",
                where=f"answers to {', '.join(p.id for p in prompts[:4])}",
                hint="lower the learning rate, or raise the temperature of sampling",
            ) from error
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def _sampled(row: list[int], ends: list[int], processor: Any) -> Sampled:
    """Decode an answer up to its first end token."""
    stop = next((i for i, token in enumerate(row) if token in ends), None)
    text = processor.tokenizer.decode(row[:stop], skip_special_tokens=True)
    tokens = tuple(row if stop is None else row[: stop + 1])
    return Sampled(without_media_tokens(processor, text).strip(), stop is not None, tokens)
