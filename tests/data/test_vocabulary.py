"""Tokenizers and the models that they belong to."""

import copy
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmkd.commands.make_pairs import make_pairs
from mmkd.data.chat import prompt_ends_in_blank
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.data.templates import check_processor
from mmkd.data.vocabulary import same_vocabulary, shared_vocabulary
from mmkd.errors import CheckpointError
from mmkd.evaluation.adapter import MmkdModel
from mmkd.modeling.loading import load_pretrained_processor
from mmkd.recipe import DataConfig, load_recipe
from mmkd.runs import preflight
from tests.support.processors import llava, qwen
from tests.support.recipes import tiny_recipe
from tests.support.templates import LLAVA


class Words:
    """A tokenizer of these ids."""

    def __init__(self, tokens):
        self.tokens = tokens

    def get_vocab(self):
        return {token: i for i, token in self.tokens.items()}


GAP = {0: "a", 1: "b", 5: "c"}


def test_an_id_that_both_lack_is_no_difference():
    assert shared_vocabulary(Words(GAP), Words(dict(GAP))) == 6
    assert same_vocabulary(Words(GAP), Words(dict(GAP)))
    for other, said in (
        ({**GAP, 3: "d"}, "id 3 is None for the student and 'd' for the teacher"),
        ({**GAP, 9: "d"}, "id 9 is None"),
        ({0: "a", 1: "b"}, "id 5 is 'c' for the student and None"),
        ({0: "a", 1: "c", 5: "b", 7: "d"}, "id 1 is 'b' for the student and 'c'"),
    ):
        with pytest.raises(CheckpointError, match=said):
            shared_vocabulary(Words(GAP), Words(other))
        assert not same_vocabulary(Words(GAP), Words(other))


@pytest.fixture
def more_tokens(tiny_model_dir, tmp_path):
    """A model whose tokenizer has a token more than its head."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(folder)
    return folder


def test_more_tokens_than_the_head_are_refused_by_every_command(
    more_tokens, tiny_model_dir, scenes_dir, tmp_path
):
    said = r"the tokenizer has \d+ tokens, and the model's (head|embedding) has \d+ rows"
    raw = tiny_recipe(scenes_dir, more_tokens, tmp_path)
    with pytest.raises(CheckpointError, match=f"student: {said}"):
        preflight.check(load_recipe(raw))
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path)
    raw["teacher"] = {"model": str(more_tokens)}
    raw["stages"][0]["objectives"] = [{"kind": "alm"}]
    with pytest.raises(CheckpointError, match=f"teacher: {said}"):
        preflight.check(load_recipe(raw))
    with pytest.raises(CheckpointError, match=said):
        MmkdModel(str(more_tokens), device="cpu")
    with pytest.raises(CheckpointError, match=said):
        make_pairs(
            str(more_tokens),
            str(scenes_dir / "train.parquet"),
            tmp_path / "pairs.parquet",
        )


def without(folder: Path, *names: str) -> Path:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in names}))
    return folder


def test_a_tokenizer_without_a_pad_token_pads_with_another(tiny_model_dir, scenes_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    config = DataConfig(train=str(scenes_dir / "train.parquet"))
    plain = Encoder(Records(config), load_pretrained_processor(str(tiny_model_dir)), config)
    processor = load_pretrained_processor(str(without(tmp_path / "model", "pad_token")))
    assert processor.tokenizer.pad_token == processor.tokenizer.eos_token
    expected = plain.encode([0, 1, 2]).targets
    found = Encoder(Records(config), processor, config).encode([0, 1, 2]).targets
    assert found.response.equal(expected.response)
    assert found.attention.equal(expected.attention)
    assert found.input_ids[found.attention].equal(expected.input_ids[expected.attention])
    ends = (found.input_ids == processor.tokenizer.eos_token_id) & found.attention
    assert (ends & found.response).equal(ends)  # the EOS tokens of answers are still learnt


def test_a_tokenizer_without_special_tokens_is_named_itself(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    names = ("pad_token", "eos_token", "unk_token", "bos_token")
    with pytest.raises(CheckpointError, match="model: the tokenizer has no pad token"):
        load_pretrained_processor(str(without(tmp_path / "model", *names)))


def test_a_tokenizer_without_offsets_is_refused_before_any_record():
    processor = copy.copy(llava())

    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    processor.tokenizer = copy.copy(processor.tokenizer)
    processor.tokenizer.__class__ = Slow
    with pytest.raises(CheckpointError, match="does not give the offsets of its tokens"):
        check_processor(processor)


def test_a_generation_prompt_that_ends_in_a_blank_is_told():
    processor = copy.copy(llava())
    assert not prompt_ends_in_blank(processor)
    assert not prompt_ends_in_blank(qwen())
    processor.chat_template = LLAVA.replace("ASSISTANT:{%", "ASSISTANT: {%")
    assert prompt_ends_in_blank(processor)
