"""Answers that `max_length` cuts off: an error that names the record, or a counted skip."""

import json

import pytest
import torch
import yaml
from PIL import Image
from pydantic import TypeAdapter

from mmkd.commands import check_data
from mmkd.commands.build_cache import build_cache
from mmkd.commands.plan import make_plan
from mmkd.data.answers import Sampled
from mmkd.data.encoder import Encoder
from mmkd.data.templates import render
from mmkd.errors import DataError
from mmkd.objectives.entry import AnyObjectiveConfig
from mmkd.recipe import DataConfig, OnPolicyConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.training.on_policy import OnPolicy
from tests.commands.test_check_data import found, run
from tests.support.processors import FAMILIES, llava, qwen
from tests.support.recipes import tiny_recipe
from tests.support.written_records import conversations, records

LONG = "How many cats and how many dogs are there ? " * 4
SHORT_TURNS = [("human", "<image>\ntwo ?"), ("gpt", "two cats")]
LONG_TURNS = [("human", f"<image>\n{LONG}"), ("gpt", "two cats")]
LOST = "cuts off its whole answer"


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 24), "red").save(tmp_path / "red.png")
    return tmp_path


def row(name, turns):
    return {"id": name, "image": "red.png", "conversations": conversations(turns)}


def limit_of(data, processor, index=0, more=0):
    """`max_length` that leaves `more` tokens of a record's first answer."""
    targets = Encoder(data, processor, DataConfig(train="-")).encode([index]).targets
    return int(targets.response[0].nonzero()[0]) + more


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pack", [None, 400])
def test_a_record_without_its_answer_is_named_or_skipped(folder, family, pack):
    processor = FAMILIES[family]()
    data = records(folder, [row("short", SHORT_TURNS), row("long", LONG_TURNS)])
    limit = limit_of(data, processor, index=1)
    stopping = Encoder(data, processor, DataConfig(train="-", max_length=limit), pack=pack)
    with pytest.raises(DataError, match=rf"record 1 \(id long\): max_length {limit} {LOST}"):
        stopping.encode([0, 1])
    assert stopping.length(1) == 0
    config = DataConfig(train="-", max_length=limit, on_bad_record="skip")
    skipping = Encoder(data, processor, config, pack=pack)
    batch = skipping.encode([1, 0])
    assert batch.ids == ["short", "short"]
    assert [LOST in reason for reason in batch.skipped] == [True]
    assert skipping.length(1) == skipping.length(0) == stopping.length(0) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_that_is_cut_in_part_stays(folder, family):
    processor = FAMILIES[family]()
    data = records(folder, [row("long", LONG_TURNS)])
    limit = limit_of(data, processor, more=1)
    encoder = Encoder(data, processor, DataConfig(train="-", max_length=limit))
    assert int(encoder.encode([0]).targets.response.sum()) == 1
    assert encoder.length(0) == limit


def test_of_several_answers_one_is_enough(folder):
    data = records(folder, [row("r", [*SHORT_TURNS, ("human", LONG), ("gpt", "two cats")])])
    limit = limit_of(data, llava(), more=4)
    encoder = Encoder(data, llava(), DataConfig(train="-", max_length=limit))
    assert 0 < int(encoder.encode([0]).targets.response.sum()) <= 4
    with pytest.raises(DataError, match=LOST):
        Encoder(data, llava(), DataConfig(train="-", max_length=limit - 4)).encode([0])


@pytest.mark.parametrize("pack", [None, 400])
def test_both_answers_of_a_pair_need_a_token(folder, pack):
    asked, chosen = conversations(LONG_TURNS)
    pair = {"id": "pair", "image": "red.png", "chosen": [asked, chosen]}
    pair["rejected"] = [asked, {"from": "gpt", "value": "a dog"}]
    data = records(folder, [pair])
    limit = limit_of(data, qwen())
    encoder = Encoder(data, qwen(), DataConfig(train="-", max_length=limit), pairs=True, pack=pack)
    with pytest.raises(DataError, match=rf"\(id pair\): max_length {limit} {LOST}"):
        encoder.encode([0])
    assert encoder.length(0) == 0


def test_the_teachers_own_view_needs_the_answer_too(folder):
    """Else nothing of it is compared, and the other objectives go on alone."""
    data = records(folder, [row("r", SHORT_TURNS)])
    lengths = {p: limit_of(data, p) for p in (llava(), qwen())}
    student, teacher = sorted(lengths, key=lengths.get)
    limit = lengths[teacher]
    assert lengths[student] < limit
    config = DataConfig(train="-", max_length=limit)
    encoder = Encoder(data, student, config, teacher_processor=teacher, chunks=True, aligned=False)
    with pytest.raises(DataError, match=rf"\(id r\), for the teacher: max_length {limit} {LOST}"):
        encoder.encode([0])


@pytest.mark.parametrize(
    ("objective", "needed"),
    [
        ({"kind": "ce"}, True),
        ({"kind": "kl"}, True),
        ({"kind": "affinity"}, True),
        ({"kind": "embedding"}, True),
        ({"kind": "alm"}, True),
        ({"kind": "relation"}, False),
        ({"kind": "kl", "region": "vision"}, False),
        ({"kind": "ce", "region": "prompt"}, False),
    ],
)
def test_what_reads_no_answer_needs_none(folder, objective, needed):
    data = records(folder, [row("long", LONG_TURNS)])
    config = DataConfig(train="-", max_length=limit_of(data, llava()))
    settings = TypeAdapter(AnyObjectiveConfig).validate_python(objective)
    encoder = Encoder.of([settings], config, llava(), records=data)
    if needed:
        with pytest.raises(DataError, match=LOST):
            encoder.encode([0])
    else:
        assert encoder.encode([0]).targets.attention.any()


@pytest.mark.parametrize("pack", [None, 400])
def test_a_student_is_not_asked_for_an_answer_that_has_no_room(folder, pack, monkeypatch):
    """Of a conversation that is cut, only the answers before the cut are sampled."""
    data = records(folder, [row("r", [*SHORT_TURNS, ("human", LONG), ("gpt", "a dog")])])
    processor = llava()
    limit = limit_of(data, processor, more=3)
    config = DataConfig(train="-", max_length=limit)
    encoder = Encoder(data, processor, config, pack=pack)
    asked = []

    def sampled(generate, encoder, prompts, *args, **settings):
        asked.extend(render(processor, p.messages, prompt=True) for p in prompts)
        return [Sampled("two cats and a dog", True)] * len(prompts)

    monkeypatch.setattr("mmkd.training.on_policy.sample_answers", sampled)

    class Engine:
        world_size, rank, device, generate = 1, 0, torch.device("cpu"), None

        def autocast(self):
            return torch.autocast("cpu", enabled=False)

    policy = OnPolicy(OnPolicyConfig(lmbda=1.0), encoder, Engine(), seed=0)
    for step in range(8):
        batch, count = policy.batch(encoder.encode([0]), step, 0)
        assert count.sampled == 1
        assert batch.targets.response.any()
    assert len(asked) == 8
    assert not any("dogs are there" in prompt for prompt in asked)
    tight = Encoder(data, processor, config.model_copy(update={"max_length": 3}))
    assert not tight.has_room(data[0])


def write(folder, scenes_dir, model, **data):
    records(folder, [row("short", SHORT_TURNS), row("long", LONG_TURNS)])
    raw = tiny_recipe(scenes_dir, model, folder / "runs")
    raw["data"] = {"train": str(folder / "data.json"), **data}
    return raw


def test_check_plan_and_run_name_the_record(
    folder, scenes_dir, tiny_model_dir, monkeypatch, capsys
):
    raw = write(folder, scenes_dir, tiny_model_dir, max_length=100)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    status, said = found(monkeypatch, capsys, folder / "recipe.yaml", "--workers", 1)
    assert (status, said["good"], said["bad"]) == (1, False, 0)
    (tokens,) = said["tokens"]
    assert (tokens["sampled"], tokens["without answer"], tokens["cut"]) == (2, 1, 0.5)
    assert tokens["places"] == [f"{folder}/data.json: record 1 (id long)"]
    status, out, _ = run(monkeypatch, capsys, folder / "recipe.yaml", "--workers", 1)
    assert status == 1
    assert "record 1 (id long): max_length 100 cuts off its whole answer" in out
    assert "1 of 2 sampled records lose their whole answer -- raise data.max_length" in out
    assert "all good" not in out
    with pytest.raises(DataError, match=rf"\(id long\): max_length 100 {LOST}"):
        make_plan(load_recipe(raw))
    with pytest.raises(DataError, match=rf"\(id long\): max_length 100 {LOST}"):
        pipeline.run(load_recipe(raw))


def test_check_finds_answers_that_the_teacher_loses(
    folder, scenes_dir, tiny_model_dir, monkeypatch, capsys
):
    """A teacher with a processor of its own has other tokens before the answer."""
    raw = write(folder, scenes_dir, tiny_model_dir)
    data = records(folder, [row("short", SHORT_TURNS)])
    raw["stages"][0]["objectives"] = [{"kind": "alm"}]
    raw["teacher"] = {"model": str(tiny_model_dir)}
    lengths = {p: limit_of(data, p) for p in (llava(), qwen())}
    student, other = sorted(lengths, key=lengths.get)
    assert lengths[student] < lengths[other]
    raw["data"]["max_length"] = lengths[other]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(check_data, "converted_processor", lambda config: student)
    for teacher, lost in ((student, 0), (other, 1)):
        monkeypatch.setattr(check_data, "load_processor", lambda config, made=teacher: made)
        status, said = found(monkeypatch, capsys, folder / "recipe.yaml", "--workers", 1)
        assert (status, said["tokens"][0]["without answer"]) == (lost, lost)


def test_a_skipped_record_is_counted_by_a_run(folder, scenes_dir, tiny_model_dir):
    raw = write(folder, scenes_dir, tiny_model_dir, max_length=100, on_bad_record="skip")
    pipeline.run(load_recipe(raw))
    stage = next((folder / "runs").rglob("01-mimic"))
    steps = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert sum(step["skipped"] for step in steps) > 0
    assert LOST in (stage / "skipped.jsonl").read_text()
    assert all(step["loss"] > 0 for step in steps)


def test_a_cache_names_the_record_too(folder, scenes_dir, tiny_model_dir):
    raw = write(folder, scenes_dir, tiny_model_dir, max_length=100)
    raw["stages"][0]["objectives"] = [{"kind": "kl"}]
    cache = {"folder": str(folder / "cache")}
    raw["teacher"] = {"model": str(tiny_model_dir), "source": "cache", "cache": cache}
    with pytest.raises(DataError, match=rf"\(id long\): max_length 100 {LOST}"):
        build_cache(load_recipe(raw))
    raw["data"]["on_bad_record"] = "skip"
    store = build_cache(load_recipe(raw))
    raw["stages"][0]["steps"] = 2
    pipeline.run(load_recipe(raw))
    assert store.manifest["max_length"] == 100
