"""Whether the Hugging Face Hub can be reached: one request that takes a few seconds at most.

huggingface_hub retries every request to a Hub that does not answer, for minutes in total. So code
that is about to use the Hub calls `unreachable` first. If the Hub does not answer, this process and
those that it starts behave as with HF_HUB_OFFLINE=1: they use files that were downloaded before,
and everything else fails at once.
"""

import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.utils import get_session

from mmkd.runtime.progress import say

SECONDS = 5.0
"""Time limit for an answer of the Hub."""
OFFLINE = "HF_HUB_OFFLINE is set"
REASON = "MMKD_HUB_UNREACHABLE"
"""Environment variable that tells the processes that this one starts why they are offline."""

_answers: dict[str, str | None] = {}
_said: set[str] = set()


def unreachable() -> str | None:
    """Why the Hub cannot be reached, in a few words; None if it can."""
    endpoint = constants.ENDPOINT
    if endpoint not in _answers:
        if constants.is_offline_mode():
            return os.environ.get(REASON, OFFLINE)
        reason = _answers[endpoint] = ask(endpoint)
        if reason is not None:
            _go_offline(reason)
    return _answers[endpoint]


def hint(instead: str) -> str:
    """What to do about a name that is not a local folder, while the Hub cannot be reached.

    Args:
        instead: what to check or to give instead.
    """
    if unreachable() == OFFLINE:
        return f"{instead}, or unset HF_HUB_OFFLINE for what is not downloaded yet"
    return f"{instead}, or the network and HF_ENDPOINT ({constants.ENDPOINT})"


def say_if_unreachable(name: str) -> None:
    """Say, once, that a model was loaded from an earlier download, which may be out of date."""
    reason = unreachable()
    if reason not in (None, OFFLINE, *_said):
        _said.add(str(reason))
        say(f"the Hub cannot be reached ({reason}): using an earlier download of {name}")


def model_commit(name: str, revision: str | None) -> str | None:
    """The commit of a model on the Hub that loading it would use now; None for a folder.

    Args:
        name: folder or Hub id.
        revision: commit, tag or branch; None is the main branch.

    Returns:
        The Hub's answer; if it cannot be reached, the commit of an earlier download, or None.
    """
    if Path(name).exists() or name.count("/") != 1:
        return None
    if unreachable() is None:
        with suppress(HTTPError, OSError):
            return HfApi().model_info(name, revision=revision, timeout=SECONDS).sha
    with suppress(ValueError):  # not a Hub id
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        return Path(found).parent.name if isinstance(found, str) else None
    return None


def data_commit(name: str, revision: str | None) -> str | None:
    """The commit of a data set on the Hub; None if the Hub does not tell.

    Args:
        name: Hub id.
        revision: commit, tag or branch; None is the main branch.
    """
    if unreachable() is not None:
        return None
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=SECONDS).sha
    except (HTTPError, OSError):
        return None


def ask(endpoint: str) -> str | None:
    """Why one request gets no answer, or a server's error; None if it gets any other answer."""
    said: list[str | None] = []

    def request() -> None:
        try:
            status = get_session().head(endpoint, timeout=SECONDS).status_code
        except Exception as error:  # of names, sockets, certificates, proxies
            text = " ".join(str(error).split())[:120]
            said.append(text or type(error).__name__)
        else:
            said.append(f"it answers with status {status}" if status >= 500 else None)

    # In a thread: the client's timeout does not cover a name server that does not answer.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(SECONDS + 1)
    return said[0] if said else f"no answer within {SECONDS:.0f} s"


def _go_offline(reason: str) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", REASON: reason}
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # has its own copy
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
