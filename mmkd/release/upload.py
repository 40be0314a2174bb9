"""Uploads a folder to the Hub. Nothing is sent twice, and temporary failures are retried.

`upload_folder` of huggingface_hub compares hashes: it does not send files that the repository has,
nor data that the Hub holds of an interrupted upload, so that the same command continues. It retries
each request a few times. This module retries the rest: the creation of the repository, the check of
the card, and longer outages.
"""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import httpx2
from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import logging

from mmkd.errors import HubError
from mmkd.recipe import ReleaseConfig
from mmkd.runtime import hub
from mmkd.runtime.progress import live, say

T = TypeVar("T")

TRIES = 4
FIRST_WAIT = 2.0  # seconds; doubled after every try
# Files of an older release would remain, and transformers might load them with the new weights.
OLD_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
AGAIN = "run the same command again: what the Hub has is not sent twice"
LOG_IN = "log in with 'hf auth login' or set HF_TOKEN, with a token that may write"
MENDS: dict[int | None, str] = {
    401: LOG_IN,
    403: LOG_IN,
    404: "check the repository's name and who owns it",
}


# hf_xet raises ConnectionError for whatever the Hub answers, and has the answer in its text.
_STATUS_OF_XET = re.compile(r"HTTP status (?:client|server) error \((\d{3})")


class Failure(NamedTuple):
    """What went wrong in a request.

    Attributes:
        status: of the Hub's answer; None where none came.
        passing: it may be over in a moment.
    """

    reason: str
    status: int | None
    passing: bool


def require_access(repo: str) -> None:
    """Check the access to the Hub before anything is written.

    Raises:
        HubError: HF_HUB_OFFLINE is set, nobody is logged in, or the Hub cannot be reached.
    """
    if constants.is_offline_mode() and hub.unreachable() == hub.OFFLINE:
        raise HubError(
            "cannot upload while HF_HUB_OFFLINE is set",
            where=repo,
            hint="unset it, or write the folder alone with --out DIR",
        )
    if get_token() is None:
        raise HubError("nobody is logged in", where=constants.ENDPOINT, hint=LOG_IN)
    if (reason := hub.unreachable()) is not None:
        raise HubError(
            f"the Hub cannot be reached ({reason})",
            where=constants.ENDPOINT,
            hint="check the network and HF_ENDPOINT, or write the folder alone with --out DIR",
        )


def upload(folder: Path, settings: ReleaseConfig) -> str:
    """Create the repository where it is missing, and send the folder.

    Args:
        folder: a release as `mmkd.release.folder.write_release` leaves it.
        settings: with a `repo`.

    Returns:
        The repository's address.

    Raises:
        HubError: the Hub refuses, or cannot be reached for long.
    """
    repo = settings.repo
    assert repo is not None
    api = HfApi()
    attempt(repo, "have the card checked", lambda: check_card(folder / "README.md"))
    address = attempt(
        repo,
        "create the repository",
        lambda: api.create_repo(repo, private=settings.private or None, exist_ok=True),
    )
    if settings.private and not attempt(repo, "look at it", lambda: api.model_info(repo)).private:
        raise HubError(
            "the repository is there already, and public",
            where=repo,
            hint="make it private on the Hub, or give another name",
        )
    say(f"sending to {address}")
    if not live():  # bars are for terminals; elsewhere a line every half minute
        logging.get_logger("huggingface_hub._upload_pipeline").setLevel("INFO")
    attempt(
        repo,
        "upload",
        lambda: api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Release with mmkd",
            delete_patterns=OLD_WEIGHTS,
        ),
    )
    return str(address)


def check_card(path: Path) -> None:
    """Ask the Hub whether it takes a card's metadata.

    Raises:
        HubError: it does not.
    """
    try:
        ModelCard.load(path).validate()
    except ValueError as error:
        raise HubError(
            f"the Hub refuses the card's metadata ({_line(str(error))})",
            where=str(path),
            hint="correct license, datasets, language or tags of 'release'",
        ) from error


def attempt(repo: str, action: str, call: Callable[[], T]) -> T:
    """What `call` returns; tried again, with longer and longer waits, while the Hub is unwell.

    Raises:
        HubError: in one line, what failed and what to do.
    """
    tried = 0
    while True:
        tried += 1
        try:
            return call()
        except HubError:
            raise
        except Exception as error:  # the client, its HTTP library and hf_xet raise many types
            failure = explain(error)
            if failure is None:
                raise
            if not failure.passing or tried == TRIES:
                raise HubError(
                    f"cannot {action} ({failure.reason})",
                    where=f"{constants.ENDPOINT}/{repo}",
                    hint=AGAIN if failure.passing else MENDS.get(failure.status),
                ) from error
        wait = FIRST_WAIT * 2 ** (tried - 1)
        again = f"trying again in {wait:.0f} s ({tried + 1} of {TRIES})"
        say(f"{repo}: {failure.reason}; {again}")
        time.sleep(wait)


def explain(error: BaseException) -> Failure | None:
    """What an exception says of the Hub or of the way there; None where it is about neither."""
    for link in _causes(error):
        text = _line(str(link) or type(link).__name__)
        if isinstance(link, HfHubHTTPError):
            status, answer = link.response.status_code, link.response
            said = _line(f"{status} {link.server_message or answer.reason_phrase}")
            return Failure(said, status, _passes(status))
        if isinstance(link, ConnectionError) and (found := _STATUS_OF_XET.search(text)):
            return Failure(text, int(found[1]), _passes(int(found[1])))
        if isinstance(link, httpx2.TransportError | ConnectionError | TimeoutError):
            return Failure(text, None, True)
        if isinstance(link, ValueError) or type(link).__module__ == "hf_xet":
            return Failure(text, None, False)
    return None


def _passes(status: int) -> bool:
    return status >= 500 or status in (408, 429)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
