"""A bad value anywhere in a record affects that record only."""

import copy
import datetime
import decimal
import json
import os
import random
import signal

import pytest
from PIL import Image

from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.data.schema import parse_record, record_id
from mmkd.data.stream import BatchStream
from mmkd.errors import DataError, PeerError
from mmkd.recipe import BatchConfig, DataConfig
from scripts.attacks.mutate import places
from tests.support.drawn_pictures import png
from tests.support.layouts import turns
from tests.support.processors import FAMILIES

ASKED, ANSWERED = turns("<image>\nq", "a")
GOOD = [
    {"id": "1", "image": "a.png", "conversations": [ASKED, ANSWERED], "unfinished": True,
     "objects": [{"name": "cat", "box": [0, 0, 1, 1]}]},
    {"id": "1", "images": ["a.png"], "messages": [
        {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a"}]},
    {"photo_path": "x.png", "messages": [
        {"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
            {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    {"images": [{"bytes": b"x", "path": "a.png"}], "texts": [{"user": "q", "assistant": "a"}]},
    {"image": "a.png", "chosen": [ASKED, ANSWERED], "rejected": turns("<image>\nq", "b")},
    {"images": ["a.png"], "prompt": [{"role": "user", "content": "q"}],
     "chosen": [{"role": "assistant", "content": "a"}],
     "rejected": [{"role": "assistant", "content": "b"}]},
    {"image": "a.png", "question": "q", "chosen": "a", "rejected": "b"},
]  # fmt: skip


def nested(depth, wrap):
    value = wrap([])
    for _ in range(depth):
        value = wrap(value)
    return value


ODD = [
    *(None, True, False, 0, 1, -1, 10**400, 10**5000, 1e308, float("nan"), float("inf")),
    *("", "x", "<image>", "\ud800", "\x00", "a\nb -- c", "x" * 100_000, b"", b"x"),
    *([], [[]], ["text"], [None], [1], [{}], {}, {"a": 1}, {1: 2}, {None: None}, (1, 2), set()),
    *({"bytes": b""}, {"url": {}}, {"path": []}, {"type": "image", "image": {"image": {}}}),
    *({"type": ["a"]}, {"type": {}}, {"role": []}, {"role": {}}, {"role": "user"}),
    *({"base64": "="}, {"data": 1}, "data:image/png;base64,AAAAA", "data:", "http://x"),
    *("file:///etc/passwd", "FILE:x", "s3://b", datetime.datetime(2026, 1, 1), decimal.Decimal(1)),
    *(nested(3000, lambda v: [v]), nested(3000, lambda v: {"a": v})),
]
KEYS = [
    *("id", "idx", "image", "images", "conversations", "messages", "texts", "chosen", "rejected"),
    *("prompt", "question", "objects", "unfinished", "kto_tag", "video", "tools", "img_path"),
    *("system", "type", "text", "content", "value", "role", "from", "weight", "index", "bytes"),
    *("url", "source", "tool_calls", 1, None, "x" * 1000, ""),
]


def put(value, path, new):
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


def at(value, path):
    return at(value[path[0]], path[1:]) if path else value


def spoilt(good):
    """The record with one odd value, or one odd key beside others."""
    for path in [(), *places(good)]:
        for odd in ODD:
            if path:
                yield put(good, path, odd)
            if isinstance(at(good, path), dict):
                for key in KEYS:
                    yield put(good, path, {**at(good, path), key: odd})


def refusal(row):
    try:
        parse_record(row, 0)
    except DataError as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("good", GOOD, ids=lambda good: "-".join(good))
def test_any_value_at_any_place_is_read_or_refused_in_one_line(good):
    draw, tried = random.Random(0), 0
    for row in spoilt(good):
        if draw.random() > 0.15:
            continue
        tried += 1
        record_id(row)
        said = refusal(row)
        assert said.isprintable()
        assert len(said) < 1000
    assert tried > 200


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "NaN", '"x"', "{"])
def test_lines_that_are_no_records_spoil_themselves_only(tmp_path, line):
    good = json.dumps({"conversations": turns("?", "yes")})
    (tmp_path / "a.jsonl").write_text(f"{good}\n{line}\n{good}\n")
    deep = json.dumps({"conversations": turns("?", "yes"), "x": nested(900, lambda v: [v])})
    (tmp_path / "a.jsonl").open("a").write(deep + "\n")
    records = Records(DataConfig(train=str(tmp_path / "a.jsonl")))
    assert len(records) == 4
    for number in (1, 3):
        with pytest.raises(DataError) as refused:
            records[number]
        assert "\n" not in str(refused.value)
    skipped = []
    assert records.usable(1, records.__getitem__, skipped).id in ("0", "2")


@pytest.fixture
def stream(tmp_path):
    """Batches of four records, of which the second has an image of 80,000,000 x 1 pixels."""
    (tmp_path / "long.png").write_bytes(png(80_000_000, 1))
    Image.new("RGB", (40, 24), "red").save(tmp_path / "a.png")
    rows = [
        {
            "id": str(i),
            "image": "long.png" if i == 1 else "a.png",
            "conversations": turns("<image>?", "yes"),
        }
        for i in range(4)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))

    def make(**data):
        workers = data.pop("workers")
        config = DataConfig(train=str(tmp_path / "a.json"), **data)
        encoder = Encoder(Records(config), FAMILIES["llava"](), config)
        return BatchStream(encoder, BatchConfig(size=4), seed=0, workers=workers)

    return make


@pytest.mark.parametrize("workers", [0, 2])
def test_one_bad_picture_is_one_line_whoever_reads_it(stream, workers):
    with pytest.raises(DataError, match=r"record 1 \(id 1\): long.png is too large") as refused:
        list(stream(workers=workers).steps(0, 3))
    assert "\n" not in str(refused.value)
    (batches,) = stream(workers=workers, on_bad_record="skip").steps(0, 1)
    assert "1" not in batches[0].ids
    assert "too large" in batches[0].skipped[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS])
def test_a_killed_worker_is_one_line(stream, monkeypatch, number):
    main = os.getpid()
    encode = Encoder.encode

    def killed(self, indices):
        if os.getpid() != main:
            os.kill(os.getpid(), number)
        return encode(self, indices)

    monkeypatch.setattr(Encoder, "encode", killed)
    with pytest.raises(PeerError) as told:
        list(stream(workers=1, on_bad_record="skip").steps(0, 3))
    assert str(told.value).startswith("data.workers: a process that prepares batches was killed --")
