"""Texts that are too similar to an earlier one."""

import itertools
import random
import sys
from fractions import Fraction
from functools import cache

import pytest
import torch
import yaml

from mmkd.errors import RecipeError
from mmkd.making.checks.words import words_of
from mmkd.making.make import make_answers
from mmkd.making.show import print_made
from mmkd.recipe import load_recipe
from tests.support import chat_server, warm

pytest.importorskip("rapidfuzz")

from rapidfuzz.distance import Indel

from mmkd.making.distinct import DistinctTexts, rouge_l

CPU = torch.device("cpu")
LIMIT = Fraction(7, 10)


def longest_common(one, other):
    """Length of the longest common subsequence, by its recurrence."""

    @cache
    def common(i, j):
        if i == 0 or j == 0:
            return 0
        if one[i - 1] == other[j - 1]:
            return common(i - 1, j - 1) + 1
        return max(common(i - 1, j), common(i, j - 1))

    return common(len(one), len(other))


def naive(one, other):
    """ROUGE-L F1, exactly: the harmonic mean of precision and recall of common words in order."""
    if not one and not other:
        return Fraction(1)
    common = longest_common(one, other)
    if not common:
        return Fraction(0)
    precision, recall = Fraction(common, len(one)), Fraction(common, len(other))
    return 2 * precision * recall / (precision + recall)


def lists(seed, count, most):
    chance = random.Random(seed)
    words = ["a", "red", "dog", "is", "it"]
    return [chance.choices(words, k=chance.randint(0, most)) for _ in range(count)]


def test_rouge_l_is_the_indel_similarity_of_words():
    for one, other in itertools.product(lists(0, 25, 7), repeat=2):
        assert rouge_l(one, other) == float(naive(one, other))
        assert Indel.normalized_similarity(one, other) == pytest.approx(rouge_l(one, other))
        assert rouge_l(one, other) == rouge_l(other, one)
        assert (rouge_l(one, other) == 1) == (one == other)


@pytest.mark.parametrize("most", [0.0, 0.3, 0.5, 0.7, 0.99])
def test_a_text_is_kept_unless_an_earlier_kept_one_is_too_similar(most):
    texts = [" ".join(words) for words in lists(1, 80, 12)]
    found, kept = DistinctTexts(most), []
    for text in texts:
        words = words_of(text)
        expected = all(rouge_l(words, words_of(other)) <= most for other in kept)
        assert found.add(text) == expected
        kept += [text] if expected else []
    assert 1 <= len(kept) < len(texts)


def test_the_limit_itself_is_not_too_similar():
    """14 of 20 words are 0.7 exactly, as in Lion."""
    one, other = "a b c d e f g h i j", "a b c d e f g 1 2 3"
    assert rouge_l(one.split(), other.split()) == 0.7
    for most, kept in ((0.7, True), (0.6999, False)):
        texts = DistinctTexts(most)
        assert texts.add(one)
        assert texts.add(other) == kept


SETTINGS = {
    "by": "big", "writes": "questions", "keep": "all", "checks": ["cut"],
    "sampling": {"n": 8, "temperature": 1.0, "max_new_tokens": 24},
}  # fmt: skip


@pytest.fixture
def server(monkeypatch):
    """A server whose model writes a few words, drawn by the request's seed."""
    plain = chat_server.ChatServer.completion

    def completion(self, body):
        found = plain(self, body)
        if body["temperature"] > 0:
            (words,) = lists(body["seed"], 1, 12)
            found["choices"][0]["message"]["content"] = " ".join(["What", *words])
        return found

    monkeypatch.setattr(chat_server.ChatServer, "completion", completion)
    with chat_server.running() as found:
        yield found


def test_similar_questions_about_an_image_are_left_out(recipe, rows, tmp_path, capsys, server):
    """Those that a greedy pass over the file without the limit leaves out, image by image, with
    any number of processes."""
    top = {"servers": {"big": {"server": server.url, "model": chat_server.MODEL}}}
    plain = recipe(**SETTINGS, top=top, out=str(tmp_path / "plain.jsonl"))
    every = make_answers(load_recipe(plain), "photos", CPU)
    assert every.similar is None
    kept, texts = [], {}
    for row in rows("plain.jsonl"):
        text = row["messages"][0]["content"][-1]["text"]
        earlier = texts.setdefault(row["images"][0], [])
        if all(naive(words_of(text), words_of(other)) <= LIMIT for other in earlier):
            earlier.append(text)
            kept.append(row)
    path = recipe(**SETTINGS, top=top, distinct=0.7)
    made = make_answers(load_recipe(path), "photos", CPU)
    assert [r["id"] for r in rows()] == [r["id"] for r in kept]
    assert (made.records, made.similar) == (len(kept), every.records - len(kept))
    assert 0 < made.similar < every.records
    print_made(made)
    assert f"  {made.similar} texts left out that are similar to an" in capsys.readouterr().out
    whole, out = (tmp_path / "made.jsonl").read_bytes(), tmp_path / "two.jsonl"
    words = ("data", "answers", path, f"make.photos.out={out}")
    command = warm.Command(*words, "--nproc", "2")
    text, _ = command.communicate(timeout=120)
    assert command.returncode == 0, text
    assert out.read_bytes() == whole


def test_answers_to_other_questions_are_not_compared(recipe, rows):
    """Two questions may have the same short answer."""
    settings = {"checks": [], "sampling": {"max_new_tokens": 6}, "keep": "all"}
    plain = make_answers(load_recipe(recipe(**settings)), "photos", CPU)
    made = make_answers(load_recipe(recipe(**settings, distinct=0)), "photos", CPU)
    assert (made.records, made.similar) == (plain.records, 0)
    settings["sampling"] |= {"n": 4, "temperature": 0.1}
    make_answers(load_recipe(recipe(**settings, distinct=0.9)), "photos", CPU)
    asked = {}
    for row in rows():
        question, answer = (m["content"][-1]["text"] for m in row["messages"])
        asked.setdefault((row["images"][0], question), []).append(words_of(answer))
    assert max(map(len, asked.values())) > 1
    for answers in asked.values():
        assert all(naive(*pair) <= Fraction(9, 10) for pair in itertools.combinations(answers, 2))


def test_without_the_package(recipe, monkeypatch):
    raw = yaml.safe_load(recipe(distinct=0.7).read_text())
    monkeypatch.setitem(sys.modules, "rapidfuzz", None)
    with pytest.raises(RecipeError, match=r"make.photos.distinct: texts are compared by .*Rapid"):
        make_answers(load_recipe(raw), "photos", CPU)
