"""Checks of answers."""

from dataclasses import replace
from typing import Literal

import pytest

from mmkd.errors import RecipeError
from mmkd.making.base import Answer
from mmkd.making.checks import AnswerCheck, Candidate, Verdict, build_checks
from mmkd.making.checks.form import most_repeated
from mmkd.making.checks.judge import ratings
from mmkd.making.checks.objects import Vocabulary, singular
from mmkd.making.checks.reference import same_choice, same_number, same_text
from mmkd.making.checks.words import word_f1
from mmkd.making.choose import Answered, Judged
from mmkd.making.questions import Question, Questions
from mmkd.recipe import CHECKS, CheckConfig, add_check, load_make

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
NOTHING: list[Answer] = []


def question(objects=(), reference=None):
    return Question("a", ASKED, [("a.png", None)], objects, reference)


def check(settings, *, names=(), n=4):
    config = load_make(
        {"records": "a.json", "out": "a.jsonl", "checks": [settings],
         "sampling": {"n": n, "temperature": 1.0}}, "make"
    )  # fmt: skip
    return build_checks(config, Questions(lambda i: question(), 1, frozenset(names)))[0]


def said(*texts, finished=True):
    return [Candidate(text, finished, "teacher") for text in texts]


def passed(verdicts):
    return [verdict.passed for verdict in verdicts]


def scores(verdicts):
    return [verdict.score for verdict in verdicts]


def test_empty_and_cut():
    answers = said("A dog.", "", " .!? ", "é", "3")
    empty = check("empty").verdicts(question(), answers, NOTHING)
    assert passed(empty) == [True, False, False, True, True]
    cut = check("cut").verdicts(question(), said("A") + said("A", finished=False), NOTHING)
    assert passed(cut) == [True, False]


def test_repeats_counts_sequences_of_words():
    assert most_repeated("a b A b a b", 2) == 3
    assert most_repeated("a b", 3) == 0
    answers = said("a b c a b c a b c", "a b c a b c", "a b")
    found = check({"kind": "repeats", "ngram": 3, "most": 2})
    assert passed(found.verdicts(question(), answers, NOTHING)) == [False, True, True]


def test_agreement_is_the_mean_word_f1():
    assert word_f1("A red dog.", "a red cat") == pytest.approx(2 / 3)
    assert word_f1("a a b", "a b b") == pytest.approx(2 / 3)
    assert word_f1("", "") == 1
    assert word_f1("", "a") == 0
    found = check({"kind": "agrees", "least": 0.5})
    same = found.verdicts(question(), said(*["A dog."] * 4), NOTHING)
    assert scores(same) == [(1.0,)] * 4
    assert all(passed(same))
    mixed = found.verdicts(question(), said("dog", "dog", "dog", "cat"), NOTHING)
    assert scores(mixed) == [(2 / 3,)] * 3 + [(0.0,)]
    assert passed(mixed) == [True] * 3 + [False]
    # what an earlier check has refused agrees with nothing
    assert scores(found.verdicts(question(), said("dog", "dog"), NOTHING)) == [(1 / 3,)] * 2


def test_reference():
    assert same_text("It is a Dog", "it is a dog.")
    assert not same_text("dogs", "dog")
    assert same_choice("(B) A dog.", "b")
    assert same_choice("B. A dog", "B")
    assert not same_choice("Bird", "B")
    assert not same_choice("A", "B")
    assert same_number("So 1,200 in all: 12.0", "12")
    assert not same_number("none", "none")
    assert same_number("-3", "x = -3.0")
    assert not same_number("3", "4")
    found = check({"kind": "reference", "match": "number"})
    verdicts = found.verdicts(question(reference="3"), said("3 dogs", "4"), NOTHING)
    assert passed(verdicts) == [True, False]
    assert scores(verdicts) == [(1.0,), (0.0,)]
    assert passed(found.verdicts(question(), said("3"), NOTHING)) == [False]


@pytest.mark.parametrize("match", ["text", "choice", "number"])
def test_answers_that_differ_from_the_records_own(match):
    """Each answer either equals the record's own one or differs, and texts that are equal never
    differ, also if `match` finds nothing in them to compare."""
    same = check({"kind": "reference", "match": match})
    differs = check({"kind": "reference", "match": match, "differ": True})
    for truth in ("B. 3 dogs", "no"):
        there = question(reference=truth)
        answers = said("B. 3 dogs", "b) 3 cats", "A. 3 dogs", "Bird 4", "no", "No.")
        equal = [match_or_text(same, there, answer) for answer in answers]
        assert passed(differs.verdicts(there, answers, NOTHING)) == [not one for one in equal]
    assert passed(differs.verdicts(question(), said("3"), NOTHING)) == [False]
    assert scores(differs.verdicts(question(), said("3"), NOTHING)) == [None]


def match_or_text(same, there, answer):
    (verdict,) = same.verdicts(there, [answer], NOTHING)
    return verdict.passed or same_text(answer.text, there.reference)


def test_mathematical_expressions():
    pytest.importorskip("math_verify")
    found = check({"kind": "reference", "match": "math"})
    answers = said(r"$\frac{1}{2}$", "$0.5$", "$2/4$", "$1/3$")
    verdicts = found.verdicts(question(reference="$1/2$"), answers, NOTHING)
    assert passed(verdicts) == [True, True, True, False]


@pytest.mark.parametrize(
    ("one", "many"),
    [("dog", "dogs"), ("glass", "glasses"), ("bus", "buses"), ("knife", "knives"),
     ("shoe", "shoes"), ("cookie", "cookies"), ("cherry", "cherries"), ("hot dog", "hot dogs"),
     ("box", "boxes"), ("pie", "pies"), ("person", "people"), ("potato", "potatoes"),
     ("bench", "benches"), ("horse", "horses"), ("tie", "ties")],
)  # fmt: skip
def test_singular_and_plural_are_one_name(one, many):
    assert singular(one) == singular(many)
    assert Vocabulary([one]).named_in(f"Two {many} here") == {singular(one)}
    assert Vocabulary([many]).named_in(f"One {one}.") == {singular(one)}


def test_longer_names_come_first():
    names = Vocabulary(["dog", "hot dog", "traffic light", "light"])
    assert names.named_in("A hot dog and two traffic lights.") == {"hot dog", "traffic light"}
    assert names.named_in("A dog is hot, the light is dim") == {"dog", "light"}
    assert Vocabulary([]).named_in("A dog") == set()


def test_objects_count_invented_ones_first():
    found = check({"kind": "objects", "most_invented": 0}, names=["dog", "key", "cat"])
    there = question(objects=("dog", "key"))
    texts = ["A dog and a key.", "A dog.", "A dog, a key and a cat.", "A cat and two cats.", ""]
    verdicts = found.verdicts(there, said(*texts), NOTHING)
    assert scores(verdicts) == [(0, 0), (0, -1), (-1, 0), (-1, -2), (0, -2)]
    assert passed(verdicts) == [True, True, False, False, True]
    assert max(verdicts, key=lambda v: v.score) is verdicts[0]
    # names of several words, in the plural, and the record's own in another form
    foods = check({"kind": "objects"}, names=["hot dogs", "dog"])
    verdicts = foods.verdicts(question(objects=("hot dogs",)), said("One hot dog"), NOTHING)
    assert scores(verdicts) == [(0, 0)]


def test_ratings_are_read_only_if_there_are_as_many_as_asked():
    assert ratings("Rating: 7", 1) == [7]
    assert ratings("A: 10, B: 4", 2) == [10, 4]
    assert ratings("A: 7/10, B: 8.5 / 10.", 2) == [7, 8.5]
    assert ratings("7 or 8", 1) == []
    assert ratings("4/5", 1) == []
    assert ratings("10.5", 1) == []
    assert ratings("Good.", 1) == []
    assert ratings("A: 0", 1) == []


def judged(*entries):
    answers = []
    for number, (text, refused, score) in enumerate(entries):
        scores = {} if score is None else {"agrees": score}
        candidate = Candidate(text, True, "teacher")
        answers.append(Judged(number, candidate, f"key{number}", refused, scores))
    return Answered(0, question(), answers)


def test_best_and_pair():
    answers = judged(
        ("a", None, (0.6,)), ("b", None, (0.9,)), ("c", "agrees", (0.1,)), ("d", "cut", None)
    )
    assert answers.best("agrees").candidate.text == "b"
    assert answers.best(None).candidate.text == "a"
    assert [j.candidate.text for j in answers.pair("agrees")] == ["b", "c"]
    assert judged(("a", None, (1.0,)), ("b", None, (1.0,))).pair("agrees") is None
    assert judged(("a", "agrees", (0.2,)), ("b", "agrees", (0.1,))).pair("agrees") is None
    assert judged(("a", "cut", None)).best("agrees") is None
    # a judge may rate equal answers differently; training refuses a pair of them
    assert judged(("a", None, (9.0,)), ("a", None, (8.0,))).pair("agrees") is None
    same = judged(("a", None, (9.0,)), ("a", None, (1.0,)), ("b", None, (2.0,))).pair("agrees")
    assert [j.candidate.text for j in same] == ["a", "b"]


def test_answers_that_were_cut_are_in_no_pair():
    found = judged(
        ("a", None, (3.0,)), ("b", None, (2.0,)), ("c", None, (1.0,)), ("d", None, (4.0,))
    )
    for number in (2, 3):
        answer = found.answers[number]
        answer.candidate = replace(answer.candidate, finished=False)
    assert [j.candidate.text for j in found.pair("agrees")] == ["a", "b"]


def test_checks_see_what_passed_before():
    answers = judged(
        ("dog", None, None), ("dog", None, None), ("", None, None), ("cat", None, None)
    )
    for settings in ("empty", {"kind": "agrees", "least": 0.3}):
        answers.apply(check(settings), NOTHING)
    assert [a.refused for a in answers.answers] == [None, None, "empty", "agrees"]
    assert answers.answers[0].scores == {"agrees": (1 / 3,)}


class _LengthConfig(CheckConfig):
    scores = True
    kind: Literal["length"]
    least: int = 2


class _Length(AnswerCheck):
    """Scores answers by their words, and forgets the score of "silent"."""

    config_class = _LengthConfig

    def verdicts(self, question, answers, replies):
        counts = [len(a.text.split()) for a in answers]
        return [
            Verdict(n >= self.config.least, None if a.text == "silent one" else (float(n),))
            for a, n in zip(answers, counts, strict=True)
        ]


def test_a_check_from_outside(monkeypatch):
    monkeypatch.setattr(CHECKS, "_added", {})
    add_check(_Length)
    found = check({"kind": "length", "least": 3})
    answers = judged(("a b c", None, None), ("a b c d", None, None), ("a", None, None))
    answers.apply(found, NOTHING)
    assert [a.refused for a in answers.answers] == [None, None, "length"]
    assert answers.best("length").candidate.text == "a b c d"
    with pytest.raises(RecipeError, match="unknown key -- did you mean 'least'"):
        check({"kind": "length", "lest": 3})
    with pytest.raises(RecipeError, match="'length' scores answers, and has passed one without"):
        judged(("silent one", None, None)).apply(check({"kind": "length"}), NOTHING)
