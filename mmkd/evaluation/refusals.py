"""Documents that a model cannot be asked about. They are reported and count as wrong, and the
evaluation continues with the other documents."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from mmkd.errors import DataError, MmkdError, one_line
from mmkd.runtime.files import disk_error

HOPELESS = 32
"""Number of refused documents before the first answer from which on the set-up counts as broken."""

MACHINE = ("CUDA", "out of memory", "can't allocate memory", "NCCL")
_FATAL = (MemoryError, ImportError, NotImplementedError, torch.OutOfMemoryError)


class Unanswered(str):
    """The empty answer of a document that could not be asked about.

    `strip`, which lmms-eval calls on every answer, keeps the type, so that a scoring function can
    tell it from the empty answer of a model.
    """

    def strip(self, chars: str | None = None) -> "Unanswered":
        return self


def is_of_document(error: Exception) -> bool:
    """Whether an exception is about one document, and not about the machine or the set-up.

    Processors and models raise many types for an input that they cannot use. So every exception
    counts except for memory that runs out, a broken device, a full disk and a missing package.
    """
    if isinstance(error, MmkdError):
        return isinstance(error, DataError)
    if isinstance(error, _FATAL) or disk_error(error) is not None:
        return False
    return not (isinstance(error, RuntimeError) and any(word in str(error) for word in MACHINE))


class Refusals:
    """The documents of each task that could not be asked about, and why.

    Attributes:
        reasons: {task: {document: why}}.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, dict[int, str]] = {}
        self._answered: Counter[str] = Counter()

    def answered(self, task: str) -> None:
        """Count one document that was answered."""
        self._answered[task] += 1

    def add(self, task: str, document: int, error: Exception) -> None:
        """Record one document that could not be asked about.

        Raises:
            Exception: `error` itself, if it is not about this document.
            DataError: no document has been answered yet, and `HOPELESS` could not be asked about.
        """
        if not is_of_document(error):
            raise error
        found = self.reasons.setdefault(task, {})
        found[document] = one_line(error)
        if len(found) >= HOPELESS:
            self.require_answers(task)

    def part(self, tasks: Iterable[str]) -> "Refusals":
        """What is known of some tasks."""
        found = Refusals()
        for task in tasks:
            found.reasons |= {task: self.reasons[task]} if task in self.reasons else {}
            found._answered[task] = self._answered[task]
        return found

    def merge(self, other: "Refusals") -> None:
        """Add the documents of another process."""
        for task, reasons in other.reasons.items():
            self.reasons.setdefault(task, {}).update(reasons)
        self._answered.update(other._answered)

    def require_answers(self, task: str) -> None:
        """
        Raises:
            DataError: documents of the task were tried, and none could be asked about.
        """
        found = self.reasons.get(task)
        if found and not self._answered[task]:
            document = min(found)
            count = f"none of {len(found)} documents" if len(found) > 1 else "the document"
            raise DataError(
                f"{count} can be asked about: {found[document]}",
                where=f"{task} document {document}",
                hint="check that the task's data and the model's processor fit",
            )

    def of(self, task: str) -> dict[str, Any] | None:
        """The entry of a task in `results.json`: how many documents, and the first; None without
        any."""
        found = self.reasons.get(task)
        if not found:
            return None
        first = min(found)
        return {"documents": len(found), "first": first, "reason": found[first]}


def describe(task: str, found: dict[str, Any]) -> str:
    """The result of `Refusals.of` as a sentence."""
    count = found["documents"]
    said = "1 document" if count == 1 else f"{count:,} documents"
    verb = "counts" if count == 1 else "count"
    return (
        f"{task}: {said} could not be asked about and {verb} as wrong; the first is document "
        f"{found['first']} ({found['reason']})"
    )
