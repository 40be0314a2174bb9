"""Starts commands that tests interrupt, and reads what they left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests.support import warm

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "true"}
MMKD = (sys.executable, "-m", "mmkd.cli")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node", "2", "-m", "mmkd.cli")  # fmt: skip
DEEPSPEED = (str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port",
             "29437", "--module", "mmkd.cli")  # fmt: skip
PATIENCE = 150


def hear_ctrl_c():
    # A shell's background job, as which tests may run, ignores it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*words):
    """A command in a session of its own, as the first of a terminal."""
    return warm.Command(*words, session=True)


def start_cold(*words):
    """The same, with the start of Python and all imports."""
    return subprocess.Popen(
        [str(word) for word in words],
        env={**ENVIRONMENT, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )


def ctrl_c(process):
    """What a terminal does: every process of the group gets it."""
    os.killpg(process.pid, signal.SIGINT)


def finish(process):
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, output


def wait_for(condition, process=None):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        if process is not None and process.poll() is not None:
            pytest.fail(process.communicate()[0])
        time.sleep(0.01)


def listens(process):
    """Whether a process has its handler of SIGTERM, which nothing else installs so early."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def below(process):
    return psutil.Process(process.pid).children(recursive=True)


def workers(process):
    """The processes that train, whoever launched them."""
    return [p for p in below(process) if "mmkd.cli" in p.cmdline() and not p.children()] or below(
        process
    )


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def losses(folder):
    return [json.loads(line)["loss"] for line in lines(folder / "metrics.jsonl")]


def write(folder, raw):
    path = folder / f"{raw['name']}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path
