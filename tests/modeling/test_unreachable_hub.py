"""A Hub that does not answer costs one request of seconds, and is reported in one line."""

import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import yaml

from mmkd.data.sources import open_rows
from mmkd.errors import CheckpointError, DataError, HubError, MmkdError
from mmkd.evaluation.run import check as check_tasks
from mmkd.modeling.loading import (
    load_config,
    load_pretrained,
    load_pretrained_processor,
    load_processor,
)
from mmkd.recipe import ModelConfig, SourceConfig
from mmkd.release.upload import require_access
from mmkd.runtime import hub
from tests.support import hub_server
from tests.support.recipes import tiny_recipe

REACHED = "the Hub cannot be reached"
ASKING = {
    "model": (
        lambda: load_pretrained("me/nothing"),
        CheckpointError,
        f"no such folder, and {REACHED}",
    ),
    "config": (
        lambda: load_config(ModelConfig(model="me/nothing")),
        CheckpointError,
        f"me/nothing: no such folder, and {REACHED}",
    ),
    "processor": (
        lambda: load_processor(ModelConfig(model="student", processor="me/nothing")),
        CheckpointError,
        f"me/nothing: no such folder, and {REACHED}",
    ),
    "data": (
        lambda: open_rows(SourceConfig(train="hub:me/nothing")),
        DataError,
        f"hub:me/nothing: cannot load the data set: it is not downloaded, and {REACHED}",
    ),
    "stream": (
        lambda: open_rows(SourceConfig(train="hub:me/nothing", stream=8)),
        DataError,
        f"hub:me/nothing: cannot load the data set: it is not downloaded, and {REACHED}",
    ),
    "task": (
        lambda: check_tasks(["pope"], None, None),
        DataError,
        "the data of task pope cannot be reached",
    ),
    "release": (lambda: require_access("me/nothing"), HubError, REACHED),
}


@contextmanager
def answering(what):
    """A server that answers all requests in one way; its address, and the requests that it got."""
    with hub_server.running() as server:
        server.fail("", what, times=10**6)
        yield server.url, server.requests


@contextmanager
def refusing():
    with socket.socket() as taken:  # bound and not listening: nobody else gets the port
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}", None


@contextmanager
def unknown():
    yield "http://hub.invalid", None


SILENCES = {
    "refuses": refusing,
    "does not resolve": unknown,
    "hangs": lambda: answering("hang"),
    "ends the connection": lambda: answering("drop"),
    "503": lambda: answering(503),
}


@pytest.fixture(params=SILENCES)
def requests(request, monkeypatch, tmp_path):
    """A Hub that is silent in one way, for this process; the requests that it got."""
    with SILENCES[request.param]() as (url, requests):
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.delenv(hub.REASON, raising=False)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        monkeypatch.setattr(hub, "SECONDS", 1.0)
        monkeypatch.setattr(hub, "_answers", {})
        monkeypatch.setattr(hub, "_said", set())
        yield requests
    huggingface_hub.close_session()


def test_every_part_that_asks_the_hub_reports_it_in_one_line(requests, caplog):
    for ask, kind, said in ASKING.values():
        with pytest.raises(kind) as caught:
            ask()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert huggingface_hub.constants.ENDPOINT in str(caught.value)  # where it was looked for
    assert requests is None or len(requests) == 1
    assert "Retrying" not in caplog.text
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # for the processes that it starts


def test_what_is_downloaded_is_used_all_the_same(requests, tiny_model_dir, tmp_path, capsys):
    for number in (1, 2):
        repo = tmp_path / "cache" / f"models--me--known{number}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text("0" * 40)
        (repo / "snapshots").mkdir()
        (repo / "snapshots" / ("0" * 40)).symlink_to(tiny_model_dir)
        assert load_pretrained(f"me/known{number}").config.model_type
        assert load_pretrained_processor(f"me/known{number}").tokenizer
    told = capsys.readouterr().out
    assert told.count(REACHED) == 1
    assert "using an earlier download of me/known1" in told


def test_processes_that_it_starts_say_the_same(requests):
    reason = hub.unreachable()
    asked = "from mmkd.runtime import hub; print(hub.unreachable()); print(hub.hint('check it'))"
    told = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert told[0] == reason != hub.OFFLINE
    assert "unset HF_HUB_OFFLINE" not in told[1]


def test_a_hub_that_answers_is_asked_once_more_only(monkeypatch):
    with hub_server.in_place(monkeypatch) as server:
        assert hub.unreachable() is None
        assert hub.unreachable() is None
        assert len(server.requests) == 1
        with pytest.raises(MmkdError) as caught:
            load_config(ModelConfig(model="me/nothing"))
    assert str(caught.value) == (
        "me/nothing: no such folder, and no such model on the Hub -- check the path or the id; "
        "a private model needs 'hf auth login'"
    )


def test_offline_nobody_asks(monkeypatch):
    with hub_server.running() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        assert hub.unreachable() == hub.OFFLINE
        with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set.*unset HF_HUB_OFFLINE"):
            load_config(ModelConfig(model="me/nothing"))
        assert server.requests == []


def test_the_command_says_one_line(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, teacher={"model": str(tiny_model_dir)})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(raw))
    with answering(503) as (url, requests):
        done = subprocess.run(
            [sys.executable, "-m", "mmkd.cli", "run", str(file), "teacher.model=me/nothing"],
            env={
                **os.environ,
                "HF_ENDPOINT": url,
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(tmp_path / "home"),
            },
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"{REACHED} (it answers with status 503)" in done.stderr
    assert len(requests) == 1
    assert not Path(tmp_path / "tiny").exists()
