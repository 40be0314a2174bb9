"""Scores against hand-computed values."""

import pytest

from mmkd.evaluation import scenes
from tests.support.verdicts import judged


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("Yes, there is a cat.", "yes"),
        (" **No.**", "no"),
        ("NO\nyes", "no"),
        ("not at all", None),
        ("yesterday", None),
        ("there is: yes", None),
        ("", None),
    ],
)
def test_only_an_exact_first_word_is_yes_or_no(text: str, expected: str | None) -> None:
    assert scenes.yes_or_no(text) == expected


def test_pope_scores_by_hand() -> None:
    rows = [
        # random: 2 true positives, 1 false negative, 1 false positive, 1 true negative, 1 neither
        ({"answer": "yes", "category": "random"}, "Yes."),
        ({"answer": "yes", "category": "random"}, "yes, on the left"),
        ({"answer": "yes", "category": "random"}, "no"),
        ({"answer": "no", "category": "random"}, "yes"),
        ({"answer": "no", "category": "random"}, "no"),
        ({"answer": "no", "category": "random"}, "maybe"),
        # adversarial: always yes
        ({"answer": "yes", "category": "adversarial"}, "yes"),
        ({"answer": "no", "category": "adversarial"}, "yes"),
    ]
    found = judged(scenes.process_pope, rows)
    by_hand = {
        "pope_random_accuracy": (scenes.accuracy, 3 / 6),
        "pope_random_precision": (scenes.precision, 2 / 3),
        "pope_random_recall": (scenes.recall, 2 / 3),
        "pope_random_f1": (scenes.f1, 2 / 3),
        "pope_random_yes_rate": (scenes.yes_rate, 3 / 6),
        "pope_adversarial_accuracy": (scenes.accuracy, 1 / 2),
        "pope_adversarial_precision": (scenes.precision, 1 / 2),
        "pope_adversarial_recall": (scenes.recall, 1.0),
        "pope_adversarial_f1": (scenes.f1, 2 / 3),
        "pope_adversarial_yes_rate": (scenes.yes_rate, 1.0),
        "pope_accuracy": (scenes.accuracy, 4 / 8),
        "pope_precision": (scenes.precision, 3 / 5),
        "pope_recall": (scenes.recall, 3 / 4),
        "pope_f1": (scenes.f1, 2 * 0.6 * 0.75 / 1.35),
        "pope_yes_rate": (scenes.yes_rate, 5 / 8),
    }
    assert set(found) == set(by_hand)
    for name, (aggregate, expected) in by_hand.items():
        assert aggregate(found[name]) == pytest.approx(expected), name


def test_pope_scores_of_a_model_that_never_says_yes() -> None:
    found = judged(scenes.process_pope, [({"answer": "yes", "category": "random"}, "cat")])
    verdicts = found["pope_accuracy"]
    measures = [scenes.accuracy, scenes.precision, scenes.recall, scenes.f1, scenes.yes_rate]
    assert [m(verdicts) for m in measures] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "answer", "prediction", "correct"),
    [
        ("count", "3", "3", True),
        ("count", "3", " 3. ", True),
        ("count", "3", "13", False),
        ("name", "tree", "Tree", True),
        ("name", "tree", "trees", False),
        ("choice", "D", "d", True),
        ("choice", "D", "D. grape", True),
        ("choice", "A", "A grape", False),
        ("choice", "D", "B. grape", False),
        ("choice", "A", "apple", False),
        ("relation", "yes", "Yes, it is.", True),
        ("existence", "no", "nope", False),
        ("ocr", "5843", "5843", True),
        ("ocr", "5843", "584", False),
    ],
)
def test_vqa_answers(kind: str, answer: str, prediction: str, correct: bool) -> None:
    verdicts = judged(scenes.process_vqa, [({"answer": answer, "kind": kind}, prediction)])
    assert verdicts["vqa_accuracy"][0]["correct"] is correct


def test_vqa_scores_and_majority_by_hand() -> None:
    rows = [
        ({"answer": "2", "kind": "count"}, "2"),
        ({"answer": "2", "kind": "count"}, "1"),
        ({"answer": "1", "kind": "count"}, "1"),
        ({"answer": "red", "kind": "colour"}, "blue"),
        ({"answer": "blue", "kind": "colour"}, "blue"),
    ]
    found = judged(scenes.process_vqa, rows)
    assert scenes.accuracy(found["vqa_count_accuracy"]) == pytest.approx(2 / 3)
    assert scenes.accuracy(found["vqa_colour_accuracy"]) == pytest.approx(1 / 2)
    assert scenes.accuracy(found["vqa_accuracy"]) == pytest.approx(3 / 5)
    assert scenes.majority_accuracy(found["vqa_count_majority_accuracy"]) == pytest.approx(2 / 3)
    assert scenes.majority_accuracy(found["vqa_colour_majority_accuracy"]) == pytest.approx(1 / 2)
    # one constant answer per kind, not one for all: (2 + 1) / 5
    assert scenes.majority_accuracy(found["vqa_majority_accuracy"]) == pytest.approx(3 / 5)


def test_mentioned_objects_are_whole_words_and_plurals() -> None:
    text = "Two cherries, a Fox and buses. A category of hats, the cat!"
    assert scenes.mentioned_objects(text) == ["cherry", "fox", "bus", "hat", "cat"]


def test_caption_scores_by_hand() -> None:
    rows = [
        # one of three mentions is invented, one of two objects is found
        ({"answer": "a", "objects": ["cat", "dog"]}, "A cat, a cat and a fox."),
        # nothing invented, everything found
        ({"answer": "b", "objects": ["bus"]}, "Buses."),
        # nothing mentioned
        ({"answer": "c", "objects": ["key"]}, "Hello."),
    ]
    verdicts = judged(scenes.process_caption, rows)["caption_chair_s"]
    assert scenes.chair_s(verdicts) == pytest.approx(1 / 3)
    assert scenes.chair_i(verdicts) == pytest.approx(1 / 4)
    assert scenes.object_recall(verdicts) == pytest.approx(2 / 4)
    assert [v["correct"] for v in verdicts] == [False, True, False]


def test_caption_scores_when_no_object_is_named() -> None:
    doc = {"answer": "The number 5.", "objects": []}
    rows = [(doc, "A number."), (doc, "The number 5."), (doc, "The number 6.")]
    verdicts = judged(scenes.process_caption, rows)["caption_chair_i"]
    assert scenes.chair_i(verdicts) == 0
    assert scenes.object_recall(verdicts) == 0
    assert [v["correct"] for v in verdicts] == [False, True, False]


def test_caption_bleu_by_hand() -> None:
    def score(prediction: str) -> float:
        doc = {"answer": "a cat on a red card .", "objects": ["cat"]}
        return scenes.bleu(judged(scenes.process_caption, [(doc, prediction)])["caption_bleu"])

    assert score("a cat on a red card .") == pytest.approx(1)
    # 1- to 4-gram precisions 6/7, 4/6, 2/5, 1/4; equal lengths, so no brevity penalty
    by_hand = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert score("a cat on a blue card .") == pytest.approx(by_hand)
