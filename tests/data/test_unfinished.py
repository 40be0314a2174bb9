"""Truncated answers are trained without an end of turn, and answers are stored at once."""

import copy
import importlib
import json
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from mmkd.commands import make_pairs as pairs_module
from mmkd.data.answers import Sampled
from mmkd.data.encoder import Encoder
from mmkd.data.journal import Journal
from mmkd.data.samples import Sample
from mmkd.errors import DataError, StoppedError
from mmkd.recipe import DataConfig, OnPolicyConfig, SamplingConfig
from mmkd.training.on_policy import OnPolicy
from tests.support.layouts import put, read, turns
from tests.support.pages import ROOT
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


# Answers are kept as they come


def test_a_journal_goes_on_behind_a_line_that_was_cut(tmp_path):
    path = tmp_path / "out" / "answers.jsonl"
    journal = Journal(path, {"model": "m", "pair": (1, 2)})
    journal.add({"n": 1}, {"n": 2})
    with open(path, "ab") as file:
        file.write(b'{"n": 3, "tex')
    again = Journal(path, {"model": "m", "pair": (1, 2)})
    assert again.entries == [{"n": 1}, {"n": 2}]
    again.add({"n": 4})
    assert Journal(path, {"model": "m", "pair": [1, 2]}).entries == [{"n": n} for n in (1, 2, 4)]
    with pytest.raises(DataError, match=r"answers\.jsonl: it has answers to another request"):
        Journal(path, {"model": "other"})
    path.write_bytes(b'{"mod')
    assert Journal(path, {"model": "m"}).entries == []
    again.delete()
    assert not path.exists()


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module("own_images")
    monkeypatch.setattr(module, "AT_ONCE", 2)
    return module


def test_own_images_asks_nothing_twice(example, tmp_path, tiny_model_dir, monkeypatch):
    photos = tmp_path / "photos"
    for number in range(3):
        put(photos, f"{number}.png", number)
    questions = [(f"{n}.png", p) for n in range(3) for p in ("What?", "Where?")]
    heard = []

    def sampled(generate, encoder, prompts, settings, **more):
        if len(heard) == 4:
            raise StoppedError("stopped")
        found = [(r.images[0], r.messages[0]["content"][1]["text"]) for r in prompts]
        heard.extend(found)
        return [Sampled("" if f == questions[1] else " ".join(f), f[1] == "What?") for f in found]

    monkeypatch.setattr(example, "sample_answers", sampled)
    model = example.ModelConfig(model=str(tiny_model_dir))
    data = tmp_path / "out" / "train.jsonl"
    with pytest.raises(StoppedError):
        example.write_answers(data, model, photos, questions, 8)
    assert not data.exists()
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 1 + 4
    heard.append(None)  # does not stop again
    with pytest.raises(DataError, match="another request"):
        example.write_answers(data, model, photos, questions, 9)
    example.write_answers(data, model, photos, questions, 8)
    assert heard == [*questions[:4], None, *questions[4:]]
    said = [json.loads(line) for line in data.read_text().splitlines()]
    kept = [q for q in questions if q != questions[1]]
    assert [(r["images"][0], r["messages"][0]["content"]) for r in said] == kept
    assert [r.get("unfinished", False) for r in said] == [p == "Where?" for _, p in kept]
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_damaged_journal_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    Journal(path, {"teacher": "a"}).add({"text": "two"})
    path.write_bytes(path.read_bytes().replace(b'"two"', b'"t\x00'))
    with pytest.raises(DataError, match=r"a\.jsonl: damaged \(.*\) -- delete it"):
        Journal(path, {"teacher": "a"})


def test_pairs_leave_cut_answers_out_and_ask_nothing_twice(
    scenes_dir, tiny_model_dir, tmp_path, monkeypatch
):
    calls = []

    def sampled(generate, encoder, prompts, settings, *, seed, count, **more):
        calls.append(seed)
        if len(calls) == 2:
            raise StoppedError("stopped")
        best = [" and ".join(sorted({o.name for o in r.objects})) for r in prompts]
        return [
            Sampled(text, finished)
            for names in best
            for text, finished in ((names, True), ("Nothing.", True), ("A cat, a", False))
        ]

    monkeypatch.setattr(pairs_module, "sample_answers", sampled)
    out = tmp_path / "pairs.parquet"

    def make():
        return pairs_module.make_pairs(
            str(tiny_model_dir),
            DataConfig(train=str(scenes_dir / "captions.parquet")),
            out,
            sampling=SamplingConfig(max_new_tokens=4),
            samples=3,
            limit=6,
            batch_size=2,
            device="cpu",
        )

    with pytest.raises(StoppedError):
        make()
    assert not out.exists()
    made = make()
    assert calls == [0, 1, 1, 2]
    assert (made.prompts, made.pairs, made.cut) == (6, 6, 6)
    found = pq.read_table(out).to_pylist()
    assert {row["rejected"][1]["value"] for row in found} == {"Nothing."}
    assert [p.name for p in tmp_path.iterdir()] == ["pairs.parquet"]
