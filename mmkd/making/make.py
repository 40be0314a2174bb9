"""Make the records of an entry of `make`: ask, check, choose, write.

OUT                     the records
OUT.answers/            all answers so far (`mmkd.making.log`)
  made.json             the settings of OUT
  counts.json           how many questions were kept
  hashes-NNNNN.jsonl    hashes of images, if near-duplicates are left out
"""

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mmkd.data.templates import without_media_tokens
from mmkd.data.turns import PLACEHOLDER
from mmkd.errors import HINT, DataError
from mmkd.making.ask import Asked, Asker, shared
from mmkd.making.base import Answer, Maker, Request
from mmkd.making.checking import Checking
from mmkd.making.checks import Candidate, Cut, Empty, Repeats, build_checks
from mmkd.making.choose import Answered, Judged, hard_share, refusals
from mmkd.making.distinct import check_distinct, topic_of, without_similar
from mmkd.making.listed import Listed
from mmkd.making.log import AnswerLog
from mmkd.making.makers import build_makers, check_judges
from mmkd.making.near_duplicates import LeftOut, leave_out
from mmkd.making.object_questions import balanced, object_questions
from mmkd.making.opened import open_entry
from mmkd.making.questions import Question, Questions
from mmkd.making.rationales import ask_why, rationale_row
from mmkd.making.requests import request_of
from mmkd.making.state import begin_writing, end_writing, facts_of, folder_of, write_counts
from mmkd.making.writing import RecordWriter, Row, join_rows, write_records
from mmkd.recipe import EvaluateConfig, MakeConfig, Recipe, SamplingConfig
from mmkd.runtime import distributed
from mmkd.students import converted_processor

EMPTY = "empty"


class NothingKeptError(DataError):
    """There are answers, and none becomes a record."""


@dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
        out: the file.
        questions: number of questions.
        records: number of records that were written; 0 on other processes than the first.
        answers: number of answers, those of earlier calls included.
        refused: number of answers that each check has refused, in the order of the checks.
        hard: for each check that looks for hard questions, how many are hard, and of how many its
            verdict is known.
        similar: number of texts that 'distinct' has left out; None if there is no such limit.
        unanswered: number of questions without a record.
        asked: what was asked in this call.
        left_out: near-duplicates, which are not asked about.
    """

    out: Path
    questions: int
    records: int
    answers: int
    refused: dict[str, int]
    hard: dict[str, tuple[int, int]]
    similar: int | None
    unanswered: int
    asked: Asked
    left_out: LeftOut

    @property
    def counts(self) -> dict[str, Any]:
        """What is kept of it, as JSON."""
        return {
            "questions": self.questions,
            "kept": self.questions - self.unanswered,
            "records": self.records,
            "answers": self.answers,
            "refused": self.refused,
            "hard": self.hard,
        }


def make_answers(recipe: Recipe, name: str, device: torch.device) -> Made:
    """Make the records of an entry of a recipe's `make`. Every rank calls it.

    Args:
        recipe: with the entry and its models.
        name: of the entry.
        device: of models that run here.

    Raises:
        MmkdError, StoppedError: as `make_records`.
    """
    config = recipe.make[name]
    makers = build_makers(recipe, config.models, config.batch_size, device)
    processor = converted_processor(recipe.student)
    return make_records(config, makers, f"make.{name}", processor, recipe.evaluate)


def make_records(
    config: MakeConfig,
    makers: dict[str, Maker],
    where: str,
    processor: Any,
    evaluation: EvaluateConfig | None = None,
) -> Made:
    """Make records. Every rank calls it.

    Only answers that are not known yet are asked for, so a call after a stop goes on, and one with
    more images asks about these. The file is a function of the settings and of the answers; order,
    batch size and the number of processes do not change it.

    Args:
        config: what to make.
        makers: the models that it names.
        where: what messages call it.
        processor: of the model that is trained on the records. What it would read as an image is
            removed from answers.
        evaluation: of the recipe, which says where tasks of `against` are.

    Raises:
        NothingKeptError: no answer becomes a record.
        MmkdError: settings, data or a model do not fit.
        StoppedError: the command was asked to stop.
    """
    job = _Job(config, makers, where, processor, evaluation)
    with distributed.alone_in(folder_of(config)):
        return job.run()


class _Job:
    """One call of `make_records`, whose arguments it takes."""

    def __init__(
        self,
        config: MakeConfig,
        makers: dict[str, Maker],
        where: str,
        processor: Any,
        evaluation: EvaluateConfig | None,
    ):
        self.config, self.makers, self.where = config, makers, where
        self.processor, self.evaluation = processor, evaluation
        sources = {name: maker.source for name, maker in makers.items()}
        self.facts = facts_of(config, sources, evaluation)
        there = [file for file in config.files if Path(file).exists()]
        if there and not folder_of(config).exists():
            raise DataError("it is there already", where=there[0], hint="name a new file")
        self.questions, self.lists, self.context = open_entry(config, where)
        self.checks = build_checks(config, self.questions)
        self.revisions = {n: maker.revision for n, maker in makers.items()}
        check_judges(config, makers, where)
        check_distinct(config, where)
        self.unreadable: dict[int, str] = {}
        self.similar = None if config.distinct is None else 0
        self.left_out = LeftOut()

    def run(self) -> Made:
        log = AnswerLog(folder_of(self.config), distributed.rank())
        distributed.barrier()
        self.questions, self.lists, self.left_out = leave_out(
            self.config, self.evaluation, self.where, self.questions, self.lists
        )
        asker = Asker(self.makers, log, self.where.removeprefix("make."))
        if self.lists is not None:
            self._ask_about_objects(self.lists, asker)
        own = {index: self._candidates(index) for index in self._own()}
        asker.ask([pair for row in own.values() for pair in row], self.config.sampling)
        keys = shared({index: [r.key for _, r in row] for index, row in own.items()})
        answered = [one for i, row in keys.items() if (one := self._answered(i, row, log))]
        checking = Checking(self.questions, self.revisions, self.config.seed, asker, self.where)
        for check in self.checks:
            checking.apply(check, answered)
        found = self._rows(answered)
        if not any(found):
            raise self._nothing_kept(answered, asker.asked)
        why = self._rationales(answered, found, asker)
        written, used = len(self._write(answered, found, why)), sum(map(bool, found))
        missing = shared(self.unreadable)
        asker.asked.unreadable |= {f"question {i}": error for i, error in missing.items()}
        made = self._summary(answered, written, used, asker.asked)
        if distributed.rank() == 0:
            end_writing(self.config, self.facts, made.counts)
        return made

    def _nothing_kept(self, answered: list[Answered], asked: Asked) -> DataError:
        """The error if no answer becomes a record. The counts are written."""
        if distributed.rank() == 0:
            begin_writing(self.config)
            write_counts(self.config, self._summary(answered, 0, 0, asked).counts)
        total, refused = sum(len(one.answers) for one in answered), refusals(answered)
        reasons = [f"{n:,} refused by '{kind}'" for kind, n in sorted(refused.items())]
        if self.similar:
            reasons.append(f"{self.similar:,} too similar to an earlier text")
        if left := total - refused.total() - (self.similar or 0):
            reasons.append(f"{left:,} without a worse answer or a balancing question")
        errors = shared(self.unreadable).values() or asked.unreadable.values()
        hint = "change the checks or prompts; raise sampling.n, or sampling.max_new_tokens"
        if not total and (first := next(iter(errors), None)):
            reasons, hint = [f"nothing could be asked, {first}"], "check the images and prompts"
        elif not total:
            reasons, hint = ["there is no question"], "lower objects.least_images"
        what = f"no answer becomes a record: of {total:,} answers, {', '.join(reasons)}"
        kind = NothingKeptError if total else DataError
        return kind(what.replace(HINT, "; "), where=self.config.out, hint=hint)

    def _rows(self, answered: list[Answered]) -> list[list[Row]]:
        """The rows of each question."""
        writer = RecordWriter(self.config, self.revisions)
        found = self._distinct(answered, [writer.rows(one) for one in answered])
        asked = [one.question for one in answered]
        dropped = balanced([(q, len(rows)) for q, rows in zip(asked, found, strict=True)])
        return [[] if place in dropped else rows for place, rows in enumerate(found)]

    def _distinct(self, answered: list[Answered], found: list[list[Row]]) -> list[list[Row]]:
        """The rows whose texts are not too similar to earlier ones."""
        if self.config.distinct is None:
            return found
        own = range(distributed.rank(), len(answered), distributed.world_size())
        indices = {place: answered[place].index for place in own}
        topics = shared(
            {p: topic_of(self.questions.at(i), self.config) for p, i in indices.items()}
        )
        kept = without_similar(self.config, answered, [*topics.values()], found)
        self.similar = sum(map(len, found)) - sum(map(len, kept))
        return kept

    def _write(self, answered: list[Answered], found: list[list[Row]], why: list[Row]) -> list[Row]:
        """Write the files of the entry, on the first process; returns the records of `out`."""
        rows = [row for part in found for row in part]
        if self.config.join:
            asked = [one.question for one, p in zip(answered, found, strict=True) if p]
            rows = join_rows(list(zip(asked, rows, strict=True)), self.config.seed)
        if distributed.rank() == 0:
            begin_writing(self.config)
            write_records(Path(self.config.out), rows, self._images)
            if self.config.why is not None:
                write_records(Path(self.config.why.out), why, self._images)
        return rows

    def _images(self, index: int) -> list[tuple[Any, Path | None]]:
        return self.questions.at(index).references

    def _rationales(
        self, answered: list[Answered], found: list[list[Row]], asker: Asker
    ) -> list[Row]:
        """Ask for rationales of the kept answers; returns their records."""
        config = self.config.why
        if config is None:
            return []
        sampling = self.config.sampling.model_copy(
            update={"max_new_tokens": config.max_new_tokens, "n": 1}
        )
        kept = [(one, rows[0]) for one, rows in zip(answered, found, strict=True) if rows]
        own: dict[int, tuple[str, Request]] = {}
        for place in range(distributed.rank(), len(kept), distributed.world_size()):
            one, row = kept[place]
            name = row["made"]["by"]
            again = partial(self._whole, one.index)
            answer = row["messages"][-1]["content"][0]["text"]
            if not self.config.finds_hard:  # whose own answers are another model's
                answer = one.question.reference or answer
            question = ask_why(config, again(), answer)
            revision, seed = self.revisions[name], self.config.seed
            own[place] = (name, request_of(question, revision, sampling, seed, 0, again))
        asker.ask(list(own.values()), sampling, ": why")
        keys = shared({place: request.key for place, (_, request) in own.items()})
        made = []
        for place, (one, row) in enumerate(kept):
            reply = asker.log.answers.get(keys[place])
            if reply is not None and self._is_good(one, reply):
                text = self._text(reply)
                made.append(rationale_row(config, one.question, row, text, reply.finished))
        return made

    def _is_good(self, one: Answered, reply: Answer) -> bool:
        """Whether the checks of an answer's form pass a rationale."""
        candidate = Candidate(self._text(reply), reply.finished, "")
        forms = [check for check in self.checks if isinstance(check, Empty | Cut | Repeats)]
        verdicts = [check.verdicts(one.question, [candidate], [])[0] for check in forms]
        return bool(candidate.text) and all(verdict.passed for verdict in verdicts)

    def _ask_about_objects(self, lists: Questions, asker: Asker) -> None:
        """Ask for the objects of each image, and add the questions about them."""
        config, name = self.config.objects, self.config.by[0]
        assert config is not None
        sampling = SamplingConfig(temperature=0, max_new_tokens=config.max_new_tokens)
        own: dict[int, Request] = {}
        for index in range(distributed.rank(), len(lists), distributed.world_size()):
            try:
                again = partial(self._whole, index, lists)
                own[index] = request_of(again(), self.revisions[name], sampling, 0, 0, again)
            except DataError as error:
                self.unreadable[index] = str(error)
        asker.ask([(name, request) for request in own.values()], sampling, ": objects")
        keys = shared({index: request.key for index, request in own.items()})
        known = {i: asker.log.answers[key] for i, key in keys.items() if key in asker.log.answers}
        images = {index: replace(lists.at(index), references=[]) for index in known}
        texts = {images[index].group: self._text(answer) for index, answer in known.items()}
        listed = Listed.of(texts, config.names, config.least_images)
        more = [
            (index, question)
            for index, image in images.items()
            for question in object_questions(config, image, listed, self.config.seed)
        ]
        self.questions = self.questions.with_more(lists, more)

    def _whole(self, index: int, questions: Questions | None = None) -> Question:
        """A question, with the context that only the maker reads."""
        return self.context.before((questions or self.questions).at(index))

    def _own(self) -> range:
        """Indices of the questions that this process asks."""
        return range(distributed.rank(), len(self.questions), distributed.world_size())

    def _candidates(self, index: int) -> list[tuple[str, Request]]:
        """What is asked for a question: a request for each candidate, with the name of the model.
        Several models take turns. None if an image is missing."""
        sampling = self.config.sampling
        try:
            again = partial(self._whole, index)
            question = again()
            found = []
            for number in range(sampling.n):
                name = self._maker(question, number)
                revision = self.revisions[name]
                seed = self.config.seed
                request = request_of(question, revision, sampling, seed, number, again)
                found.append((name, request))
        except DataError as error:
            self.unreadable[index] = str(error)
            return []
        return found

    def _maker(self, question: Question, number: int) -> str:
        """Name of the model that gives a candidate. It depends on the question's id, not on its
        place, so that further images do not change it."""
        names = self.config.by
        first = hashlib.blake2b(question.id.encode(), digest_size=8).digest()
        return names[(int.from_bytes(first) + number) % len(names)]

    def _answered(self, index: int, keys: list[str], log: AnswerLog) -> Answered | None:
        """A question with its answers; None if it could not be asked."""
        if not keys or any(key not in log.answers for key in keys):
            return None
        question = replace(self.questions.at(index), references=[])
        answers = []
        for number, key in enumerate(keys):
            answer = log.answers[key]
            maker = self._maker(question, number)
            candidate = Candidate(self._text(answer), answer.finished, maker)
            # A record needs a text, whatever the checks are.
            refused = None if candidate.text else EMPTY
            answers.append(Judged(number, candidate, key, refused))
        return Answered(index, question, answers)

    def _text(self, answer: Answer) -> str:
        """The text of an answer without what a record, or the student, would read as an image."""
        text = answer.text
        while PLACEHOLDER in text:
            text = text.replace(PLACEHOLDER, "")
        return without_media_tokens(self.processor, text).strip()

    def _summary(self, answered: list[Answered], records: int, used: int, asked: Asked) -> Made:
        counts = refusals(answered)
        kinds = dict.fromkeys([EMPTY, *(check.config.kind for check in self.checks)])
        return Made(
            out=Path(self.config.out),
            questions=len(self.questions),
            records=records,
            answers=sum(len(one.answers) for one in answered),
            refused={kind: counts[kind] for kind in kinds},
            hard={c.kind: hard_share(answered, c.kind) for c in self.config.checks if c.finds_hard},
            similar=self.similar,
            unanswered=len(self.questions) - used,
            asked=asked,
            left_out=self.left_out,
        )
