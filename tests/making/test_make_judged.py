"""Records whose answers several models on a server review."""

import hashlib
import json
import re
from dataclasses import replace
from typing import Literal

import pytest
import torch
import yaml

from mmkd.errors import RecipeError
from mmkd.making.checks import AnswerCheck, Ask, Verdict
from mmkd.making.make import make_answers
from mmkd.making.show import print_made
from mmkd.recipe import CHECKS, CheckConfig, add_check, load_recipe
from tests.support import chat_server, warm

CPU = torch.device("cpu")
SHOWN = re.compile(r"Answer(?: [AB])?: (.*?)\n\n", re.DOTALL)


def opinion(model, text):
    """What a model on the server thinks of an answer, from 1 to 10."""
    return 1 + hashlib.blake2b(f"{model} {text}".encode()).digest()[0] % 10


@pytest.fixture
def server(monkeypatch):
    """A server with models that answer, and that rate by `opinion`."""
    plain = chat_server.ChatServer.completion

    def completion(self, body):
        content = body["messages"][-1]["content"]
        answers = SHOWN.findall(content if isinstance(content, str) else content[-1]["text"])
        found = plain(self, body)
        if answers:
            said = ", ".join(str(opinion(body["model"], answer)) for answer in answers)
            found["choices"][0]["message"]["content"] = said
        return found

    monkeypatch.setattr(chat_server.ChatServer, "completion", completion)
    with chat_server.running(models=["b", "c", "d"]) as found:
        yield found


@pytest.fixture
def reviewed(recipe, server, tmp_path):
    """Writes a recipe with models on the server and returns its path."""

    def write(**changes):
        path = recipe(**changes)
        raw = yaml.safe_load(path.read_text())
        raw["servers"] = {n: {"server": server.url, "model": n} for n in server.models}
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


def by(server, *models):
    """Judges' calls of these models."""
    texts = [(c.body["model"], c.body["messages"][-1]["content"]) for c in server.calls]
    return [m for m, t in texts if m in models and SHOWN.search(str(t).replace("\\n", "\n"))]


GRA = {"kind": "judge", "by": ["b", "c"], "least": 4, "spread": 2, "adjudicator": "d"}


def test_reviewers_and_an_adjudicator(reviewed, rows, server, tmp_path):
    """Two makers, of which one reviews: each score is the mean over those that have not made the
    answer, or the adjudicator's, and processes change nothing."""
    path = reviewed(by=["teacher", "b"], checks=["empty", GRA], keep="all")
    made = make_answers(load_recipe(path), "photos", CPU)
    whole = (tmp_path / "made.jsonl").read_bytes()
    assert made.records == len(rows()) > 0
    decided = 0
    for row in rows():
        text, maker = row["messages"][-1]["content"][0]["text"], row["made"]["by"]
        given = [opinion(m, text) for m in ("b", "c") if m != maker]
        apart = max(given) - min(given) > 2
        decided += apart
        expected = opinion("d", text) if apart else sum(given) / len(given)
        assert row["made"]["score"] == [expected]
        assert expected >= 4
    assert {row["made"]["by"] for row in rows()} == {"teacher", "b"}
    assert decided > 0
    assert len(by(server, "d")) < len(by(server, "b")) < len(by(server, "c"))
    asked = len(server.calls)
    again = make_answers(load_recipe(path), "photos", CPU)
    assert (again.asked.answers, len(server.calls)) == (0, asked)
    out = tmp_path / "two.jsonl"
    words = ("data", "answers", path, f"make.photos.out={out}", "--nproc", "2")
    command = warm.Command(*words)
    text, _ = command.communicate(timeout=120)
    assert command.returncode == 0, text
    assert out.read_bytes() == whole
    assert len(server.calls) == 2 * asked  # the adjudicator is asked nothing twice


def own_records(rows, tmp_path, photos):
    """The made records with other ids, as records of another entry."""
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "id": f"q{i}"}) + "\n" for i, row in enumerate(rows))
    )
    return {"pictures": None, "prompts": None, "records": str(path), "images": str(photos)}


def test_hard_questions_remain(reviewed, rows, photos, server, tmp_path, capsys):
    """Those whose new answer is rated higher than the record's own one, by the margin."""
    make_answers(
        load_recipe(reviewed(checks=["empty"], sampling={"max_new_tokens": 6})), "photos", CPU
    )
    student = rows()
    own = own_records(student, tmp_path, photos)
    judge = {"kind": "judge", "by": ["c", "d"], "margin": 1}
    hard = tmp_path / "hard.jsonl"
    path = reviewed(**own, by="b", sampling={"max_new_tokens": 64}, checks=[judge], out=str(hard))
    made = make_answers(load_recipe(path), "photos", CPU)
    kept = {row["id"]: row for row in rows("hard.jsonl")}
    assert made.hard == {"judge": (len(kept), len(student))}
    assert 0 < len(kept) < len(student)
    for row in kept.values():
        new = row["messages"][-1]["content"][0]["text"]
        old = student[int(row["id"][1:])]["messages"][-1]["content"][0]["text"]
        means = [sum(opinion(m, text) for m in ("c", "d")) / 2 for text in (new, old)]
        assert row["made"]["score"] == [means[0] - means[1]]
        assert means[0] - means[1] >= 1
        assert row["made"]["own_answer"] == old
    print_made(made)
    share = f"  {len(kept)} of {len(student)} questions are hard by 'judge'"
    assert f"{share} ({len(kept) / len(student):.0%})" in capsys.readouterr().out
    # rationales explain the new answers
    why = {"prompt": "Why so?", "out": str(tmp_path / "why.jsonl")}
    server.calls.clear()
    asks = {**own, "by": "b", "sampling": {"max_new_tokens": 64}, "checks": [judge]}
    make_answers(load_recipe(reviewed(**asks, out=str(hard), why=why)), "photos", CPU)
    explained = [call.body["messages"][-2:] for call in server.calls]
    assert {said["content"] for said, _ in explained} == {
        row["messages"][-1]["content"][0]["text"] for row in kept.values()
    }
    assert [ask["content"] for _, ask in explained] == ["Why so?"] * len(kept)
    # a model whose answers are the records' own ones finds no question hard
    again = {**own, "by": "teacher", "sampling": {"max_new_tokens": 6}}
    same = reviewed(**again, checks=[judge], out=str(tmp_path / "same.jsonl"))
    with pytest.raises(Exception, match=r"refused by 'judge'"):
        make_answers(load_recipe(same), "photos", CPU)
    differs = {"kind": "reference", "differ": True}
    other = reviewed(**own, by="b", checks=[differs], out=str(tmp_path / "other.jsonl"))
    assert make_answers(load_recipe(other), "photos", CPU).hard["reference"][0] == len(student)


class _PoliteConfig(CheckConfig):
    kind: Literal["polite"]
    by: str
    asks: str

    @property
    def models(self):
        return (self.by,)


class _Polite(AnswerCheck):
    """Asks a model about each answer, once, and passes those whose reply has an even length."""

    config_class = _PoliteConfig

    def asks(self, question, answers, replies):
        content = [{"type": "text", "text": f"Is this polite? {answers[0].text}"}]
        asked = replace(question, messages=[{"role": "user", "content": content}], references=[])
        return [Ask(self.config.asks, asked)]

    def verdicts(self, question, answers, replies):
        (reply,) = replies
        return [Verdict(len(reply.text) % 2 == 0) for _ in answers]


def test_a_check_from_outside_asks_a_model(reviewed, rows, server, monkeypatch):
    monkeypatch.setattr(CHECKS, "_added", {})
    add_check(_Polite)
    sampling = {"max_new_tokens": 6}
    own = {"kind": "polite", "by": "b", "asks": "b"}
    made = make_answers(load_recipe(reviewed(checks=[own], sampling=sampling)), "photos", CPU)
    texts = [c.body["messages"][0]["content"] for c in server.calls]
    assert len(texts) == len(set(texts)) <= made.questions
    kept = {row["messages"][-1]["content"][0]["text"] for row in rows()}
    assert kept == {
        answer for answer in (t.removeprefix("Is this polite? ") for t in texts)
        if len(f"Is this polite? {answer} []") % 2 == 0
    }  # fmt: skip
    changed = reviewed(checks=[{**own, "asks": "d"}], sampling=sampling)
    with pytest.raises(RecipeError, match=r"'polite' asks 'd', which is not among the 'models'"):
        make_answers(load_recipe(changed), "photos", CPU)
    with pytest.raises(RecipeError, match="'teacher' would judge its own answers"):
        load_recipe(reviewed(checks=[{**own, "by": "teacher"}]))
