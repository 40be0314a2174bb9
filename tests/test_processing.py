"""Processors and models of families that do some things in a way of their own."""

import copy
import json

import pytest
from PIL import Image
from processors import llava_onevision, paligemma
from templates import LLAVA
from zoo import ZOO

from mmkd.data.chat import render_chat
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import CheckpointError, DataError, RecipeError
from mmkd.layer_checks import check_attention
from mmkd.recipe import DataConfig
from mmkd.signals import check_supported
from mmkd_models.parts import find_parts


def test_a_generation_prompt_of_other_whitespace_is_no_other_conversation():
    """LLaVA-OneVision's conversations have a space that its generation prompt has not."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "two ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two cats"}]},
    ]
    rendered = render_chat(llava_onevision(), messages)
    assert "<|im_start|>assistant \ntwo cats" in rendered.text
    ((start, stop),) = rendered.spans
    assert rendered.text[start:stop] == "two cats<|im_end|>"


def test_a_processor_that_adds_text_of_its_own_is_refused(tmp_path):
    """PaliGemma's puts tokens into the text: every mark behind them would lie elsewhere."""
    processor = copy.copy(paligemma())
    processor.chat_template = LLAVA
    Image.new("RGB", (40, 24), "red").save(tmp_path / "red.png")
    said = [{"from": "human", "value": "<image>\ntwo ?"}, {"from": "gpt", "value": "two cats"}]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"image": "red.png", "conversations": said}]))
    config = DataConfig(train=str(data))
    with pytest.raises(DataError, match="adds text of its own"):
        Encoder(Records(config), processor, config).encode([0])


def test_a_model_whose_parts_are_not_found_is_refused():
    with pytest.raises(CheckpointError, match="no body apart from its head") as caught:
        check_supported(ZOO["nemotron_h_omni"].make(), "teacher")
    assert "docs/families.md" in str(caught.value)


def test_layers_without_attention_are_not_compared():
    first, second = find_parts(ZOO["qwen3_5"].make()).decoder_layers
    check_attention("stage", {"student layer 1": second})
    with pytest.raises(RecipeError, match="student layer 0 has no self_attn"):
        check_attention("stage", {"student layer 1": second, "student layer 0": first})
