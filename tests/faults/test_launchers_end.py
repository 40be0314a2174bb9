"""Processes end with the launcher that started them."""

import psutil
import pytest

from tests.support.interrupted import (
    DEEPSPEED,
    TORCHRUN,
    below,
    lines,
    start,
    start_cold,
    wait_for,
    workers,
)
from tests.support.slow import slow


@pytest.mark.parametrize(
    ("launcher", "hanging"),
    [
        slow("nproc", False),
        ("nproc", True),
        slow("torchrun", False),
        ("torchrun", True),
        # it starts a second launcher, which goes on: a process has to see itself that it is alone
        slow("deepspeed", False),
    ],
)
def test_processes_end_with_the_launcher_that_is_killed(long_run, launcher, hanging):
    """SIGKILL of the launcher alone; a process that hangs does not stay either."""
    pytest.importorskip("deepspeed")
    recipe, folder = long_run()
    if launcher == "nproc":
        process = start("run", recipe, "--nproc", 2)
    else:
        process = start_cold(
            *{"torchrun": TORCHRUN, "deepspeed": DEEPSPEED}[launcher], "run", recipe
        )
    wait_for(lambda: len(lines(folder / "01-mimic" / "metrics.jsonl")) >= 2, process)
    everyone = below(process)
    ranks = workers(process)
    assert len(ranks) == 2
    if hanging:
        for rank in ranks:
            rank.suspend()
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(everyone, timeout=20)
    for left in alive:
        left.kill()
    assert not alive
