"""`transformers serve` in a process of its own."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ADDRESS = re.compile(r"running on (http://\S+)")


@contextmanager
def serving(*words: str) -> Iterator[str]:
    """The address of the API.

    Args:
        words: further arguments of the command.
    """
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", "0", "--device", "cpu"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line)
            if found := _ADDRESS.search(line):
                break
        else:
            raise AssertionError("".join(lines))
        # A full pipe would stop the server.
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield f"{found[1]}/v1"
    finally:
        process.kill()
        process.wait()
