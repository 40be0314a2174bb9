"""Processors and models of families with special behaviour."""

import copy
import json
from dataclasses import replace

import pytest
from PIL import Image

from mmkd.data.answers import asked
from mmkd.data.chat import render_chat
from mmkd.data.encoder import Encoder
from mmkd.data.processing import Processing
from mmkd.data.records import Records
from mmkd.errors import CheckpointError, DataError, RecipeError
from mmkd.modeling.capture import check_supported
from mmkd.modeling.layer_checks import check_attention
from mmkd.recipe import DataConfig
from mmkd_models.parts import find_parts
from tests.support.processors import gemma3, llava, llava_onevision, paligemma, qwen, smolvlm
from tests.support.templates import LLAVA
from tests.support.zoo import ZOO


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
    with pytest.raises(DataError, match="adds text to the rendered conversation"):
        Encoder(Records(config), processor, config).encode([0])


@pytest.fixture
def three(tmp_path):
    """Three records, the second of which has an image of its own size."""
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    Image.new("RGB", (90, 30), "red").save(tmp_path / "odd.png")
    said = [{"from": "human", "value": "<image>\ntwo ?"}, {"from": "gpt", "value": "two cats"}]
    rows = [
        {"id": name, "image": f"{image}.png", "conversations": said}
        for name, image in (("a", "red"), ("odd", "odd"), ("b", "red"))
    ]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    return DataConfig(train=str(data))


class Refusing:
    """An image processor that raises something at images of one size."""

    def __init__(self, inner, error):
        self.inner, self.error = inner, error

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __call__(self, images, **settings):
        pictures = [p for row in images for p in (row if isinstance(row, list) else [row])]
        if any(p.size == (90, 30) for p in pictures):
            raise self.error
        return self.inner(images, **settings)


def refusing(error):
    processor = copy.copy(llava())
    processor.image_processor = Refusing(processor.image_processor, error)
    return processor


@pytest.mark.parametrize("pack", [None, 200])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("too wide"), "refuses it: too wide"),
        (RuntimeError("stack expects each tensor\nto be equal size"), "RuntimeError stack expects"),
        (TypeError("no integer"), "refuses it: TypeError no integer"),
        (IndexError("tuple index"), "refuses it: IndexError tuple index"),
        (KeyError("pixel_values"), "refuses it: KeyError 'pixel_values'"),
        (ZeroDivisionError(), "refuses it: ZeroDivisionError"),
        (StopIteration(), "refuses it: StopIteration"),
        (AssertionError(), "refuses it: AssertionError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_processor_raises_is_its_refusal_of_a_record(three, error, said, pack):
    processor = refusing(error)
    with pytest.raises(DataError, match=r"record 1 \(id odd\)") as caught:
        Encoder(Records(three), processor, three, pack=pack).encode([0, 1, 2])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    config = three.model_copy(update={"on_bad_record": "skip"})
    skipping = Encoder(Records(three), processor, config, pack=pack)
    batch = skipping.encode([0, 1, 2])
    assert len(batch.ids) == 3
    assert "odd" not in batch.ids
    assert [said in reason for reason in batch.skipped] == [True]
    assert skipping.length(1) == skipping.length(0)


def test_a_prompt_that_is_refused_names_its_own_record(three):
    records = Records(three)
    encoder = Encoder(records, refusing(ValueError("too wide")), three)
    prompts = [asked(records[i], 1) for i in range(3)]
    with pytest.raises(DataError, match=r"^record odd: the processor refuses it: too wide"):
        encoder.prompts(prompts)
    gone = replace(prompts[2], images=["gone.png"])
    with pytest.raises(DataError, match=r"^record b: no such image: gone\.png"):
        encoder.prompts([prompts[0], gone])


@pytest.mark.parametrize("error", [OSError(28, "No space left"), MemoryError(), ImportError("cv2")])
def test_a_full_disk_or_a_missing_package_is_no_records_fault(three, error):
    config = three.model_copy(update={"on_bad_record": "skip"})
    with pytest.raises(type(error)):
        Encoder(Records(three), refusing(error), config).encode([0, 1, 2])


COUNTED = "numbers of image tokens and features differ"


@pytest.mark.parametrize(
    ("make", "texts", "kind"),
    [
        # Two images in all, as transformers counts them, but not in their own rows.
        (
            llava,
            ["USER: <image><image> two ? ASSISTANT: two", "USER: two ? ASSISTANT: two"],
            COUNTED,
        ),
        (qwen, ["<|image_pad|><|image_pad|> two ?", "two ?"], COUNTED),
        (smolvlm, ["<image><image> two ?", "two ?"], "the processor refuses it"),
        # A token of features that no image has made.
        (
            gemma3,
            ["<bos><start_of_image> two", "<bos><start_of_image> <image_soft_token> two"],
            COUNTED,
        ),
    ],
)
def test_image_tokens_are_counted_against_features_before_the_model_runs(make, texts, kind):
    picture = Image.new("RGB", (40, 40), "red")
    with pytest.raises(DataError) as error:
        Processing(make())(texts, [[picture], [picture]])
    assert error.value.kind == kind


def test_a_model_whose_parts_are_not_found_is_refused():
    with pytest.raises(CheckpointError, match="no base model separate from its head") as caught:
        check_supported(ZOO["nemotron_h_omni"].make(), "teacher")
    assert "docs/families.md" in str(caught.value)


def test_layers_without_attention_are_not_compared():
    first, second = find_parts(ZOO["qwen3_5"].make()).decoder_layers
    check_attention("stage", {"student layer 1": second})
    with pytest.raises(RecipeError, match="student layer 0 has no self_attn"):
        check_attention("stage", {"student layer 1": second, "student layer 0": first})
