"""Prompts about records, and entries that write questions for others to answer."""

import json

import pytest
import torch
import yaml

from mmkd.data.records import Records
from mmkd.errors import MmkdError, RecipeError
from mmkd.making import local
from mmkd.making.make import make_answers
from mmkd.making.questions import open_questions
from mmkd.recipe import DataConfig, load_make, load_recipe
from mmkd.runs import preflight

CPU = torch.device("cpu")
QUESTIONS = {"writes": "questions", "checks": ["cut"], "sampling": {"max_new_tokens": 30}}


@pytest.fixture
def records(tmp_path, photos):
    """Settings of an entry that reads four records: braces, an image first or last, no answer."""

    def one(name, image, *texts):
        turns = [
            {"role": role, "content": [{"type": "text", "text": text}]}
            for role, text in zip(("user", "assistant") * 2, texts, strict=False)
        ]
        turns[0]["content"].insert(0 if name != "last" else 1, {"type": "image"})
        return {"id": name, "images": [image], "messages": turns}

    path = tmp_path / "records.jsonl"
    rows = [
        one("plain", "0.png", "How many?", "Two."),
        one("last", "1.png", "A {question}, {0}?", "{answer}", "And now?", "No."),
        one("bare", "2.png", "Which colour?"),
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"pictures": None, "records": str(path), "images": str(photos)}


def asked(records, prompts):
    settings = {k: v for k, v in records.items() if v is not None}
    return open_questions(load_make({**settings, "prompts": prompts, "out": "o.jsonl"}, "m"), "m")


def test_prompts_contain_the_records_question_and_answer(records):
    prompts = ["Like {question}?", "{{{question}}}: {answer} {{}}", "Plain."]
    found = asked(records, prompts)
    texts = [found.at(index).text for index in range(6)]
    assert texts == [
        "Like How many??", "{How many?}: Two. {}", "Plain.",
        "Like A {question}, {0}??", "{A {question}, {0}?}: {answer} {}", "Plain.",
    ]  # fmt: skip
    assert found.at(6).text == "Like Which colour??"
    with pytest.raises(MmkdError) as caught:
        found.at(7)
    assert str(caught.value).endswith(
        "record 2 (id bare): the record has no answer, which a prompt contains -- change the "
        "prompt, or drop the record"
    )
    for index in range(6):
        question = found.at(index)
        assert [p["type"] for p in question.messages[0]["content"]] == ["image", "text"]
        assert (question.own, question.reference) == (found.at(index // 3 * 3).own, None)
    assert found.at(0).own == "How many?"


def test_records_without_what_a_prompt_contains_are_left_out(recipe, records, rows):
    path = recipe(**records, prompts=["{answer} Why?"], checks=[], sampling={"max_new_tokens": 6})
    made = make_answers(load_recipe(path), "photos", CPU)
    assert {row["id"] for row in rows()} == {"plain", "last"}
    assert made.questions == 3
    assert "the record has no answer" in " ".join(made.asked.unreadable.values())


def test_a_prompt_for_objects_is_not_a_template(records):
    settings = {**records, "objects": {"prompt": "As JSON: {}", "ask": ["Where is the {name}?"]}}
    settings = {k: v for k, v in settings.items() if v is not None}
    from mmkd.making.questions import questions_for_lists

    found = questions_for_lists(load_make({**settings, "out": "o.jsonl"}, "m"), "m")
    assert found.at(0).text == "As JSON: {}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ["Like {question}"]}, "images of a folder have no {question} {answer}"),
        ({"prompts": ["{it}"]}, "has the placeholder {it} -- known: {question} {answer}; write"),
        ({"prompts": ['As {"a": 1}']}, "has a placeholder with ':' or '!' -- give its name alone"),
        ({"prompts": ["{question.text}"]}, "has the placeholder {question.text} -- known"),
        ({"prompts": ["{0}"]}, "has the placeholder {0}"),
        ({"prompts": ["}"]}, "has a single brace -- write it twice"),
        ({**QUESTIONS, "why": {"out": "w.jsonl"}}, "'why' is for answers, and this entry writes"),
        ({**QUESTIONS, "join": True}, "'join' is for answers"),
        (
            {**QUESTIONS, "keep": "pair", "checks": ["cut", "agrees"],
             "sampling": {"n": 2, "temperature": 1}},
            "'keep: pair' is for answers",
        ),
        (
            {**QUESTIONS, "checks": ["cut", "agrees"], "sampling": {"n": 2, "temperature": 1}},
            "'agrees' is for answers",
        ),
        ({**QUESTIONS, "objects": {"existence": {}}}, "'objects.existence' is for answers"),
        ({**QUESTIONS, "checks": ["empty"]}, "cut off cannot be answered -- add the check"),
        (
            {**QUESTIONS, "pictures": None, "prompts": None, "records": "a.json"},
            "is no question -- add 'prompts' that ask for one",
        ),
        (
            {"distinct": 0.7, "keep": "pair", "checks": ["agrees"]},
            "'distinct' compares single texts, and a pair has two -- leave it out",
        ),
        ({"distinct": 1}, "less than 1"),
        ({"writes": "question"}, "'answers' or 'questions'"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(recipe, changes, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe(**changes))
    assert message in str(caught.value)


def test_questions_are_answered_by_another_entry(recipe, rows, photos, tmp_path):
    """A model writes questions, another call answers them, and a stage may train on the answers.
    The first call's records are questions without an answer."""
    asks = {"prompts": ["Ask something about this image."], "out": str(tmp_path / "asked.jsonl")}
    path = recipe(**QUESTIONS, **asks)
    raw = yaml.safe_load(path.read_text())
    raw["make"]["answers"] = {
        "records": str(tmp_path / "asked.jsonl"), "images": str(photos), "by": "student",
        "checks": [], "sampling": {"max_new_tokens": 6}, "out": str(tmp_path / "made.jsonl"),
    }  # fmt: skip
    raw["data"] = {"train": "made:answers"}
    made = make_answers(load_recipe(raw), "photos", CPU)
    questions = rows("asked.jsonl")
    assert made.records == len(questions) > 0
    for row in questions:
        (turn,) = row["messages"]
        assert turn["role"] == "user"
        assert [part["type"] for part in turn["content"]] == ["image", "text"]
        assert row["made"]["by"] == "teacher"
    found = Records(DataConfig(train=str(tmp_path / "asked.jsonl"), images=str(photos)))
    assert not any(found[index].has_answer for index in range(len(found)))
    seen = []
    answer = local.LocalMaker.answer

    def noting(self, requests, sampling, keep):
        seen.extend(requests)
        answer(self, requests, sampling, keep)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local.LocalMaker, "answer", noting)
        answered = make_answers(load_recipe(raw), "answers", CPU)
    assert answered.questions == len(questions)
    assert [r.messages for r in seen] == [row["messages"] for row in questions]
    asked_again = {row["id"]: row["messages"] for row in questions}
    for row in rows():
        assert row["messages"][:1] == asked_again[row["id"]]
        assert row["messages"][1]["role"] == "assistant"
    preflight.check(load_recipe(raw))


def test_new_questions_differ_from_those_they_are_made_from(recipe, records, rows, monkeypatch):
    """A model that repeats what it reads writes nothing new."""
    pytest.importorskip("rapidfuzz")
    sample = local.LocalMaker._sample

    def repeat(self, batch, *more):
        from dataclasses import replace

        found = sample(self, batch, *more)
        texts = [r.messages[-1]["content"][-1]["text"] for r in batch]
        return [replace(a, text=t.removeprefix("New: "), finished=True) for a, t in
                zip(found, texts, strict=True)]  # fmt: skip

    monkeypatch.setattr(local.LocalMaker, "_sample", repeat)
    prompts = ["New: {question}", "New: Is it so, or is it {question}"]
    path = recipe(**{**records, **QUESTIONS, "prompts": prompts}, distinct=0.7)
    made = make_answers(load_recipe(path), "photos", CPU)
    assert made.similar == 3
    texts = [row["messages"][0]["content"][-1]["text"] for row in rows()]
    assert texts == ["Is it so, or is it How many?", "Is it so, or is it A {question}, {0}?",
                     "Is it so, or is it Which colour?"]  # fmt: skip
    with pytest.raises(MmkdError, match=r"of 3 answers, 3 too similar to an earlier text -- "):
        make_answers(load_recipe(recipe(**{**records, **QUESTIONS, "prompts": prompts[:1]},
                                        distinct=0.7)), "photos", CPU)  # fmt: skip


@pytest.mark.parametrize(
    ("data", "stage", "fits"),
    [
        ({"train": "made:photos"}, {}, False),
        ({"sources": [{"train": "made:photos"}]}, {}, False),
        ({"train": "other.jsonl", "validation": "made:photos"}, {}, False),
        ({"train": "made:photos"}, {"on_policy": {"lmbda": 1}}, True),
    ],
)
def test_a_stage_needs_answers(recipe, data, stage, fits):
    raw = yaml.safe_load(recipe(**QUESTIONS).read_text())
    raw["data"] = data
    raw["stages"][0] |= {"objectives": [{"kind": "kl"}], **stage}
    read = load_recipe(raw)
    if fits:
        preflight.check(read, data=False)
        return
    with pytest.raises(RecipeError) as caught:
        preflight.check(read, data=False)
    assert str(caught.value) == (
        "stage mimic: it reads made:photos, which has questions without answers -- add an entry of "
        "'make' with 'records: made:photos', and read its answers"
    )


def test_questions_about_records_that_contain_their_images(recipe, scenes_dir, tmp_path):
    path = recipe(
        pictures=None, records=str(scenes_dir / "captions.parquet"), limit=4, writes="questions",
        prompts=["Another one like: {question}", "Not answered by: {answer}"], checks=["cut"],
        keep="all", sampling={"n": 2, "temperature": 1.0, "max_new_tokens": 30},
        out=str(tmp_path / "made.parquet"),
    )  # fmt: skip
    made = make_answers(load_recipe(path), "photos", CPU)
    found = Records(DataConfig(train=str(made.out)))
    assert len(found) == made.records > 0
    records = [found[index] for index in range(len(found))]
    assert len({record.id for record in records}) == made.records
    assert not any(record.has_answer for record in records)
    assert all(len(record.images) == 1 for record in records)
