"""Whether the Hugging Face Hub can be reached: asked once, in seconds.

huggingface_hub retries every request to a Hub that does not answer, for minutes in all. Whoever is
about to ask the Hub for something calls `unreachable` first. Where the Hub does not answer, this
process and those that it starts go on as with HF_HUB_OFFLINE=1: what is downloaded already is used,
and the rest fails at once.
"""

import os
import sys
import threading

from huggingface_hub import constants
from huggingface_hub.utils import get_session

from mmkd.progress import say

SECONDS = 5.0
"""How long the Hub may take to answer."""
OFFLINE = "HF_HUB_OFFLINE is set"

_answers: dict[str, str | None] = {}
_said: set[str] = set()


def unreachable() -> str | None:
    """Why the Hub cannot be reached, in a few words; None if it can."""
    endpoint = constants.ENDPOINT
    if endpoint not in _answers:
        if constants.is_offline_mode():
            return OFFLINE
        _answers[endpoint] = _ask(endpoint)
        if _answers[endpoint] is not None:
            _go_offline()
    return _answers[endpoint]


def hint(instead: str) -> str:
    """What to do about something that is neither here nor on a Hub that can be reached.

    Args:
        instead: what to check, or what else may be given.
    """
    if unreachable() == OFFLINE:
        return f"{instead}, or unset HF_HUB_OFFLINE for what is not downloaded yet"
    return f"{instead}, or the network and HF_ENDPOINT ({constants.ENDPOINT})"


def say_if_unreachable(name: str) -> None:
    """Say, once, that what was loaded is what had been downloaded before, of any age."""
    reason = unreachable()
    if reason not in (None, OFFLINE, *_said):
        _said.add(str(reason))
        say(f"the Hub cannot be reached ({reason}): {name} is as it was downloaded before")


def _ask(endpoint: str) -> str | None:
    """Why one request gets no answer; None if it gets any but a server's error."""
    said: list[str | None] = []

    def request() -> None:
        try:
            status = get_session().head(endpoint, timeout=SECONDS).status_code
        except Exception as error:  # of names, sockets, certificates, proxies
            text = " ".join(str(error).split())[:120]
            said.append(text or type(error).__name__)
        else:
            said.append(f"it answers with status {status}" if status >= 500 else None)

    # In a thread: no timeout of the client ends a name server's silence.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(SECONDS + 1)
    return said[0] if said else f"no answer within {SECONDS:.0f} s"


def _go_offline() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:  # has its own copy
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
