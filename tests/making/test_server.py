"""Answers from a server that fails on purpose: retries, errors, stops, bounds and secrets."""

import os
import signal
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise

import pytest
from PIL import Image
from pydantic import ValidationError

from mmkd.errors import DataError, ServerError, StoppedError
from mmkd.making import server as server_module
from mmkd.making import server_calls, threads
from mmkd.making.base import Answer, Request
from mmkd.making.server import ServerMaker
from mmkd.making.server_calls import Calls, TemporaryError
from mmkd.recipe import SamplingConfig
from mmkd.recipe.servers import ServerConfig
from mmkd.runtime import interrupt
from mmkd.runtime.fields import explained
from tests.support import chat_server
from tests.support.chat_server import FAULTS, MODEL

GREEDY = SamplingConfig(temperature=0, max_new_tokens=64)
KEY = "opensesame-4711-opensesame"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(server_calls, "FIRST_WAIT", 0.01)


def config_of(server, **settings):
    return ServerConfig(**({"server": server.url, "model": MODEL, "concurrency": 4} | settings))


def requests_of(count, images=1):
    """Requests with keys and seeds from 0, and an image of its own colour in each."""
    parts = [{"type": "image"}] * images
    return [
        Request(
            key=f"{i:064x}",
            messages=[
                {"role": "user", "content": [*parts, {"type": "text", "text": f"what {i}?"}]}
            ],
            images=lambda i=i: [Image.new("RGB", (16, 16), (i, 2 * i, 200))] * images,
            seed=i,
        )
        for i in range(count)
    ]


def answers_of(maker, requests, sampling=GREEDY):
    """{seed: answer}; each was kept once, by this thread."""
    kept, here = [], threading.get_ident()

    def keep(request, answer):
        assert threading.get_ident() == here
        kept.append((request.seed, answer))

    maker.answer(requests, sampling, keep)
    assert len(dict(kept)) == len(kept) == len(requests)
    return dict(kept)


def refused(server, requests, keep=lambda request, answer: None, **settings):
    """The message of the error that asking ends with."""
    with pytest.raises(ServerError) as error:
        ServerMaker(config_of(server, **settings)).answer(requests, GREEDY, keep)
    assert "\n" not in str(error.value)
    return str(error.value).replace(server.url, "URL")


def test_faults_do_not_change_answers():
    requests = requests_of(40)
    with chat_server.running() as server:
        expected = answers_of(ServerMaker(config_of(server)), requests)
        assert len(server.calls) == 40
    assert expected[7] == Answer("what 7? [(7, 14, 200)]", True)

    def third(number, body):
        return FAULTS[number // 3 % len(FAULTS)] if number % 3 == 2 else None

    with chat_server.running(fault=third) as server:
        assert answers_of(ServerMaker(config_of(server, retries=20)), requests) == expected
        failed = [call.fault for call in server.calls if call.fault is not None]
        assert set(failed) == set(FAULTS)
        assert Counter(body["seed"] for body in server.answered()) == dict.fromkeys(range(40), 1)
        assert len(server.calls) == 40 + len(failed)


def test_slow_answers_are_asked_for_again():
    """One that never comes, and one of which a byte comes now and then."""
    slow = {2: "hang", 4: "drip"}
    with chat_server.running(fault=lambda number, _: slow.get(number)) as server:
        found = answers_of(ServerMaker(config_of(server, timeout_s=1)), requests_of(6))
        assert found[5].text == "what 5? [(5, 10, 200)]"
        assert [call.fault for call in server.calls if call.fault] == ["hang", "drip"]


def test_all_threads_wait_as_long_as_the_server_asks(capsys):
    busy = (429, {"Retry_After": "1"}, {"error": {"message": "slow down"}})
    with chat_server.running(fault=lambda number, _: busy if number == 3 else None) as server:
        answers_of(ServerMaker(config_of(server, concurrency=2)), requests_of(12))
        times = [call.time for call in server.calls]
        assert max(b - a for a, b in pairwise(times[3:])) > 0.9
    assert "slow down, and it asks to wait 1 s; trying again" in capsys.readouterr().out


def test_what_was_answered_is_kept_when_retries_are_used_up():
    kept = []
    busy = (503, {}, {"error": {"message": "the GPU\nis on fire"}})
    with chat_server.running(fault=lambda _, body: busy if body["seed"] == 5 else None) as server:
        said = refused(server, requests_of(20), lambda q, a: kept.append(q.seed), retries=3)
        tries = Counter(call.body["seed"] for call in server.calls)
        assert tries.pop(5) == 4
        assert set(tries.values()) == {1}
        assert sorted(kept) == sorted(tries)  # nothing that was answered is lost
    assert said == (
        "URL: request 000000000000: no answer after 4 tries, the last one: status 503 Service "
        "Unavailable: the GPU is on fire -- check the server; run the same command again to go on"
    )


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((400, {}, {"error": {"message": "prompt is too long"}}),
         "status 400 Bad Request: prompt is too long -- change what it names in 'extra', the "
         "sampling settings or the questions"),
        ((401, {}, {"error": f"wrong key {KEY}"}),
         "status 401 Unauthorized: wrong key ... -- check the API key in the environment variable "
         "STUB_WORD"),
        ((404, {}, {"object": "error", "message": "no model stub/model"}),
         "status 404 Not Found: no model stub/model -- check 'server', which often ends with /v1, "
         "and 'model'"),
        ((413, {"Content_Type": "text/html"}, b"<h1>too large</h1>"),
         "status 413 Request Entity Too Large -- send smaller images, or set image_format: jpeg"),
        ((422, {}, {"detail": "Unexpected fields: {'top_k'}"}),
         "status 422 Unprocessable Entity: Unexpected fields: {'top_k'} -- change what it names "
         "in 'extra', the sampling settings or the questions"),
        ((429, {"Retry_After": "86400"}, b"tomorrow"),
         "status 429 Too Many Requests, and it asks to wait 86,400 s -- later, run the same "
         "command again to go on"),
        ((302, {"Location": "http://elsewhere.example/v1"}, b""),
         "it redirects to http://elsewhere.example/v1, which is not followed -- if you trust that "
         "address, give it as 'server'"),
        ((200, {}, b" " * (2**24 + 1)),
         "its answer has more than 16 MiB -- lower max_new_tokens"),
    ],
)  # fmt: skip
def test_permanent_errors_end_at_once(fault, message, monkeypatch, capsys):
    monkeypatch.setenv("STUB_WORD", KEY)
    with chat_server.running(fault=lambda number, _: fault) as server:
        said = refused(server, requests_of(3), concurrency=1, key="STUB_WORD")
        assert len(server.calls) == 1
        assert server.calls[0].headers["Authorization"] == f"Bearer {KEY}"
    place, _, what = said.partition(": request 000000000000: ")
    assert place in ("URL", "URL/chat/completions")
    assert what == message
    assert KEY not in capsys.readouterr().out


def test_the_api_key_is_nowhere_but_in_the_header(monkeypatch):
    with chat_server.running() as server:
        config = config_of(server, key="STUB_WORD")
        for value, what in (("", "is not set"), ("two words", "holds no API key"), ("ä" * 9, "no")):
            monkeypatch.setenv("STUB_WORD", value)
            with pytest.raises(ServerError, match=what) as error:
                ServerMaker(config)
            assert not value or value not in str(error.value)
        monkeypatch.setenv("STUB_WORD", KEY)
        maker = ServerMaker(config)
        answers_of(maker, requests_of(2))
        assert all(c.headers["Authorization"] == f"Bearer {KEY}" for c in server.calls)
        assert maker.name == f"{MODEL} at {server.url}"
        assert maker.revision == f"{server.url} {MODEL}"
        answers_of(ServerMaker(config_of(server)), requests_of(1))
        assert "Authorization" not in server.calls[-1].headers


def test_the_revision_names_what_changes_answers():
    config = {"server": "http://host/v1/", "model": "m"}
    plain = ServerMaker(ServerConfig(**config)).revision
    assert plain == "http://host/v1 m"
    same = ServerConfig(**config, concurrency=2, timeout_s=1, retries=0)
    assert ServerMaker(same).revision == plain
    others = [{"image_format": "jpeg"}, {"extra": {"a": 1}}, {"extra": {"a": 2}}]
    found = {ServerMaker(ServerConfig(**config, **other)).revision for other in others}
    assert len(found | {plain}) == 4


@pytest.fixture
def _hears_ctrl_c():
    """A shell's background job, as which tests may run, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_hears_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_keeps_what_is_under_way(number):
    kept = []

    def keep(request, answer):
        kept.append(request.seed)
        if len(kept) == 3:
            os.kill(os.getpid(), number)

    with chat_server.running(delay=0.1) as server, interrupt.listening():
        interrupt.hear()
        maker = ServerMaker(config_of(server, concurrency=2))
        with pytest.raises(StoppedError):
            maker.answer(requests_of(40), GREEDY, keep)
        assert sorted(kept) == sorted(body["seed"] for body in server.answered())
        assert len(kept) < 20


def test_a_signal_does_not_wait_for_what_hangs(monkeypatch):
    monkeypatch.setattr(threads, "GRACE_S", 0.2)
    kept = []

    def keep(request, answer):
        kept.append(request.seed)
        os.kill(os.getpid(), signal.SIGTERM)

    def fault(number, body):
        return "hang" if body["seed"] else None

    with chat_server.running(fault=fault) as server, interrupt.listening():
        interrupt.hear()
        began = time.monotonic()
        with pytest.raises(StoppedError):
            ServerMaker(config_of(server)).answer(requests_of(9), GREEDY, keep)
        assert time.monotonic() - began < 20
    assert kept == [0]


def test_an_image_that_cannot_be_read_is_its_own_error():
    def broken():
        raise DataError("the image is cut off", where="a.png")

    requests = requests_of(3)
    requests[1] = Request("1", requests[1].messages, broken, 1)
    with chat_server.running() as server:
        found = answers_of(ServerMaker(config_of(server)), requests)
        assert len(server.answered()) == 2
    assert found[1] == Answer("", False, "a.png: the image is cut off")
    assert found[0].error is None
    assert found[2].text.startswith("what 2?")


def test_no_request_no_contact():
    maker = ServerMaker(ServerConfig(server="http://127.0.0.1:9/v1", model=MODEL))
    maker.answer([], GREEDY, lambda request, answer: None)


class _Waits:
    """Stands in for an event, and records waits."""

    def __init__(self):
        self.seconds = []

    def wait(self, seconds):
        self.seconds.append(seconds)
        return False

    def is_set(self):
        return False


def test_waits_grow_and_are_random(monkeypatch):
    monkeypatch.setattr(server_calls, "FIRST_WAIT", 1.0)

    def fails():
        raise TemporaryError("no")

    found = []
    for _ in range(2):
        stop, notes = _Waits(), []
        calls = Calls(ServerConfig(server="http://host/v1", model="m"), None)
        with pytest.raises(ServerError, match="no answer after 10 tries"):
            calls.retried(fails, "it", retries=9, stop=stop, note=notes.append)
        calls.close()
        assert notes == ["no"] * 9
        for tried, seconds in enumerate(stop.seconds):
            longest = min(2.0**tried, 60.0)
            assert longest / 2 <= seconds <= longest
        found.append(stop.seconds)
    assert found[0] != found[1]


def test_retry_after_is_seconds_or_a_date():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    assert 80 < server_calls._retry_after(later) <= 90
    cases = {"7": 7.0, "0.5": 0.5, None: 0.0, "-3": 0.0, "nan": 0.0, "inf": 0.0, "soon": 0.0,
             "Wed, 21 Oct 2015 07:28:00 GMT": 0.0}  # fmt: skip
    assert {value: server_calls._retry_after(value) for value in cases} == cases


def test_temporary_errors_are_reported_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(server_module, "SECONDS_BETWEEN_NOTES", 100.0)
    with chat_server.running(fault=lambda number, _: 500 if number < 4 else None) as server:
        answers_of(ServerMaker(config_of(server, concurrency=1)), requests_of(1))
    assert capsys.readouterr().out.count("trying again") == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"server": "ftp://host"}, "server: it is no address"),
        ({"server": "http://me:word@host/v1"}, "server: it holds a login"),
        ({"server": "http://host/v1?a=1"}, "server: it has a query or a fragment"),
        ({"server": "http://host/v1/chat/completions"}, "server: it is the address of one method"),
        ({"key": "sk-live-0123456789"}, "key: it is no name of an environment variable"),
        ({"extra": {"n": 2}}, "extra: 'n' is set elsewhere"),
        ({"extra": {"a": float("inf")}}, "extra: it is no JSON"),
        ({"extra": {"a": "b" * 20_000}}, "extra: it has 20,009 characters as JSON"),
    ],
)
def test_settings_that_are_refused(settings, said):
    with pytest.raises(ValidationError) as error:
        ServerConfig(**({"server": "http://host/v1", "model": "m"} | settings))
    message = str(explained(error.value))
    assert message.startswith(said)
    assert "word@" not in message
    assert "0123456789" not in message
