"""`mmkd data pairs`: a model's own answers, the better one chosen."""

import json
import os
import signal
import sys

import pyarrow.parquet as pq
import pytest

from mmkd.cli import main
from mmkd.commands import make_pairs
from mmkd.commands.make_pairs import Score
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import DataError
from mmkd.modeling.loading import load_processor
from mmkd.recipe import DataConfig, ModelConfig

TEACHER = "assets/scenes_teacher"


@pytest.fixture
def command(monkeypatch, scenes_dir, tmp_path):
    def call(*words, out="pairs.parquet", data="captions.parquet"):
        fixed = ["--data", str(scenes_dir / data), "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", ["mmkd", "data", "pairs", TEACHER, *fixed, *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code

    return call


def test_answers_are_scored_by_what_they_name():
    present = {"dog", "key"}
    answers = ["A dog and a key.", "A dog.", "A dog, a key and a cat.", "A cat and two cats.", ""]
    assert [Score.of(a, present) for a in answers] == [
        Score(0, 0), Score(0, 1), Score(1, 0), Score(1, 2), Score(0, 2)
    ]  # fmt: skip
    assert sorted(answers, key=lambda a: Score.of(a, present))[0] == answers[0]


def test_the_better_answer_is_chosen(command, scenes_dir, tmp_path, capsys):
    words = ("--limit", "48", "--temperature", "1.3", "--seed", "1")
    assert command(*words) == 0
    assert "pairs of 48 prompts" in capsys.readouterr().out
    path = tmp_path / "pairs.parquet"
    rows = pq.read_table(path).to_pylist()
    assert rows
    records = Records(DataConfig(train=str(scenes_dir / "captions.parquet")))
    truth = {records[i].id: {o.name for o in records[i].objects} for i in range(48)}
    for row in rows:
        present = truth[row["id"].removesuffix("-pair")]
        chosen, rejected = (Score.of(row[k][1]["value"], present) for k in ("chosen", "rejected"))
        assert chosen < rejected
        assert (row["chosen_invented"], row["rejected_invented"]) == (
            chosen.invented, rejected.invented
        )  # fmt: skip
    # they train like any other pairs, and a seed makes the same ones
    config = DataConfig(train=str(path))
    processor = load_processor(ModelConfig(model=TEACHER))
    batch = Encoder(Records(config), processor, config, pairs=True).encode([0])
    assert batch.targets.rejected.tolist() == [False, True]
    assert command(*words, out="again.parquet") == 0
    assert pq.read_table(tmp_path / "again.parquet").equals(pq.read_table(path))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "1"], "two or more answers"),
        (["--temperature", "0"], "two or more answers"),
    ],
)
def test_settings_that_make_no_pairs(command, tmp_path, capsys, words, message):
    assert command(*words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_records_without_ground_truth_and_files_that_are_there(command, tmp_path, capsys):
    assert command(data="preferences.parquet") == 2
    assert "the records say nothing of objects" in capsys.readouterr().err
    (tmp_path / "pairs.parquet").write_text("mine")
    assert command() == 2
    assert "it is there already" in capsys.readouterr().err
    assert (tmp_path / "pairs.parquet").read_text() == "mine"


def test_only_one_question_about_one_picture_is_asked(tmp_path):
    """A pair holds no more: a system message or a second image would be asked and not written."""
    asked = {"from": "human", "value": "<image>\nWhat?"}
    answer = {"from": "gpt", "value": "A dog."}
    system = {"from": "system", "value": "Be brief."}
    two = {"from": "human", "value": "<image><image>\nWhat?"}
    cases = {
        "good": ([asked, answer, two, answer], ["a.png"] * 3),
        "system": ([system, asked, answer], ["a.png"]),
        "two": ([two, answer], ["a.png"] * 2),
        "none": ([{**asked, "value": "What?"}, answer], []),
    }
    rows = [{"id": n, "images": i, "conversations": t} for n, (t, i) in cases.items()]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    records = Records(DataConfig(train=str(tmp_path / "a.json")))
    assert len(make_pairs._prompt(records, 0).messages) == 1
    for index, name in enumerate(cases):
        if name != "good":
            with pytest.raises(DataError, match=rf"\(id {name}\): .*one question about one image"):
                make_pairs._prompt(records, index)


def test_a_stopped_command_goes_on_with_the_same_answers(command, tmp_path, monkeypatch):
    words = ("--limit", "9", "--temperature", "1.3", "--batch-size", "3")
    assert command(*words, out="whole.parquet") == 0
    asked, answer = [], make_pairs.sample_answers

    def stopping(*given, seed, **settings):
        asked.append(seed)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(*given, seed=seed, **settings)

    monkeypatch.setattr(make_pairs, "sample_answers", stopping)
    assert command(*words) == 0  # as after any SIGTERM
    assert not (tmp_path / "pairs.parquet").exists()
    with (tmp_path / "pairs.parquet.answers.jsonl").open("a") as file:
        file.write('{"records": [1')  # a kill in the middle of a line
    assert command(*words) == 0
    assert asked == [0, 1, 2, 2]
    whole, stopped = (pq.read_table(tmp_path / f"{n}.parquet") for n in ("whole", "pairs"))
    assert stopped.equals(whole)
    assert {p.name for p in tmp_path.iterdir()} == {"whole.parquet", "pairs.parquet"}
