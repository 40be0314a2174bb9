"""Truncated answers are trained without an end of turn, and answers are stored at once."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from mmkd.data.answers import Sampled
from mmkd.data.encoder import Encoder
from mmkd.data.samples import Sample
from mmkd.errors import DataError
from mmkd.recipe import DataConfig, OnPolicyConfig
from mmkd.training.on_policy import OnPolicy
from tests.support.layouts import put, read, turns
from tests.support.processors import END, FAMILIES

PLAIN = DataConfig(train="-")
SAID = ("<image>\nHow many cats?", "two cats", "And dogs?", "a dog and")


def rows(folder):
    """A record, and the same one whose last answer was cut off."""
    row = {"id": "a", "image": put(folder, "a.png"), "conversations": turns(*SAID)}
    (folder / "a.json").write_text(json.dumps([row, {**row, "unfinished": True}]))
    return read(folder / "a.json")


def responses(batch, processor):
    found = zip(batch.targets.input_ids, batch.targets.response, strict=True)
    return [processor.tokenizer.decode(ids[mask]) for ids, mask in found]


@pytest.mark.parametrize("pack", [None, 400])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_cut_answer_is_not_supervised(tmp_path, family, pack):
    processor, records = FAMILIES[family](), rows(tmp_path)
    whole, cut = (
        "".join(responses(Encoder(records, processor, PLAIN, pack=pack).encode([i]), processor))
        for i in range(2)
    )
    assert whole.rstrip().endswith("dog and" + END[family])
    assert cut.rstrip().endswith("dog and")
    assert whole.startswith(cut)  # the end of the earlier turn stays
    encoder = Encoder(records, processor, PLAIN)
    keys = {encoder.load(i).key for i in range(2)}
    assert len(keys) == 2  # a teacher's cache tells them apart
    assert isinstance(encoder.load(1), Sample)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("finished", [True, False])
def test_on_policy_answers_that_were_cut_have_no_end(tmp_path, family, finished, monkeypatch):
    processor = FAMILIES[family]()
    records = rows(tmp_path)
    encoder = Encoder(records, processor, PLAIN)
    said = [Sampled("a red hat", finished)]
    monkeypatch.setattr("mmkd.training.on_policy.sample_answers", lambda *_, **__: said)
    engine = SimpleNamespace(
        world_size=1, rank=0, generate=None, device=torch.device("cpu"), autocast=torch.no_grad
    )
    policy = OnPolicy(OnPolicyConfig(lmbda=1.0), encoder, engine, seed=0)
    made, count = policy.batch(encoder.encode([0]), step=0, micro=0)
    (text,) = responses(made, processor)
    assert count.sampled == 1
    assert text.strip() == "a red hat" + (END[family] if finished else "")
    # A response needs a token: of an empty one that is its end.
    said[0] = Sampled("", finished)
    made, _ = policy.batch(encoder.encode([0]), step=0, micro=0)
    assert responses(made, processor)[0].strip() == END[family]


def test_on_policy_answers_that_a_template_changes_leave_the_data_sets(tmp_path, monkeypatch):
    """Qwen3's template takes what is before `</think>` out of an answer."""
    processor = copy.copy(FAMILIES["qwen"]())
    whole = "{{ c['text'] }}"
    assert whole in processor.chat_template
    processor.chat_template = processor.chat_template.replace(
        whole, "{{ c['text'].split('</think>')[-1] }}"
    )
    records = rows(tmp_path)
    said = [Sampled("Hm. </think> two hats", True), Sampled("a red hat", True)]
    monkeypatch.setattr("mmkd.training.on_policy.sample_answers", lambda *_, **__: said)
    engine = SimpleNamespace(
        world_size=1, rank=0, generate=None, device=torch.device("cpu"), autocast=torch.no_grad
    )
    encoder = Encoder(records, processor, PLAIN)
    policy = OnPolicy(OnPolicyConfig(lmbda=1.0), encoder, engine, seed=0)
    data = encoder.encode([0, 0])
    made, count = policy.batch(data, step=0, micro=0)
    kept, sampled = responses(made, processor)
    assert (count.sampled, kept) == (1, responses(data, processor)[0])
    assert sampled.strip() == "a red hat" + END["qwen"]


def test_what_may_be_unfinished(tmp_path):
    one = {"id": "a", "conversations": turns("?", "yes"), "unfinished": "no"}
    pair = {"id": "b", "question": "?", "chosen": "a", "rejected": "b", "unfinished": True}
    open_end = {"id": "c", "conversations": turns("?", "yes", "And?"), "unfinished": True}
    (tmp_path / "a.json").write_text(json.dumps([one, pair, open_end]))
    records = read(tmp_path / "a.json")
    for index, message in enumerate(["'unfinished' is 'no'", "end with one answer", "end with"]):
        with pytest.raises(DataError, match=message):
            records[index]
