"""`mmkd data pairs`: a model's own answers, the better one chosen."""

import os
import signal
import sys

import pyarrow.parquet as pq
import pytest

from mmkd.cli import main
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.evaluation.scenes import mentioned_objects
from mmkd.making import local
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


def test_the_better_answer_is_chosen(command, scenes_dir, tmp_path, capsys):
    words = ("--limit", "48", "--temperature", "1.3", "--seed", "1")
    assert command(*words) == 0
    assert "records of 48 questions" in capsys.readouterr().out
    path = tmp_path / "pairs.parquet"
    rows = pq.read_table(path).to_pylist()
    assert rows
    records = Records(DataConfig(train=str(scenes_dir / "captions.parquet")))
    truth = {r.id: {o.name for o in r.objects} for r in (records[i] for i in range(len(records)))}
    known = set().union(*truth.values())

    def score(turns, present):
        """By the benchmark's own reading of captions, which the command does not use."""
        named = set(mentioned_objects(turns[0]["content"][0]["text"])) & known
        return (-len(named - present), -len(present - named))

    equal = 0
    for row in rows:
        present = truth[row["id"].removesuffix("-pair")]
        found = [score(row[key], present) for key in ("chosen", "rejected")]
        said = [tuple(made["score"]) for made in (row["made"], row["made"]["rejected"])]
        assert said[0] > said[1]
        equal += found == said
    assert equal >= 0.9 * len(rows)  # the benchmark knows fewer plurals, and no digits
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
        (["--samples", "1"], "a pair needs two answers or more"),
        (["--temperature", "0"], "4 answers at temperature 0 are all the same"),
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


def test_a_stopped_command_goes_on_with_the_same_answers(command, tmp_path, monkeypatch):
    words = ("--limit", "9", "--temperature", "1.3", "--batch-size", "3")
    assert command(*words, out="whole.parquet") == 0
    asked, answer = [], local.sample_answers

    def stopping(generate, encoder, prompts, *given, **settings):
        asked.append(len(prompts))
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(generate, encoder, prompts, *given, **settings)

    monkeypatch.setattr(local, "sample_answers", stopping)
    assert command(*words) == 0  # as after any SIGTERM
    assert not (tmp_path / "pairs.parquet").exists()
    with (tmp_path / "pairs.parquet.answers" / "answers-00000.jsonl").open("a") as file:
        file.write('{"key": "1')  # a kill in the middle of a line
    assert command(*words) == 0
    assert asked == [3] * 12  # four answers to nine prompts, none of them twice
    whole, stopped = (pq.read_table(tmp_path / f"{n}.parquet") for n in ("whole", "pairs"))
    assert stopped.equals(whole)
