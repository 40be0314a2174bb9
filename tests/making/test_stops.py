"""Answers that are made while the command is killed, or the disk is full."""

import os
import random
import signal
import time

import pytest

from tests.support import warm
from tests.support.slow import slow

LINES = 36
BATCH = 2


def answers_of(folder):
    return [line for f in sorted(folder.glob("answers-*.jsonl")) for line in f.open("rb")]


def finish(command):
    text, _ = command.communicate(timeout=120)
    return command.returncode, text


@pytest.mark.parametrize(("kills", "processes"), [(3, 1), slow(20, 1), slow(10, 2)])
def test_a_killed_command_goes_on(recipe, tmp_path, kills, processes):
    """SIGKILL after a random number of answers: the file is that of a command that nobody
    disturbed, and what is asked twice was in flight."""
    path = recipe(keep="all", batch_size=BATCH)
    code, text = finish(warm.Command("data", "answers", path))
    assert code == 0, text
    whole, out = (tmp_path / "made.jsonl").read_bytes(), tmp_path / "killed.jsonl"
    logs = tmp_path / "killed.jsonl.answers"
    words = ["data", "answers", path, f"make.photos.out={out}", "--nproc", processes]
    chance, asked = random.Random(kills), 0
    for _ in range(kills):
        before = len(answers_of(logs))
        target = min(before + chance.randrange(1, 2 + LINES // kills), LINES)
        command = warm.Command(*words, session=True)
        while command.poll() is None and len(answers_of(logs)) < target:
            time.sleep(0.005)
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
        finish(command)
        asked += 1
    code, text = finish(warm.Command(*words))
    assert code == 0, text
    assert out.read_bytes() == whole
    found = [line for line in answers_of(logs) if line.endswith(b"\n")]
    assert LINES <= len(found) <= LINES + asked * BATCH * processes


def test_a_stopped_command_finishes_its_batch(recipe, tmp_path):
    path = recipe(keep="all", batch_size=BATCH)
    logs = tmp_path / "made.jsonl.answers"
    command = warm.Command("data", "answers", path)
    while not answers_of(logs):
        time.sleep(0.005)
    command.send_signal(signal.SIGTERM)
    code, text = finish(command)
    count = len(answers_of(logs))
    if count < LINES:  # otherwise it was done
        assert "run the same command again to go on" in text
        assert count % BATCH == 0
        assert not (tmp_path / "made.jsonl").exists()
    assert code == 0
    code, text = finish(warm.Command("data", "answers", path))
    assert code == 0, text
    assert len(answers_of(logs)) == LINES


@pytest.mark.parametrize("limit", [600, 3_000])
def test_a_full_disk_loses_nothing(recipe, tmp_path, limit):
    """A file cannot grow beyond the limit: first the log of answers, then the records."""
    path = recipe(keep="all", batch_size=BATCH)
    code, text = finish(warm.Command("data", "answers", path, largest=limit))
    assert code != 0
    assert len(text.splitlines()[-1]) < 300
    assert "too large" in text.lower() or "no space" in text.lower(), text
    assert not (tmp_path / "made.jsonl").exists()
    code, text = finish(warm.Command("data", "answers", path))
    assert code == 0, text
    found = answers_of(tmp_path / "made.jsonl.answers")
    assert LINES <= len(found) <= LINES + 1
