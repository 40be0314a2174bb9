"""Chat templates that take content as parts, as a string, or not at all."""

import copy
import re

import pytest
from PIL import Image

from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.data.samples import blank_sample
from mmkd.data.templates import (
    check_processor,
    media_tokens,
    render,
    string_roles,
    without_media_tokens,
)
from mmkd.errors import CheckpointError, DataError
from mmkd.evaluation.adapter import MmkdModel
from mmkd.recipe import DataConfig
from tests.support.processors import FAMILIES
from tests.support.templates import QWEN
from tests.support.written_records import TURNS, conversations, records
from tests.support.zoo import ZOO

END = "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
STRINGS = {
    "prints it": "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }} {% endfor %}",
    "adds to it": "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}"
    "{% endfor %}",
    "calls it": "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'].strip() }} "
    "{% endfor %}",
    "trims it": "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] | trim }} "
    "{% endfor %}",
    "prints it as JSON": "{% for m in messages %}{{ m['role'].upper() }}: "
    "{{ m['content'] if m['content'] is string else m['content'] | tojson }} {% endfor %}",
}
MIXED = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% if m['role'] == 'user' %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% else %}{{ m['content'] }}{% endif %} "
    "{% endfor %}"
)
REFUSED = {
    "first part's text": "{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}",
    "no words": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
    "other keys": "{% for m in messages %}{{ m['value'] }}{% endfor %}",
    "no images": "{% for m in messages %}{% for c in m['content'] if c['type'] == 'text' %}"
    "{{ c['text'] }}{% endfor %}{% endfor %}",
    "always raises": "{{ raise_exception('no') }}",
}


def with_template(name, template):
    processor = copy.copy(FAMILIES[name]())
    processor.chat_template = template
    return processor


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "red.png")
    return tmp_path


def batch_of(folder, processor, turns=TURNS):
    row = {"id": "r", "image": "red.png", "conversations": conversations(turns)}
    return Encoder(records(folder, [row]), processor, DataConfig(train="-")).encode([0])


@pytest.mark.parametrize("how", STRINGS)
def test_a_template_of_strings_makes_the_same_tokens_as_one_of_parts(folder, how):
    expected = batch_of(folder, FAMILIES["llava"]())
    found = batch_of(folder, with_template("llava", STRINGS[how] + END))
    for name in ("input_ids", "response", "vision"):
        assert getattr(found.targets, name).equal(getattr(expected.targets, name)), name


def test_roles_may_differ(folder):
    processor = with_template("llava", MIXED + END)
    assert string_roles(processor) == {"assistant", "system"}
    expected = batch_of(folder, FAMILIES["llava"]())
    assert batch_of(folder, processor).targets.response.equal(expected.targets.response)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", STRINGS)
def test_strings_have_the_familys_placeholder(folder, family, how):
    processor = with_template(family, STRINGS[how] + END)
    assert string_roles(processor) >= {"user", "assistant"}
    batch = batch_of(folder, processor)
    known = batch_of(folder, FAMILIES[family]())
    assert batch.targets.vision.sum() == known.targets.vision.sum() > 0
    said = processor.tokenizer.decode(batch.targets.input_ids[0][batch.targets.response[0]])
    assert "two cats and a dog" in said.replace("  ", " ")
    assert "type" not in processor.tokenizer.decode(batch.targets.input_ids[0])
    assert blank_sample(processor).rendered.text.count(processor.image_token) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_own_templates_take_parts(family):
    assert string_roles(FAMILIES[family]()) == frozenset()


@pytest.mark.parametrize("how", REFUSED)
def test_what_a_template_cannot_take_is_refused_by_name_before_any_record(folder, how):
    processor = with_template("llava", REFUSED[how])
    with pytest.raises(CheckpointError, match=r"the chat template (takes content|writes no)"):
        check_processor(processor)
    row = {"id": "r", "image": "red.png", "conversations": conversations(TURNS)}
    with pytest.raises(CheckpointError, match="chat template"):
        Encoder(records(folder, [row]), processor, DataConfig(train="-"))
    with pytest.raises(CheckpointError, match="chat template"):
        MmkdModel(model=ZOO["llava"].make(), processor=processor)


def test_a_replaced_template_is_tried_again():
    processor = with_template("qwen", QWEN)
    assert not string_roles(processor)
    processor.chat_template = STRINGS["adds to it"]
    assert string_roles(processor)


def test_a_turn_that_the_template_leaves_out_is_a_bad_record(folder):
    template = FAMILIES["llava"]().chat_template.replace(
        "for m in messages", "for m in messages if m['role'] != 'system'"
    )
    turns = [("system", "Answer in French."), *TURNS[:2]]
    with pytest.raises(DataError, match="leaves out or changes the text of 'system' in turn 0"):
        batch_of(folder, with_template("llava", template), turns)
    batch_of(folder, FAMILIES["llava"](), turns)


def test_an_image_that_the_template_writes_twice_is_a_bad_record(folder):
    template = (
        "{% if messages | length > 2 %}<image>{% endif %}" + FAMILIES["llava"]().chat_template
    )
    batch_of(folder, with_template("llava", template), TURNS[:2])
    with pytest.raises(DataError, match=r"2 image placeholder\(s\) for 1 image"):
        batch_of(folder, with_template("llava", template))


def test_a_template_that_fails_at_one_record_names_it(folder):
    template = FAMILIES["llava"]().chat_template.replace(
        "c['text'] +", "(c['text'] + 1 if c['text'] == 'how?' else c['text']) +"
    )
    with pytest.raises(DataError, match=r"\(id r\): the chat template refuses it: can only"):
        batch_of(folder, with_template("llava", template), [("human", "<image>\nhow?"), TURNS[1]])


MADE = [name for name, member in ZOO.items() if member.processor and name != "paligemma"]


@pytest.mark.parametrize("name", MADE)
def test_a_literal_image_token_in_a_text_is_a_bad_record(folder, name):
    """Of the question or of the answer; a model counts it as an image's, or fails."""
    try:
        processor = ZOO[name].processor()
    except ImportError:
        pytest.skip("needs torchvision")
    tokens = media_tokens(processor)
    token = processor.tokenizer.image_token if name == "gemma3" else processor.image_token
    assert {token, processor.image_token} <= set(tokens)
    for literal in tokens:
        for question, answer in ((f"What is {literal} ?", "two"), ("dog ?", f"a {literal} two")):
            image = {"type": "image"}
            messages = [
                {"role": "user", "content": [image, {"type": "text", "text": question}]},
                {"role": "assistant", "content": answer if "<image>" not in answer else [
                    {"type": "text", "text": answer}]},
            ]  # fmt: skip
            rows = [{"id": "bad", "images": ["red.png"], "messages": messages}]
            rows += [{"id": "good", "image": "red.png", "conversations": conversations(TURNS)}]
            data: Records = records(folder, rows)
            # `<image>` is a placeholder of the records already.
            said = (
                "2 image placeholder"
                if literal == "<image>"
                else f"turn .* contains .*{re.escape(literal)}"
            )
            with pytest.raises(DataError, match=rf"record 0 \(id bad\): .*{said}"):
                Encoder(data, processor, DataConfig(train="-")).encode([0, 1])
            skipping = Encoder(data, processor, DataConfig(train="-", on_bad_record="skip"))
            batch = skipping.encode([0, 1])
            assert batch.ids == ["good", "good"]
            assert len(batch.skipped) == 1
        assert without_media_tokens(processor, f"a {literal}{literal}dog") == "a dog"
    nested = token[:2] + token + token[2:]
    assert token not in without_media_tokens(processor, nested)


def test_the_prompts_of_an_evaluation_are_checked_too():
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<image>"}]}
    ]
    with pytest.raises(DataError, match="contains <image>, which stands for an image"):
        render(FAMILIES["llava"](), messages, prompt=True)
