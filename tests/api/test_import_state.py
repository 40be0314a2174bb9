"""Importing mmkd does not change the state of a program: environment, logging and warnings."""

import json
import logging
import subprocess
import sys

import pytest

from mmkd.runtime import progress

CODE = """
import json, logging, os, signal
from transformers.utils import logging as transformers_logging
import transformers

def state():
    return {
        "environment": sorted(os.environ.items()),
        "bars": transformers_logging.is_progress_bar_enabled(),
        "verbosity": transformers_logging.get_verbosity(),
        "root": [repr(h) for h in logging.getLogger().handlers],
        "signals": [repr(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)],
    }

before = state()
import mmkd
import mmkd.modeling.loading
import mmkd.runs.pipeline
from mmkd.runtime.progress import Bar, say, say_heading

after = state()
say("quiet")
say_heading("quiet")
with Bar("quiet", 1) as bar:
    bar.advance()
print(json.dumps([before, after]))
"""


def test_an_import_changes_nothing_and_prints_nothing():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 1
    before, after = json.loads(lines[0])
    assert after == before


@pytest.fixture
def silent():
    """The logger as it is at the import."""
    progress.log_to_console(False)
    yield
    progress.log_to_console()


@pytest.mark.usefixtures("silent")
def test_a_program_redirects_reports_as_those_of_any_library(caplog, capsys):
    progress.say("nobody hears this")
    with caplog.at_level(logging.INFO, logger="mmkd"):
        progress.say("a line\x1b[31m with a secret hf_" + "abcdefghij" * 4)
        with progress.Bar("work", 1) as bar:
            bar.advance()
        progress.say_heading("a title")
    texts = [r.getMessage() for r in caplog.records]
    assert texts[0].startswith("a line\\x1b[31m with a secret ")
    assert "abcdefghij" not in texts[0]
    assert texts[1].startswith("work 1/1, eta")
    assert texts[2:] == ["a title"]
    assert {r.name for r in caplog.records} == {"mmkd"}
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("silent")
def test_the_console_can_be_turned_on_and_off(capsys):
    progress.log_to_console()
    progress.log_to_console()  # twice is once
    progress.say("[bold]shown")
    progress.say_heading("title")
    progress.log_to_console(False)
    progress.say("not shown")
    out = capsys.readouterr().out
    assert out.count("[bold]shown") == 1
    assert "─ title ─" in out
    assert "not shown" not in out
    assert not progress.on_console()


@pytest.mark.usefixtures("silent")
def test_a_level_above_info_silences_the_console(capsys):
    progress.log_to_console()
    logging.getLogger("mmkd").setLevel(logging.WARNING)
    progress.say("not shown")
    assert capsys.readouterr().out == ""
    assert not progress.on_console()
