"""Questions about the objects that a model lists for each image."""

import re
from collections import Counter

import pytest
import torch

from mmkd.errors import RecipeError
from mmkd.making import local
from mmkd.making.checks import Candidate, build_checks
from mmkd.making.listed import Listed, parse_list
from mmkd.making.make import make_answers
from mmkd.making.object_questions import balanced, object_questions, plural
from mmkd.making.questions import Question, Questions
from mmkd.recipe import ObjectQuestionsConfig, load_make, load_recipe
from tests.making.test_refused import entry

ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "List."}]}]


def image(name):
    return Question(name, ASKED, [(f"{name}.png", None)], about=name, group=name)


def asked(config, listed, name, seed=0):
    return object_questions(ObjectQuestionsConfig(**config), image(name), listed, seed)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("A dog, two cats and the hot dog.", ["dog", "cat", "hot dog"]),
        ("1. Dogs\n2. a red car\n- Cookies\n* bench", ["dog", "red car", "cooky", "bench"]),
        ("dog, Dog, dogs", ["dog"]),
        ("I can see many things in this image", []),  # a sentence is no name
        ("", []),
        ("3, 17", []),
    ],
)
def test_lists_are_read(text, names):
    assert list(parse_list(text)) == names


def test_names_are_shown_in_the_singular():
    listed = Listed.of({"a": "cookies, dogs", "b": "a cookie", "c": "two dogs"}, [], 1)
    assert listed.shown == {"cooky": "cookie", "dog": "dog"}
    assert listed.counts == {"cooky": 2, "dog": 2}
    given = Listed.of({"a": "Two cookies next to a hot dog"}, ["cookie", "hot dog", "dog"], 1)
    assert given.objects["a"] == ["cooky", "hot dog"]
    assert given.shown["cooky"] == "cookie"


def test_rare_names_are_not_asked_about():
    listed = Listed.of({"a": "dog, cat", "b": "dog", "c": "key"}, [], 2)
    assert listed.counts == {"dog": 2}
    assert listed.present("a") == ["dog"]
    assert listed.absent("c") == ["dog"]


def test_a_name_that_shares_a_word_with_a_listed_one_is_not_absent():
    answers = {"a": "hot dogs, traffic light", "b": "dog, light, car, dog house", "c": "hot dog"}
    listed = Listed.of(answers, [], 1)
    assert listed.absent("a") == ["car"]
    assert set(listed.absent("b")) == set()  # "hot dog" and "traffic light" share one
    assert set(listed.absent("c")) == {"traffic light", "light", "car"}


@pytest.fixture
def corpus():
    """100 images: one of two, two of three, all with common ones."""
    answers = {}
    for number in range(100):
        names = ["table"]
        names += ["dog", "leash"] if number < 40 else ["boat"]
        names += ["bird"] if number % 10 == 0 else []
        answers[f"{number}"] = ", ".join(names)
    return Listed.of({**answers, "none": "table, sun", "sunny": "sun"}, [], 1)


@pytest.mark.parametrize("kind", ["frequency", "uniform", "cooccurring"])
def test_negatives_are_drawn_in_proportion(corpus, kind):
    """Over many seeds, the first negative of an image follows the weights, computed here from the
    lists."""
    config = {"existence": {"per_image": 2, "negatives": kind}}
    drawn = Counter()
    for seed in range(2000):
        (yes, no) = asked(config, corpus, "none", seed)
        assert (yes.expected, no.expected) == ("yes", "no")
        drawn[re.search(r"there an? (.*) in the", no.text)[1]] += 1
    counts = {"dog": 40, "leash": 40, "boat": 60, "bird": 10}
    weights = {
        "frequency": counts,
        "uniform": dict.fromkeys(counts, 1),
        "cooccurring": counts,  # each is listed together with the table, and none with the sun
    }[kind]
    total = sum(weights.values())
    expected = {name: 2000 * weight / total for name, weight in weights.items()}
    assert set(drawn) == set(expected)
    chi_square = sum((drawn[n] - e) ** 2 / e for n, e in expected.items())
    assert chi_square < 16.3  # 99.9 % of samples, 3 degrees of freedom


def test_cooccurring_prefers_what_is_listed_together():
    answers = {
        "a": "dog, leash",
        "b": "dog, leash",
        "c": "boat",
        "d": "boat",
        "e": "boat",
        "x": "dog",
    }
    listed = Listed.of(answers, [], 1)
    assert listed.together["dog"] == {"leash": 2}
    for seed in range(20):
        questions = asked(
            {"existence": {"per_image": 2, "negatives": "cooccurring"}}, listed, "x", seed
        )
        assert "leash" in questions[1].text


def test_as_many_present_as_absent_objects(corpus):
    for name in ("0", "50", "none", "sunny"):
        questions = asked({"existence": {"per_image": 6}}, corpus, name)
        expected = [q.expected for q in questions]
        assert expected == sorted(expected, reverse=True)
        assert (
            expected.count("yes")
            == expected.count("no")
            == min(3, len(corpus.present(name)), len(corpus.absent(name)))
        )
        for question in questions:
            there = re.search(r"there an? (.*) in the", question.text)[1]
            assert (there in corpus.present(name)) == (question.expected == "yes")
    assert asked({"existence": {}}, corpus, "0") == asked({"existence": {}}, corpus, "0")
    assert asked({"existence": {}}, corpus, "0", 1) != asked({"existence": {}}, corpus, "0", 2)


def test_other_questions():
    listed = Listed.of({"a": "apple, bus", "b": "apple"}, [], 1)
    config = {"ask": ["How many {names}?", "Is {a_name} near the {other}?"], "per_image": 2}
    assert sorted(q.text for q in asked(config, listed, "a")) == [
        "How many apples?", "How many buses?", "Is a bus near the apple?",
        "Is an apple near the bus?",
    ]  # fmt: skip
    assert [q.text for q in asked(config, listed, "b")] == ["How many apples?"]
    assert [plural(n) for n in ("fox", "cherry", "key", "child")] == [
        "foxes", "cherries", "keys", "children"
    ]  # fmt: skip


def test_records_are_balanced():
    def one(name, expected, records):
        return Question(name, ASKED, [], expected=expected, group="a"), records

    found = [one("y1", "yes", 1), one("y2", "yes", 1), one("n1", "no", 0), one("n2", "no", 2)]
    assert balanced([*found, one("free", None, 1)]) == {1}
    assert balanced(found[:2]) == {0, 1}


def test_the_second_pass_must_agree_with_the_list():
    settings = {"pictures": "a", "out": "a.jsonl", "objects": {"existence": {}}}
    config = load_make(settings, "make")
    check = build_checks(config, Questions(lambda i: image("a"), 1))[0]
    answers = [Candidate(t, True, "teacher") for t in ("Yes, a dog.", "no", "**Yes**", "Maybe", "")]
    question = Question("q", ASKED, [], expected="yes", about="a")
    assert [v.passed for v in check.verdicts(question, answers, [])] == [1, 0, 1, 0, 0]
    assert all(v.passed for v in check.verdicts(image("a"), answers, []))


def test_a_folder_gets_questions(recipe, rows, monkeypatch):
    """With the shipped teacher, which describes scenes and answers questions about them."""
    path = recipe(
        prompts=None,
        objects={
            "prompt": "Describe the picture.", "least_images": 1, "per_image": 1,
            "names": ["dog", "train", "key", "apple", "clock", "cat", "car", "book", "cup", "drum"],
            "existence": {"question": "Is there {a_name} in the picture?", "per_image": 2},
            "ask": ["How many {names} are there?"],
        },
        sampling={"max_new_tokens": 48},
        top={"teacher": {"model": "assets/scenes_teacher"}},
    )  # fmt: skip
    made = make_answers(load_recipe(path), "photos", torch.device("cpu"))
    said = [r["messages"][1]["content"][0]["text"].strip(".").lower() for r in rows()]
    asked = [r["messages"][0]["content"][1]["text"] for r in rows()]
    exists = [a for a, q in zip(said, asked, strict=True) if q.startswith("Is there")]
    assert exists.count("yes") == exists.count("no") > 0
    assert len(exists) < len(rows()) == made.records
    assert all(
        re.fullmatch(r"Is there an? \w+ in the picture\?|How many \w+ are there\?", q)
        for q in asked
    )

    def load(*given):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(local, "load_model", load)
    again = make_answers(load_recipe(path), "photos", torch.device("cpu"))
    assert (again.asked.answers, again.records) == (0, made.records)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "there are no questions -- add 'existence' or 'ask'"),
        ({"existence": {"per_image": 3}}, "give an even number"),
        ({"existence": {"question": "Is there a dog?"}}, "names no object"),
        ({"existence": {"question": "Is there {names}?"}}, "placeholder {names} -- known: {name}"),
        ({"ask": ["What is {it}?"]}, "has the placeholder {it}"),
        ({"ask": ["What is {name?"]}, "has a single brace"),
        ({"ask": ["What is {name:d}?"]}, "has a placeholder with ':' or '!'"),
        ({"ask": ["Left of the {other}?"]}, "names no object"),
    ],
)
def test_settings_that_are_refused(recipe, settings, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(entry(recipe(), objects=settings))
    assert message in str(caught.value)
