"""Checks of a server before the first request."""

import os
import re
import signal
import socket
import threading
import time

import pytest

from mmkd.errors import ServerError, StoppedError
from mmkd.making import server_calls
from mmkd.making.server import ServerMaker
from mmkd.recipe import SamplingConfig
from mmkd.recipe.servers import ServerConfig
from mmkd.runtime import interrupt
from tests.making.test_server import GREEDY, answers_of, config_of, refused, requests_of
from tests.support import chat_server
from tests.support.chat_server import IMAGE_TOKENS, MODEL


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(server_calls, "FIRST_WAIT", 0.01)


def has_image(body):
    return not isinstance(body["messages"][0]["content"], str)


def test_each_check_is_made_once(capsys):
    with chat_server.running() as server:
        maker = ServerMaker(config_of(server))
        answers_of(maker, requests_of(2, images=0))
        assert server.checks == []  # no images, greedy
        answers_of(maker, requests_of(2))
        assert len(server.checks) == 2
        answers_of(maker, requests_of(2), SamplingConfig())
        assert len(server.checks) == 2 + 3
        answers_of(maker, requests_of(2), SamplingConfig())
        assert len(server.checks) == 2 + 3
        assert server.paths.count("GET /v1/models") == 1
        expected = f"{server.url}: {MODEL} takes images: a question has {6 + IMAGE_TOKENS} tokens "
        assert capsys.readouterr().out == expected + "with an image and 6 without\n"


@pytest.mark.parametrize(
    ("models", "said"),
    [
        (["stub/modem", "other"], "did you mean 'stub/modem'?"),
        (["a", "b"], "it has: a, b"),
        ([str(i) for i in range(50)], f"it has: {', '.join(map(str, range(20)))}, and 30 more"),
    ],
)
def test_a_model_that_the_server_does_not_have(models, said):
    with chat_server.running(models=models) as server:
        message = refused(server, requests_of(1))
        assert message == f"URL/models: it has no model '{MODEL}' -- {said}"
        assert server.paths == ["GET /v1/models"]


@pytest.mark.parametrize("models", [None, []])
def test_a_server_without_a_list_of_models(models):
    with chat_server.running(models=models) as server:
        assert len(answers_of(ServerMaker(config_of(server)), requests_of(3))) == 3


def test_an_address_of_something_else():
    with chat_server.running(list_fault="HTML") as server:
        assert refused(server, requests_of(1)) == (
            "URL/models: it is no server of an API: an answer of type text/html that is no JSON "
            "(Expecting value: line 1 column 1) -- check 'server', which often ends with /v1"
        )
        assert server.paths == ["GET /v1/models"]
    with chat_server.running(list_fault="no HTTP") as server:
        message = refused(server, requests_of(1))
        assert message.startswith("URL: the list of its models: no answer after 3 tries")
    with chat_server.running(list_fault=401) as server:
        assert refused(server, requests_of(1)) == (
            "URL/models: status 401 Unauthorized: on purpose -- give 'key' the name of the "
            "environment variable that holds the API key"
        )


def test_nothing_listens_there():
    with socket.socket() as taken:  # bound, and it does not listen
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(ServerError) as error:
            ServerMaker(ServerConfig(server=url, model=MODEL)).answer(
                requests_of(1), GREEDY, lambda request, answer: None
            )
    assert re.fullmatch(
        f"{url}: the list of its models: no answer after 3 tries, the last one: .*[Rr]efused"
        " -- check the server; run the same command again to go on",
        str(error.value),
    )


def test_a_model_that_refuses_images():
    no = (400, {}, {"error": {"message": "stub/model is not a multimodal model"}})
    with chat_server.running(check_fault=lambda b: no if has_image(b) else None) as server:
        assert refused(server, requests_of(3)) == (
            f"URL: {MODEL}: it answers questions, but not with an image: status 400 Bad Request: "
            "stub/model is not a multimodal model -- serve a vision-language model, with its "
            "vision part"
        )
        assert server.calls == []
        assert len(answers_of(ServerMaker(config_of(server)), requests_of(3, images=0))) == 3


def test_a_server_that_refuses_everything_is_not_called_blind():
    with chat_server.running(check_fault=lambda body: 403) as server:
        message = refused(server, requests_of(1))
        assert message.startswith("URL/chat/completions: a question with an image: status 403")


@pytest.mark.parametrize(
    ("counts", "sees", "said"),
    [
        ("tokens", False, "takes images: a question has"),  # evidence, and no proof
        ("text", True, "takes images: its answers about a red and a blue one differ"),
        (None, True, "takes images: its answers about a red and a blue one differ"),
        (None, False, "it is not known whether it looks at images"),
    ],
)
def test_evidence_that_images_are_read(counts, sees, said, capsys):
    with chat_server.running(counts=counts, sees=sees) as server:
        answers_of(ServerMaker(config_of(server)), requests_of(1))
        assert said in capsys.readouterr().out


def test_a_server_that_passes_over_images():
    with chat_server.running(counts="text", sees=False) as server:
        assert refused(server, requests_of(1)) == (
            f"URL: {MODEL}: it passes over images: a question has 6 tokens with an image and 6 "
            "without, and its answers about a red and a blue one are equal -- serve a "
            "vision-language model, with its vision part"
        )
        assert server.calls == []


@pytest.mark.parametrize("samples", [True, False])
def test_a_server_that_ignores_seeds_is_named(samples, capsys):
    with chat_server.running(samples=samples) as server:
        answers_of(ServerMaker(config_of(server)), requests_of(1), SamplingConfig(temperature=0.5))
        heat = {call.body["temperature"] for call in server.checks}
        assert heat == {0, 1}
        said = "gives equal answers to 3 seeds at temperature 1; the server may ignore the sampling"
        assert (said in capsys.readouterr().out) is not samples


def test_checks_are_tried_again():
    left = [503, 502]
    with chat_server.running(check_fault=lambda body: left.pop() if left else None) as server:
        assert len(answers_of(ServerMaker(config_of(server)), requests_of(1))) == 1
        assert len(server.checks) == 2 + 2


def test_a_signal_ends_a_check_that_hangs():
    with chat_server.running(check_fault=lambda body: "hang") as server, interrupt.listening():
        interrupt.hear()
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        began = time.monotonic()
        with pytest.raises(StoppedError):
            ServerMaker(config_of(server)).answer(requests_of(1), GREEDY, lambda q, a: None)
        assert time.monotonic() - began < 20
        timer.join()
    assert server.calls == []
