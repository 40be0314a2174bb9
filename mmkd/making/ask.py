"""Ask models for the answers that are not known yet, on one process or several."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from mmkd.errors import StoppedError
from mmkd.making.base import Answer, Maker, Request
from mmkd.making.log import AnswerLog
from mmkd.recipe import SamplingConfig
from mmkd.runtime import distributed
from mmkd.runtime.progress import Bar

T = TypeVar("T")


@dataclass
class Asked:
    """What was asked in this call.

    Attributes:
        answers: number of new answers of all processes.
        known: number of answers that were known before.
        seconds: that the slowest process took.
        unreadable: by key, why a question could not be asked.
    """

    answers: int = 0
    known: int = 0
    seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """New answers per second."""
        return self.answers / self.seconds if self.seconds else 0.0


class Asker:
    """Asks for answers that the log does not have. Every rank calls it with its share of the
    requests, and knows all answers after it.

    Args:
        makers: models by name.
        log: of the answers.
        title: of the progress bar.
    """

    def __init__(self, makers: Mapping[str, Maker], log: AnswerLog, title: str):
        self.makers, self.log, self.title = makers, log, title
        self.asked = Asked()

    def ask(
        self, requests: Sequence[tuple[str, Request]], sampling: SamplingConfig, title: str = ""
    ) -> None:
        """Ask for the answers that are not known yet.

        Args:
            requests: of this process: pairs of a model's name and what it is asked.
            sampling: how answers are sampled.
            title: added to that of the progress bar.

        Raises:
            MmkdError: a model cannot answer. Earlier answers are in the log.
            StoppedError: the command was asked to stop.
        """
        wanted = {r.key: (name, r) for name, r in requests}
        known = {key for key in wanted if key in self.log.answers}
        tried = known | self.asked.unreadable.keys()
        missing = {key: request for key, request in wanted.items() if key not in tried}
        own = list(missing.values())
        start, unreadable, new = time.monotonic(), dict[str, str](), 0
        with Bar(f"{self.title}{title}", len(own), quiet=distributed.rank() > 0) as bar:

            def keep(request: Request, answer: Answer) -> None:
                nonlocal new
                if answer.error is None:
                    self.log.add(request.key, answer)
                    new += 1
                else:
                    unreadable[request.key] = answer.error
                bar.advance(_note(new, time.monotonic() - start, len(unreadable)))

            problem = None
            try:
                for name, maker in self.makers.items():
                    if share := [r for asks, r in own if asks == name]:
                        maker.answer(share, sampling, keep)
                        maker.release()
            except StoppedError as error:
                problem = error
        if not distributed.all_agree(problem is None):
            raise problem or StoppedError("another process was asked to stop")
        self._share(new, len(known), time.monotonic() - start, unreadable)

    def _share(self, new: int, known: int, seconds: float, unreadable: dict[str, str]) -> None:
        """Learn what the other processes have done."""
        told = distributed.gather([(new, known, seconds, unreadable)])
        self.log.read()
        self.asked.answers += sum(count for count, *_ in told)
        self.asked.known += sum(count for _, count, *_ in told)
        self.asked.seconds += max(took for *_, took, _ in told)
        for *_, errors in told:
            self.asked.unreadable |= errors


def _note(new: int, seconds: float, unreadable: int) -> str:
    rate = new / seconds if seconds > 0 else 0.0
    note = f"{rate:,.1f} answers/s"
    return note + (f", {unreadable:,} unreadable images" if unreadable else "")


def shared(own: dict[int, T]) -> dict[int, T]:
    """The entries of all ranks in the order of their keys; every rank calls it."""
    found: dict[int, T] = dict(distributed.gather([*own.items()]))
    return dict(sorted(found.items()))
