"""Tokens of answers for the templates and tokenizers of all families."""

import copy
from dataclasses import replace

import pytest
from PIL import Image
from tokenizers import pre_tokenizers
from tokenizers.processors import ByteLevel, Sequence, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mmkd.data.chat import mark_tokens, render_chat
from mmkd.data.encoder import Encoder
from mmkd.recipe import DataConfig
from tests.support.processors import FAMILIES, llava_onevision, qwen
from tests.support.templates import LLAVA, THINKING
from tests.support.written_records import conversations, records
from tests.support.zoo import ZOO

ANSWERS = ["two", " two", "two ", "  two\n", "no", "é 🎉", "im", "end", "A", "two  cats"]
MADE = [name for name, member in ZOO.items() if member.processor and name != "paligemma"]


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    return tmp_path


def processor_of(name):
    try:
        return ZOO[name].processor()
    except ImportError:
        pytest.skip("needs torchvision")


def with_template(processor, template):
    processor = copy.copy(processor)
    processor.chat_template = template
    return processor


def encoded(folder, processor, turns, **settings):
    rows = [{"id": "r", "image": "red.png", "conversations": conversations(turns)}]
    return Encoder(records(folder, rows), processor, DataConfig(train="-", **settings)).encode([0])


def supervised(batch, processor):
    ids = batch.targets.input_ids[0][batch.targets.response[0]]
    return processor.tokenizer.decode(ids)


def turns_of(answers):
    asked = [("human", ("<image>\n" if i == 0 else "") + "dog ?") for i in range(len(answers))]
    return [
        turn for pair in zip(asked, answers, strict=True) for turn in (pair[0], ("gpt", pair[1]))
    ]


def spaceless(text):
    return "".join(text.split())


@pytest.mark.parametrize("name", MADE)
def test_every_word_of_every_answer_is_supervised(folder, name):
    """One-word answers, blanks at either side, unicode, words that are in the template too."""
    processor = processor_of(name)
    for answer in ANSWERS:
        got = spaceless(supervised(encoded(folder, processor, turns_of([answer])), processor))
        assert got.startswith(spaceless(answer)), answer
    got = spaceless(supervised(encoded(folder, processor, turns_of(ANSWERS)), processor))
    for answer in ANSWERS:
        assert spaceless(answer) in got
        got = got[got.index(spaceless(answer)) + len(spaceless(answer)) :]


@pytest.mark.parametrize("name", MADE)
def test_nothing_of_the_prompt_is_supervised(folder, name):
    processor = processor_of(name)
    batch = encoded(folder, processor, turns_of(["two"]))
    first = int(batch.targets.response[0].nonzero()[0])
    before = processor.tokenizer.decode(batch.targets.input_ids[0, :first])
    assert before.count("dog ?") == 1
    assert "two" not in before
    after = processor.tokenizer.decode(batch.targets.input_ids[0, first:])
    assert spaceless(after).startswith("two")


BLANK_PROMPT = LLAVA.replace("ASSISTANT:{%", "ASSISTANT: {%")


def metaspace(processor):
    """The processor with a tokenizer of SentencePiece's kind: a blank is part of the next word."""
    from tokenizers import Tokenizer, decoders, models, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "</s>", "<image>"], show_progress=False
    )
    words = "USER: dog ? ASSISTANT: two cats A é 🎉 im end no"
    tokenizer.train_from_iterator([words] * 3, trainer)
    processor = copy.copy(processor)
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    return processor


@pytest.mark.parametrize("make", [lambda p: p, metaspace], ids=["byte level", "metaspace"])
@pytest.mark.parametrize("answers", [["two"], [" two"], ["two", "no", "two cats"]])
def test_a_blank_that_ends_the_generation_prompt_takes_no_answer(folder, make, answers):
    """`ASSISTANT: two` has the token ` two`, which begins before the answer."""
    processor = with_template(make(FAMILIES["llava"]()), BLANK_PROMPT)
    got = supervised(encoded(folder, processor, turns_of(answers)), processor)
    assert spaceless(got) == spaceless("".join(answers)) + "</s>"


def test_a_leading_blank_is_part_of_the_answer_where_the_prompt_has_other_blanks(folder):
    processor = llava_onevision()
    batch = encoded(folder, processor, turns_of([" two"]))
    assert supervised(batch, processor) == " two<|im_end|>"


def trimming(processor):
    """The processor with a tokenizer that leaves blanks out of offsets, as Llama 3's does."""
    processor = copy.deepcopy(processor)
    processor.tokenizer._tokenizer.post_processor = ByteLevel(trim_offsets=True)
    return processor


def test_blanks_in_an_answer_are_supervised_where_offsets_are_trimmed(folder):
    said = "two    cats\n      two  cats "
    plain, trimmed = qwen(), trimming(qwen())
    expected = encoded(folder, plain, turns_of([said]))
    found = encoded(folder, trimmed, turns_of([said]))
    assert found.targets.input_ids.equal(expected.targets.input_ids)
    assert found.targets.response.equal(expected.targets.response)


@pytest.mark.parametrize("answer", ["think", "hi", "in", "k", "im", "end"])
def test_an_answer_that_the_template_writes_too_is_found_where_it_is_said(answer):
    processor = with_template(FAMILIES["qwen"](), THINKING)
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
    found = render_chat(processor, messages)
    ((start, stop),) = found.said
    assert found.text[start:stop] == answer
    assert found.text[:start].endswith("</think>\n\n")
    assert found.text[stop:].startswith("<|im_end|>")


def test_tokens_are_marked_by_what_they_hold():
    offsets = [(0, 0), (0, 9), (9, 11), (11, 15), (15, 15), (15, 16), (16, 16), (16, 20), (20, 22)]
    #          bos     prompt  blank    word    blank inside   ...      end-of-turn   behind it
    marks = mark_tokens(offsets, [(10, 20)], [(11, 16)])
    assert marks == [False, False, False, True, True, True, True, True, False]
    assert mark_tokens([(8, 12)], [(10, 20)], [(11, 16)]) == [True]
    assert mark_tokens([(8, 10)], [(10, 20)], [(10, 16)]) == [False]
    assert mark_tokens([(10, 10)], [(10, 20)], [(10, 16)]) == [False]


def appending(processor):
    """The processor with a tokenizer that puts BOS before a text and EOS behind it."""
    processor = copy.deepcopy(processor)
    end = processor.tokenizer.convert_tokens_to_ids("</s>")
    tokenizer = processor.tokenizer._tokenizer
    tokenizer.post_processor = Sequence(
        [TemplateProcessing(single="<pad> $A </s>", special_tokens=[("<pad>", 0), ("</s>", end)])]
    )
    return processor


def test_an_eos_that_the_tokenizer_appends_is_in_no_prompt_and_no_record(folder):
    processor = appending(FAMILIES["llava"]())
    rows = [
        {"id": "a", "image": "red.png", "conversations": conversations(turns_of(["two"]))},
        {
            "id": "b",
            "image": "red.png",
            "conversations": conversations(turns_of(["two cats", "no"])),
        },
    ]
    data = records(folder, rows)
    encoder = Encoder(data, processor, DataConfig(train="-"))
    ends = (encoder.encode([0, 1]).targets.input_ids == processor.tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1]
    batch = encoder.encode([0, 1])
    for row in range(2):
        ids = batch.targets.input_ids[row][batch.targets.attention[row]]
        assert int(ids[0]) == 0
        assert int(ids[-1]) == processor.tokenizer.eos_token_id
        assert encoder.length(row) == len(ids)
    asked = [data[i].messages[: 1 + 2 * i] for i in range(2)]
    prompts = [replace(data[i], messages=asked[i]) for i in range(2)]
    inputs = encoder.prompts(prompts)
    assert not (inputs["input_ids"] == processor.tokenizer.eos_token_id).any()
    assert inputs["attention_mask"][:, -1].all()
