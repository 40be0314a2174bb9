"""Signals that stop a command, and processes that end with the one that started them.

Ctrl-C (SIGINT) and SIGTERM stop a command without losing work:

    with interrupt.listening():                # mmkd's own commands are inside of it already
        try:
            interrupt.hear()
            for part in parts:
                with interrupt.deferred():     # a signal waits for the end of this block
                    write(compute(part))
        except StoppedError:
            ...

The first signal raises `StoppedError`, inside `deferred` at its end. A second Ctrl-C ends the
process at once. This module imports nothing that is slow to import.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmkd.errors import FROM_THE_START, StoppedError

if TYPE_CHECKING:
    import torch

REPEAT_SECONDS = 1.0
"""Signals that follow the first one within so many seconds are the same one: a terminal sends
Ctrl-C to all processes, and launchers pass it on to those that have it already."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)

LAUNCHER = "MMKD_LAUNCHER"
"""Environment variable: the process id of the `mmkd` that has started this process."""

_WATCH_SECONDS = 1.0
_AGAIN_SECONDS = 0.02
_PR_SET_PDEATHSIG = 1


@dataclass
class _State:
    """The signals that this process has received.

    Attributes:
        owner: process id of the process that listens; forked children have others.
        hint: what the user can do after a stop.
        number: the first signal; None before it.
        heard: when it came, in seconds of `time.monotonic`.
        raised: a `StoppedError` was raised. What is raised after it is often what a library made
            of it.
        swallowed: Python has passed over the `StoppedError`, as in a callback of an import, and
            the next signal is to raise it again.
        depth: how many `deferred` blocks are open.
        children: processes that get each signal too.
    """

    owner: int | None = None
    hint: str = FROM_THE_START
    number: int | None = None
    heard: float = 0.0
    raised: bool = False
    swallowed: bool = False
    depth: int = 0
    children: list[subprocess.Popen] = field(default_factory=list)


_state = _State()


@contextmanager
def listening(hint: str = FROM_THE_START) -> Iterator[None]:
    """Inside, from `hear` on, SIGINT and SIGTERM raise `StoppedError`; earlier handlers come
    back after.

    A signal that is ignored outside, as SIGINT is in a shell's background jobs, stays ignored.
    Only the main thread can listen.

    Args:
        hint: what the user can do after a stop.
    """
    global _state
    outer, _state = _state, _State(os.getpid(), hint)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    before = {}
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, _on_signal)
    hook, sys.unraisablehook = sys.unraisablehook, _on_unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
        _state = outer
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def hear() -> None:
    """Raise `StoppedError` for signals from here on, and for those since `listening` began.

    Signals wait before it, so that none comes where nothing catches the exception yet.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore() -> None:
    """Ignore SIGINT and SIGTERM from here on: the process is about to end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def can_go_on(hint: str) -> None:
    """Set what the user can do after a stop from here on."""
    _state.hint = hint


def _on_signal(number: int, frame: Any) -> None:
    state = _state
    if os.getpid() != state.owner:
        return  # a forked child, which ends with its parent
    now = time.monotonic()
    if state.swallowed:
        state.swallowed = False
        if state.depth == 0:
            raise _stop()
        return
    if state.number is not None:
        if now - state.heard < REPEAT_SECONDS or launched():
            return
        if number == signal.SIGINT:
            _end_now(number)
        if state.raised and state.depth == 0:  # and something has swallowed it
            raise _stop()
    else:
        state.number, state.heard = number, now
    for child in state.children:
        child.send_signal(number)
    if state.depth == 0:
        raise _stop()
    if number == signal.SIGINT and not launched() and sys.stderr.isatty():
        _tell("stopping at the end of this step; Ctrl-C again ends at once")


def _stop() -> StoppedError:
    _state.raised = True
    return StoppedError("stopped", hint=_state.hint)


def _on_unraisable(unraisable: Any) -> None:
    """Raise a `StoppedError` again where Python cannot raise it: in a callback or a `__del__`."""
    state = _state
    if not isinstance(unraisable.exc_value, StoppedError) or os.getpid() != state.owner:
        sys.__unraisablehook__(unraisable)
        return

    def again() -> None:
        if _state is state and state.number is not None:
            state.swallowed = True
            os.kill(os.getpid(), state.number)

    timer = threading.Timer(_AGAIN_SECONDS, again)
    timer.daemon = True
    timer.start()


def _end_now(number: int) -> NoReturn:
    for child in _state.children:
        child.kill()
    if sys.stdout.isatty():
        os.write(1, b"\x1b[?25h")  # a progress bar has hidden the cursor
    _tell(f"ended before it could save -- {_state.hint}")
    os._exit(128 + number)


def _tell(text: str) -> None:
    # A signal handler may run in the middle of a print, which cannot be entered twice.
    os.write(2, f"\nmmkd: {text}\n".encode())


@contextmanager
def deferred() -> Iterator[None]:
    """A signal that comes inside raises `StoppedError` at the end of the block.

    Long work inside asks `requested` or `asked` when it could stop.
    """
    if _state.depth == 0:
        stop_here()  # a library may have swallowed the exception
    with postponed():
        yield
    if _state.depth == 0:
        stop_here()


@contextmanager
def postponed() -> Iterator[None]:
    """A signal that comes inside raises `StoppedError` later, at the next `stop_here` or
    `deferred`."""
    _state.depth += 1
    try:
        yield
    finally:
        _state.depth -= 1


def stop_here() -> None:
    """Raise `StoppedError` if a signal has come.

    Long work that no `deferred` block holds calls it now and then, and so does what handles any
    exception of others: a library may have swallowed the first `StoppedError`, or turned it into
    an exception of its own.
    """
    if requested():
        raise _stop()


def broken_off() -> StoppedError | None:
    """The stop, if one was raised: an exception that comes after it is no error of its own."""
    return _stop() if _state.raised else None


def requested() -> bool:
    """Whether this process was asked to stop."""
    return _state.number is not None


def asked(device: "torch.device") -> bool:
    """Whether any rank was asked to stop. Every rank has to call it."""
    import torch

    from mmkd.runtime import distributed

    return bool(distributed.total(torch.tensor(float(requested()), device=device)))


def status() -> int:
    """Exit status of a command that was stopped: 130 after SIGINT, so that a script with several
    commands ends too, and 0 after SIGTERM, which asks a command to save and go."""
    return 128 + signal.SIGINT if _state.number == signal.SIGINT else 0


@contextmanager
def held() -> Iterator[None]:
    """Inside, signals wait. What is started inside gets them when it listens, and not before."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def call(command: Sequence[str | Path]) -> int:
    """Run an `mmkd` command in a process of its own and wait for its end; returns its exit status.

    Signals that this process gets are passed on. The command ends with this process.
    """
    environment = {**os.environ, LAUNCHER: str(os.getpid())}
    with postponed():  # no StoppedError after it: its exit status says what has happened
        with held():
            child = subprocess.Popen([str(word) for word in command], env=environment)
            _state.children.append(child)
        try:
            return child.wait()
        finally:
            _state.children.remove(child)


# The end of a parent


def launched() -> bool:
    """Whether this process ends with a launcher, which passes signals on and kills it."""
    return bool(_launchers)


_launchers: list[int] = []


def end_with_launcher() -> None:
    """End this process, whatever it is doing, as soon as the launcher that has started it is gone.

    A process that no launcher has started, such as one under `nohup`, stays.
    """
    global _launchers
    said = os.environ.pop(LAUNCHER, None)  # what this process starts has another one
    if said is not None:
        _launchers = [int(said)]
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        _launchers = _ancestors("torchrun", "torch.distributed.run", "torch.distributed.launch")
    elif "CROSS_RANK" in os.environ and "LOCAL_SIZE" in os.environ:
        _launchers = _ancestors("deepspeed", "deepspeed.launcher.launch")
    if _launchers:
        end_with(*_launchers)


def end_with(parent: int, *others: int) -> None:
    """End this process with SIGKILL as soon as its parent is gone.

    Linux does it at once, whatever the process is doing. Elsewhere a thread looks every second.

    Args:
        parent: process id of the parent, taken before this process began.
        others: the parent's parent, and so on, whose end counts too.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    chain = [parent, *others]
    if not _all_alive(chain):
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.platform != "linux" or others:
        threading.Thread(target=_watch, args=(chain,), daemon=True).start()


def _watch(chain: list[int]) -> None:
    while _all_alive(chain):
        time.sleep(_WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _all_alive(chain: list[int]) -> bool:
    """Whether each process is still the child of the next one."""
    parents = [os.getppid(), *(_parent_of(pid) for pid in chain[:-1])]
    return parents == chain


def _ancestors(*names: str) -> list[int]:
    """Process ids from the parent to the outermost ancestor that runs one of these programs or
    modules; the parent alone where none is found."""
    pid: int | None = os.getppid()
    found, chain = [os.getppid()], list[int]()
    while pid is not None and pid > 1:
        chain.append(pid)
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:4]
        except OSError:  # not Linux, or gone
            break
        if any(Path(word).name in names for word in words):
            found = chain.copy()
        pid = _parent_of(pid)
    return found


def _parent_of(pid: int) -> int | None:
    """Process id of a process's parent; None if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # after the name: state, parent


def begin_worker(parent: int, *_: Any) -> None:
    """Prepare a worker process of a data loader or a pool: it ends with its parent, and only its
    parent stops it. A terminal, `timeout` and Slurm send signals to all processes at once; the
    parent still needs its workers for the step that it ends then.

    Args:
        parent: process id of the process that has started it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(parent)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_hear_parent, args=(parent,), daemon=True).start()


def _hear_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
