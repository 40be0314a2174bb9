"""`mmkd chat`: ask a student about images in the terminal, optionally together with its teacher."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from mmkd.errors import DataError, MmkdError, one_row
from mmkd.modeling.conversation import Conversation, Reply, load_answering
from mmkd.recipe import SamplingConfig
from mmkd.runtime.interrupt import stop_here
from mmkd.runtime.progress import console, say

HELP = "/image FILE shows an image with the next question, /new starts again, /quit ends"


class Chat:
    """Conversations with one model, or with several side by side.

    Args:
        models: {label: (folder or Hub id, revision)}.
        sampling: how answers are sampled.
        seed: decides sampled answers.
        device: where the models run; `auto` is the GPU if there is one.
    """

    def __init__(
        self,
        models: dict[str, tuple[str, str | None]],
        sampling: SamplingConfig,
        *,
        seed: int,
        device: str,
    ):
        self._models = {
            label: load_answering(name, device=device, revision=revision)
            for label, (name, revision) in models.items()
        }
        self._sampling, self._seed = sampling, seed
        self.begin()

    def begin(self) -> None:
        """Start all conversations again."""
        self.conversations = {
            label: Conversation(model, processor, sampling=self._sampling, seed=self._seed)
            for label, (model, processor) in self._models.items()
        }

    def ask(self, question: str, images: Sequence[str]) -> None:
        """Ask all models, and print their answers while they write them."""
        for label, conversation in self.conversations.items():
            if len(self.conversations) > 1:
                _write(f"{label}: ")
            reply = conversation.ask(question, images, on_text=_write)
            _write("\n")
            say(f"  {_facts(reply)}")

    def ask_as_json(self, question: str, images: Sequence[str]) -> None:
        """Ask all models, and print one JSON object."""
        replies = {k: c.ask(question, images) for k, c in self.conversations.items()}
        print(json.dumps({label: _as_json(reply) for label, reply in replies.items()}, indent=2))

    def converse(self, images: Sequence[str]) -> None:
        """Answer questions from standard input until it ends."""
        shown = list(images)
        if sys.stdin.isatty():
            say(HELP)
        for line in _lines():
            stop_here()
            word, _, rest = line.partition(" ")
            if word == "/quit":
                return
            if word == "/new":
                self.begin()
                shown = list(images)
            elif word == "/image":
                shown.append(rest.strip())
            elif word.startswith("/"):
                say(HELP)
            else:
                shown = self._asked(line, shown)

    def _asked(self, question: str, images: list[str]) -> list[str]:
        """Ask; the images that are left for the next question."""
        before = {label: c.record for label, c in self.conversations.items()}
        try:
            self.ask(question, images)
        except DataError as error:
            for label, record in before.items():
                self.conversations[label].record = record
            say(f"mmkd: {error}")
        return []


def _lines() -> Iterator[str]:
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if terminal else "")
            line.encode()  # Python may read other bytes as lone surrogates
        except EOFError:
            return
        except UnicodeError as error:
            raise MmkdError("it is not UTF-8", where="standard input", hint="send UTF-8") from error
        if line.strip():
            yield line.strip()


def _write(text: str) -> None:
    """Print a piece of an answer as it is, control characters as escapes."""
    text = "\n".join(map(one_row, text.split("\n")))
    console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    with suppress(OSError):
        console.file.flush()


def _facts(reply: Reply) -> str:
    cut = "" if reply.finished else ", cut off by --max-new-tokens"
    return f"{reply.tokens} tokens, {reply.tokens_per_second:.1f} tokens/s{cut}"


def _as_json(reply: Reply) -> dict[str, Any]:
    return {**asdict(reply), "tokens_per_second": reply.tokens_per_second}
