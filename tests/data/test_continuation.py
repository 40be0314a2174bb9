"""Answers that go on from given tokens."""

import pytest
import torch
from PIL import Image

from mmkd.data.answers import asked, continue_answers, generate_of, sample_answers
from mmkd.data.continuation import append_tokens
from mmkd.data.encoder import Encoder
from mmkd.recipe import DataConfig, SamplingConfig
from tests.support.written_records import conversations, records
from tests.support.zoo import ZOO

CPU = torch.device("cpu")
MADE = [name for name, member in ZOO.items() if member.processor and name != "paligemma"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_appended_behind_the_prompts(side):
    inputs = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 4], [0, 0, 0, 3]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]),
        "token_type_ids": torch.tensor([[0, 0, 2, 2], [2, 0, 0, 2], [0, 0, 0, 2]]),
        "pixel_values": torch.ones(3, 3, 4, 4),
    }
    made = append_tokens(inputs, [[11, 12, 13], []], side=side, padding=1)
    rows = [[5, 6, 11, 12, 13], [7, 8, 9, 4], [3]]
    types = [[2, 2, 0, 0, 0], [2, 0, 0, 2], [2]]

    def padded(row, value):
        rest = [value] * (5 - len(row))
        return [*rest, *row] if side == "left" else [*row, *rest]

    assert made["input_ids"].tolist() == [padded(row, 1) for row in rows]
    assert made["attention_mask"].tolist() == [padded([1] * len(row), 0) for row in rows]
    assert made["token_type_ids"].tolist() == [padded(row, 0) for row in types]
    assert made["pixel_values"] is inputs["pixel_values"]


@pytest.fixture
def question(tmp_path):
    def make(name):
        try:
            processor = ZOO[name].processor()
        except ImportError:
            pytest.skip("needs torchvision")
        Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
        texts = ["<image>\ndog ?", "two cats <image> and a dog ?"]
        rows = [
            {"id": str(i), "image": "red.png",
             "conversations": conversations([("human", text), ("gpt", "two")])}
            for i, text in enumerate(texts)
        ]  # fmt: skip
        encoder = Encoder(records(tmp_path, rows), processor, DataConfig(train="-"))
        prompts = [asked(encoder.records[i], 1) for i in range(2)]
        return encoder, prompts, generate_of(ZOO[name].make())

    return make


@pytest.mark.parametrize("family", MADE)
def test_a_greedy_answer_goes_on_as_before_wherever_it_is_cut(question, family):
    """On tokens: also where the text of the beginning would be tokenized otherwise."""
    encoder, prompts, generate = question(family)
    settings = SamplingConfig(max_new_tokens=6, temperature=0)
    inputs = encoder.prompts(prompts)
    options = {"seed": 0, "device": CPU}
    whole = sample_answers(generate, encoder, prompts, settings, inputs=inputs, **options)
    assert whole == sample_answers(generate, encoder, prompts, settings, **options)
    tokens = [answer.tokens for answer in whole]
    for cuts in ((1, 3), (4, 2)):
        beginnings = {
            row: said[:at]
            for row, (said, at) in enumerate(zip(tokens, cuts, strict=True))
            if len(said) > at
        }
        found = continue_answers(
            generate, encoder, prompts, inputs, beginnings, settings, **options
        )
        assert found == {row: whole[row] for row in beginnings}
        assert found


def test_an_answer_with_an_end_or_of_full_length_is_not_continued(question):
    encoder, prompts, _ = question("llava")
    end = encoder.processor.tokenizer.eos_token_id
    settings = SamplingConfig(max_new_tokens=3, temperature=0)
    beginnings = {0: [50, end], 1: [50, 51, 52]}
    found = continue_answers(
        None, encoder, prompts, encoder.prompts(prompts), beginnings, settings, seed=0, device=CPU
    )
    assert [(found[i].tokens, found[i].finished) for i in (0, 1)] == [
        ((50, end), True),
        ((50, 51, 52), False),
    ]


def test_an_answer_keeps_to_its_own_limit(question):
    encoder, prompts, generate = question("llava")
    words = encoder.processor.tokenizer("two cats", add_special_tokens=False)["input_ids"]
    settings = SamplingConfig(max_new_tokens=8, temperature=0)
    beginnings = {0: words[:1], 1: [*words[:1] * 6]}
    found = continue_answers(
        generate, encoder, prompts, encoder.prompts(prompts), beginnings, settings, seed=0,
        device=CPU,
    )  # fmt: skip
    for row, tokens in beginnings.items():
        assert list(found[row].tokens[: len(tokens)]) == list(tokens)
        assert found[row].finished or len(found[row].tokens) == 8
