"""Judges: several reviewers, an adjudicator, and the record's own answer next to the new one."""

import itertools
import random
import re

import pytest

from mmkd.errors import RecipeError
from mmkd.making.base import Answer
from mmkd.making.checks import Candidate, build_checks
from mmkd.making.questions import Question, Questions
from mmkd.recipe import load_make

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
SHOWN = re.compile(r"Answer(?: [AB])?: (.*?)\n\n", re.DOTALL)


def question(reference=None):
    return Question("a", ASKED, [("a.png", None)], reference=reference)


def judge(**settings):
    config = load_make(
        {"records": "a.json", "out": "a.jsonl", "sampling": {"n": 4, "temperature": 1.0},
         "checks": [{"kind": "judge", "by": "b", **settings}]}, "make"
    )  # fmt: skip
    return build_checks(config, Questions(lambda i: question(), 1))[0]


def said(*texts, makers=("a",)):
    return [Candidate(t, True, m) for t, m in zip(texts, itertools.cycle(makers), strict=False)]


def run(check, answers, rate, reference=None):
    """What a judge finds, and what it asked: (model, the answers that it showed).

    Args:
        rate: (model, texts) -> ratings, or None for a reply that cannot be read.
    """
    replies, asked = [], []
    while len(asks := check.asks(question(reference), answers, replies)) > len(replies):
        assert [SHOWN.findall(a.question.text) for a in asks[: len(asked)]] == [t for _, t in asked]
        for ask in asks[len(replies) :]:
            texts = SHOWN.findall(ask.question.text)
            assert ask.question.references == question().references
            asked.append((ask.model, texts))
            given = rate(ask.model, texts)
            replies.append(Answer("?" if given is None else ", ".join(map(str, given)), True))
    return check.verdicts(question(reference), answers, replies), asked


def by_text(**values):
    """A judge that gives each text a value of its own, and the first one a point more."""
    return lambda model, texts: [values[t] + (i == 0 < len(texts) - 1) for i, t in enumerate(texts)]


def scores(verdicts):
    return [None if v.score is None else v.score[0] for v in verdicts]


def test_a_judge_rates_each_pair_in_both_orders():
    answers = said("good", "bad", "fair")
    verdicts, asked = run(judge(least=5), answers, by_text(good=9, bad=2, fair=5))
    pairs = [texts for _, texts in asked]
    assert sorted(pairs) == sorted(map(list, itertools.permutations(["good", "bad", "fair"], 2)))
    assert scores(verdicts) == [9.5, 2.5, 5.5]  # the preference cancels
    assert [v.passed for v in verdicts] == [True, False, True]
    verdicts, asked = run(judge(), answers[:1], by_text(good=7))
    assert asked == [("b", ["good"])]
    assert verdicts[0].passed  # 7 is enough by default
    verdicts, _ = run(judge(), answers, lambda model, texts: None)
    assert [(v.passed, v.score) for v in verdicts] == [(False, None)] * 3


def test_several_reviewers_are_averaged():
    """A reviewer alone gives its rating; each further one counts as much, and one whose replies
    cannot be read does not count."""
    answers, rate = said("x", "y"), {"b": 4, "c": 7, "d": None}

    def given(model, texts):
        return None if rate[model] is None else [rate[model] for _ in texts]

    for names in (["b"], ["c"], ["b", "c"], ["c", "b"], ["b", "b2"], ["b", "c", "d"]):
        rate["b2"] = rate["b"]
        verdicts, asked = run(judge(by=names), answers, given)
        readable = [rate[n] for n in names if rate[n] is not None]
        assert scores(verdicts) == [sum(readable) / len(readable)] * 2
        assert [m for m, _ in asked] == [n for n in names for _ in range(2)]


def test_an_adjudicator_decides_where_reviewers_disagree():
    """It is asked about these answers only, and its rating alone counts."""
    settings = {"by": ["b", "c"], "spread": 2, "adjudicator": "d"}
    rate = {
        ("b", "same"): 5, ("c", "same"): 7,  # a spread of 2 is not more than 2
        ("b", "apart"): 2, ("c", "apart"): 9, ("d", "apart"): 8,
        ("b", "far"): 9, ("c", "far"): 1, ("d", "far"): 3,
        ("b", "odd"): 9, ("c", "odd"): 1, ("d", "odd"): None,
    }  # fmt: skip

    def given(model, texts):
        found = [rate[model, text] for text in texts]
        return None if None in found else found

    def asked_of_d(*texts):
        verdicts, asked = run(judge(**settings), said(*texts), given)
        return [(v.passed, *(v.score or ())) for v in verdicts], [t for m, t in asked if m == "d"]

    assert asked_of_d("same") == ([(False, 6)], [])
    assert asked_of_d("apart") == ([(True, 8)], [["apart"]])
    assert asked_of_d("same", "apart") == ([(False, 6), (True, 8)], [["apart"]])
    found, pairs = asked_of_d("apart", "same", "far")
    assert found == [(True, 8), (False, 6), (False, 3)]
    assert pairs == [["apart", "far"], ["far", "apart"]]
    assert asked_of_d("odd") == ([(False,)], [["odd"]])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_model_rates_its_own_answers(count):
    """Whatever the makers, each answer is rated by every reviewer that has not made it."""
    for makers in (["a", "b", "c"], ["c", "b"], ["a", "b"]):
        texts = [f"{i} by {makers[i % len(makers)]}" for i in range(count)]
        answers = said(*texts, makers=makers)
        check = judge(by=["b", "c", "e"], spread=1, adjudicator="d")
        _, asked = run(check, answers, lambda model, shown: [1 + 8 * (model == "b")] * len(shown))
        for model in ("b", "c", "e"):
            rated = {text for name, shown in asked if name == model for text in shown}
            assert rated == {text for text in texts if not text.endswith(model)}


@pytest.mark.parametrize("seed", range(20))
def test_the_difference_to_the_own_answer(seed):
    """Swapping the two answers negates it for any judge, readable or not; it is 0 for equal ones;
    and it is the mean of the differences of both orders."""
    chance, memory = random.Random(seed), {}

    def rate(model, texts):
        key = (model, *texts)
        if key not in memory:
            memory[key] = [chance.randint(1, 10) for _ in texts] if chance.random() < 0.8 else None
        return memory[key]

    check = judge(by=["b", "c"], margin=1)
    for new, own in (("x", "y"), ("a b", "c")):
        (there,), asked = run(check, said(new), rate, own)
        (back,), _ = run(check, said(own), rate, new)
        assert asked == [(m, pair) for m in ("b", "c") for pair in ([new, own], [own, new])]
        means = []
        for model in ("b", "c"):
            first, second = rate(model, [new, own]), rate(model, [own, new])
            rows = [first[0] - first[1]] if first else []
            rows += [second[1] - second[0]] if second else []
            means += [sum(rows) / len(rows)] if rows else []
        expected = sum(means) / len(means) if means else None
        assert scores([there]) == [expected]
        assert scores([back]) == [None if expected is None else -expected]
        assert there.passed == (expected is not None and expected >= 1)
    (same,), _ = run(check, said("x"), lambda model, texts: [9, 2], "x")
    assert (same.passed, same.score) == (False, (0.0,))


def test_each_answer_is_rated_next_to_the_own_one():
    check = judge(margin=1)
    verdicts, asked = run(check, said("good", "bad", "own"), by_text(good=8, bad=2, own=5), "own")
    pairs = [["good", "own"], ["own", "good"], ["bad", "own"], ["own", "bad"]]
    assert [t for _, t in asked] == [*pairs, ["own", "own"], ["own", "own"]]
    assert scores(verdicts) == [3, -3, 0]
    assert [v.passed for v in verdicts] == [True, False, False]
    assert run(check, said("good"), by_text(), None)[1] == []  # a record without an answer
    (refused,), _ = run(check, said("good"), by_text(), None)
    assert (refused.passed, refused.score) == (False, None)
    assert all(v.passed for v in run(judge(margin=-9), said("x"), by_text(x=1, y=9), "y")[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"least": 7, "margin": 1}, "give either 'least' or 'margin'"),
        ({"by": ["b", "b"]}, "'by' names a reviewer twice"),
        ({"spread": 2}, "'spread' and 'adjudicator' go together -- give both or neither"),
        ({"adjudicator": "d"}, "'spread' and 'adjudicator' go together"),
        ({"spread": 2, "adjudicator": "d"}, "one reviewer has no spread -- name two in 'by'"),
        (
            {"by": ["b", "c"], "spread": 2, "adjudicator": "c"},
            "the adjudicator 'c' is a reviewer -- name another model",
        ),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(RecipeError) as caught:
        judge(**settings)
    assert message in str(caught.value)
