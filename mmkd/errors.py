"""Errors a user sees: one line that says what is wrong, where, and how to fix it."""

import difflib
import unicodedata
from collections.abc import Sequence
from typing import Any

from mmkd.redact import redact

AGAIN = "run the same command again to go on"
FROM_THE_START = "run the same command again, it begins from the start"
HINT = " -- "
"""Separates the hint from the problem in a message, and in what a recipe's validators raise."""


LONGEST = 2000
"""Characters of a problem, or of its place, in a message."""
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""Characters that turn the direction of the text after them."""


def one_row(text: str) -> str:
    """Text that stays on its row of a terminal: what would end the row, move the cursor, set
    colours or turn the text around is written as an escape such as \\n."""
    if text.isprintable():
        return text
    return "".join(_escaped(c) if is_control(c) else c for c in text)


def is_control(character: str) -> bool:
    """Whether a character moves or turns what stands around it, or is half of one."""
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _TURNING


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _part(text: str) -> str:
    """A problem, or its place, as a message has it: foreign text cannot begin a second row, nor
    something that looks like a hint."""
    text = redact(one_row(text)).replace(HINT, " - ")
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"


class MmkdError(Exception):
    """A problem the user can fix. Its text is one line without secrets, whatever the parts
    hold.

    Args:
        what: what is wrong, in a few words.
        where: file, line, key or sample id the problem was found at.
        hint: what to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        self.what, self.where, self.hint = what, where, hint
        parts = [_part(f"{where}: {what}" if where else what)]
        if hint:
            parts.append(redact(one_row(hint)))
        super().__init__(HINT.join(parts))

    def __reduce__(self) -> Any:
        # The default would call the class with the whole text as the problem.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(cls: type[MmkdError], args: tuple[str], state: dict[str, Any]) -> MmkdError:
    """An error that was pickled."""
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class RecipeError(MmkdError):
    """The recipe does not say what it should."""


class DataError(MmkdError):
    """A record, an image or a data set cannot be used.

    Args:
        kind: what such problems are counted as; `what` itself where it names nothing particular.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        kind: str | None = None,
    ):
        super().__init__(what, where=where, hint=hint)
        self.kind = kind or what

    def at(self, where: str) -> "DataError":
        """The same problem with its place."""
        return DataError(self.what, where=where, hint=self.hint, kind=self.kind)


class CheckpointError(MmkdError):
    """A model folder or a run directory cannot be used."""


class HubError(MmkdError):
    """The Hub cannot be reached, or it refuses."""


class ServerError(MmkdError):
    """A model's server cannot be reached, does not answer, or refuses a request."""


class EvaluationError(MmkdError):
    """Part of an evaluation failed; the rest of it is written.

    Args:
        scores: {task: {metric: value}} of a model's other tasks, if only some of them failed.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        hint: str | None = None,
        scores: dict[str, dict[str, float]] | None = None,
    ):
        super().__init__(what, where=where, hint=hint)
        self.scores = scores or {}


class NonFiniteLossError(MmkdError):
    """Training produced a loss or gradient that is not a number."""


class PeerError(MmkdError):
    """Another process of the run is gone or does not answer."""


class StoppedError(BaseException):
    """The command stopped because it was asked to; nothing is wrong.

    Not an `Exception`: a signal raises it anywhere, and code that catches the failures of libraries
    must not catch it.

    Args:
        what: what has stopped, and where.
        hint: how to go on.
    """

    def __init__(self, what: str, *, hint: str | None = None):
        self.what, self.hint = what, hint
        super().__init__(one_row(HINT.join([what, hint] if hint else [what])))


def nearest(word: str, known: Sequence[str]) -> str:
    """How to fix a word that is not known: the nearest one that is, or all."""
    close = difflib.get_close_matches(word[:100], known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """The message of an exception in one line, without its place and hint."""
    if isinstance(error, MmkdError):
        return error.what
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
