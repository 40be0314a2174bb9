"""Records that models on a server make and judge."""

import re

import pytest
import torch
import yaml

from mmkd.errors import ServerError
from mmkd.making import server_calls
from mmkd.making.make import make_answers
from mmkd.recipe import load_recipe
from tests.support import chat_server
from tests.support.chat_server import MODEL

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(server_calls, "FIRST_WAIT", 0.01)


@pytest.fixture
def raw(recipe):
    """The recipe with its answers from a server."""

    def write(server, **changes):
        path = recipe(by="big", **changes)
        content = yaml.safe_load(path.read_text())
        content["servers"] = {"big": {"server": server.url, "model": MODEL, "concurrency": 3}}
        return content

    return write


def test_a_server_that_fails_makes_the_same_records(raw, rows, tmp_path):
    changes = {"keep": "all", "sampling": {"n": 2, "temperature": 0.7, "max_new_tokens": 64}}
    with chat_server.running() as server:
        server.fault = lambda number, body: None
        first = make_answers(load_recipe(raw(server, **changes)), "photos", CPU)
        whole = [{**row, "made": None} for row in rows()]
        assert len(whole) == first.records == 24
        assert len(server.calls) == 24
        assert {row["made"]["by"] for row in rows()} == {"big"}
        assert {row["made"]["revision"] for row in rows()} == {f"{server.url} {MODEL}"}
    with chat_server.running() as server:
        server.fault = lambda number, body: (None, None, 500, None, None, "drop")[number % 6]
        out = tmp_path / "again.jsonl"
        again = raw(server, **changes, out=str(out))
        make_answers(load_recipe(again), "photos", CPU)
        texts = [{**row, "made": None} for row in rows("again.jsonl")]
        # the address is part of a request's key, so that seeds differ
        assert [without_seed(row) for row in texts] == [without_seed(row) for row in whole]
        assert len(server.answered()) == 24
        assert make_answers(load_recipe(again), "photos", CPU).asked.answers == 0


def without_seed(row):
    return re.sub(r" seed \d+", "", str(row))


def test_what_a_server_has_answered_is_kept(raw, tmp_path, monkeypatch):
    with chat_server.running() as server:
        server.fault = lambda number, body: 400 if number >= 10 else None
        content = raw(server, sampling={"max_new_tokens": 64})
        with pytest.raises(ServerError, match="400"):
            make_answers(load_recipe(content), "photos", CPU)
        assert not (tmp_path / "made.jsonl").exists()
        known = len(server.answered())
        assert known == 10
        server.fault = lambda number, body: None
        made = make_answers(load_recipe(content), "photos", CPU)
        assert (made.answers, made.asked.answers) == (12, 12 - known)


def test_an_unreadable_image_stops_no_server(raw, photos, rows, tmp_path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "0.png").write_bytes((photos / "0.png").read_bytes())
    (folder / "1.png").write_bytes(b"no image")
    with chat_server.running() as server:
        content = raw(server, pictures=str(folder), sampling={"max_new_tokens": 64})
        made = make_answers(load_recipe(content), "photos", CPU)
    assert {row["images"][0] for row in rows()} == {"0.png"}
    assert "1.png is not a readable image" in " ".join(made.asked.unreadable.values())


def test_a_judge_on_a_server(recipe, rows, monkeypatch):
    """The tiny model answers, and a model on a server rates: it likes answers with an 'a', and
    always the first one more."""

    plain = chat_server.ChatServer.completion

    def completion(self, body):
        text = body["messages"][-1]["content"][-1]["text"]
        answers = re.findall(r"Answer(?: [AB])?: (.*?)(?=\n\n)", text, re.DOTALL)
        if not answers:
            return plain(self, body)  # the check whether it sees images
        given = [3 + 4 * ("a" in answer) for answer in answers]
        given[0] += len(given) > 1
        reply = ", ".join(map(str, given))
        choice = {"index": 0, "message": {"role": "assistant", "content": reply},
                  "finish_reason": "stop"}  # fmt: skip
        return {"object": "chat.completion", "model": MODEL, "choices": [choice]}

    with chat_server.running() as server:
        path = recipe(checks=[{"kind": "judge", "by": "big", "least": 5}], keep="best")
        content = yaml.safe_load(path.read_text())
        content["servers"] = {"big": {"server": server.url, "model": MODEL}}
        monkeypatch.setattr(chat_server.ChatServer, "completion", completion)
        made = make_answers(load_recipe(content), "photos", CPU)
        asked = len(server.calls)
        assert make_answers(load_recipe(content), "photos", CPU).asked.answers == 0
        assert len(server.calls) == asked
    assert made.records == len(rows()) > 0
    assert made.refused["judge"] > 0
    for row in rows():
        assert "a" in row["messages"][1]["content"][0]["text"]
        assert row["made"]["score"][0] in (7.0, 7.5)
