"""Rounds of a stage end when no question is left for one of them."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import yaml

from mmkd.commands.plan import check_recipe, make_plan
from mmkd.errors import MmkdError
from mmkd.recipe import load_recipe
from mmkd.report import write_report
from mmkd.runs import end_rounds, pipeline
from tests.making.test_rounds import STAGE, lines, student
from tests.support import chat_server, warm
from tests.support.chat_server import MODEL

RUN = Path("runs/ends")
GOOD = 6


class Rater:
    """A model on a server that rates the first answers high, and later ones low."""

    def __init__(self, server):
        self.url, self.lock, self.rated, self.good = server.url, threading.Lock(), 0, GOOD

    def rating(self):
        with self.lock:
            self.rated += 1
            return 9 if self.rated <= self.good else 1


@pytest.fixture
def rater(monkeypatch):
    with chat_server.running() as server:
        found, plain = Rater(server), server.completion

        def completion(body):
            answer = plain(body)
            if "Rate the answer" in json.dumps(body):
                answer["choices"][0]["message"]["content"] = f"Rating: {found.rating()}"
            return answer

        monkeypatch.setattr(server, "completion", completion)
        yield found


@pytest.fixture
def raw(rater, photos, scenes_dir, tiny_model_dir, tmp_path, monkeypatch):
    """The student answers, and the rater's checks leave nothing for the second of four rounds. A
    stage whose teacher is the student after them follows."""
    monkeypatch.chdir(tmp_path)
    own = {"by": "student", "pictures": str(photos), "prompts": ["What?", "Where?"],
           "sampling": {"temperature": 1.0, "max_new_tokens": 6}, "out": "own.jsonl",
           "checks": ["empty", {"kind": "judge", "by": "rater"}]}  # fmt: skip
    again = {"records": "made:own", "by": "teacher", "checks": [], "out": "again.jsonl",
             "sampling": {"max_new_tokens": 6}}  # fmt: skip
    return {
        "name": "ends",
        "teacher": {"model": str(tiny_model_dir)},
        "student": {"model": str(tiny_model_dir)},
        "servers": {"rater": {"server": rater.url, "model": MODEL}},
        "make": {"own": own, "again": again},
        "data": {"train": str(scenes_dir / "train.parquet")},
        "stages": [
            {**STAGE, "name": "align"},
            {**STAGE, "name": "tune", "rounds": 4, "data": {"train": "made:again"}},
            {**STAGE, "name": "last", "teacher": {"stage": "tune"}, "objectives": [{"kind": "kl"}]},
        ],
        "evaluate": {
            "every_stage": True,
            "samples": {"images": str(photos), "prompts": ["What?"], "count": 2,
                        "max_new_tokens": 4},
        },
    }  # fmt: skip


STAGES = [RUN / f"0{number + 1}-{name}" for number, name in
          enumerate(["align", "tune-1", "tune-2", "tune-3", "tune-4", "last"])]  # fmt: skip


def steps():
    return [json.loads((stage / "done.json").read_text())["steps"] for stage in STAGES]


def test_the_run_goes_on(raw, monkeypatch):
    said = []
    monkeypatch.setattr(end_rounds, "say", said.append)
    recipe = load_recipe(raw)
    pipeline.run(recipe)
    assert said == [
        "student: tune-2: no question of make.own is left; the rounds end, and the student is that "
        "of tune-1"
    ]
    assert steps() == [2, 2, 0, 0, 0, 2]
    first = student(STAGES[1])
    assert [student(stage) == first for stage in STAGES] == [False, True, True, True, True, False]
    counts = json.loads((STAGES[2] / "made.json").read_text())["entries"]
    assert [*counts] == ["own"]
    assert counts["own"]["kept"] == counts["own"]["records"] == 0 < counts["own"]["answers"]
    assert not (STAGES[2] / "made" / "own.jsonl").exists()
    assert (RUN / "evaluation" / "student" / "answers.json").is_file()
    page = write_report(RUN).read_text()
    assert "0 of 12 questions kept" in page
    assert "is not finished" not in page
    check_recipe(recipe)
    assert len(make_plan(recipe)["members"]["student"]["stages"]) == 6
    before = [(stage / "done.json").stat().st_mtime_ns for stage in STAGES]
    pipeline.run(recipe)
    assert before == [(stage / "done.json").stat().st_mtime_ns for stage in STAGES]


def test_what_may_follow(raw, rater):
    """A later round, and rounds that start again."""
    del raw["evaluate"], raw["stages"][2]
    pipeline.run(load_recipe(raw, ["stages.1.rounds=3"]))
    pipeline.run(load_recipe(raw))
    assert student(STAGES[4]) == student(STAGES[1])
    names = [s["name"] for s in yaml.safe_load((RUN / "training.yaml").read_text())["stages"]]
    assert names[-1] == "tune-4"
    rater.good = 100
    softer = load_recipe(raw, ["make.own.checks.1.least=2", "make.own.seed=3"])
    pipeline.run(softer, from_stage="tune-1")
    assert len({student(stage) for stage in STAGES[:5]}) == 5
    moved = RUN / "replaced" / "2"
    assert student(moved / STAGES[2].name) == student(moved / STAGES[1].name)
    assert len(lines(STAGES[2] / "made" / "own.jsonl")) > GOOD


class KilledError(Exception):
    pass


@pytest.mark.parametrize("number", [1, 2, 3])
def test_killed_while_the_rounds_end(raw, monkeypatch, number):
    """Nothing half-written is taken for a stage that has begun."""
    del raw["evaluate"]
    calls, plain = [], end_rounds.write_json

    def killed(path, content):
        calls.append(path)
        if len(calls) == number:
            raise KilledError
        plain(path, content)

    monkeypatch.setattr(end_rounds, "write_json", killed)
    with pytest.raises(KilledError):
        pipeline.run(load_recipe(raw))
    monkeypatch.setattr(end_rounds, "write_json", plain)
    pipeline.run(load_recipe(raw))
    assert steps() == [2, 2, 0, 0, 0, 2]
    assert student(STAGES[4]) == student(STAGES[1])


def test_the_first_round_and_stages_without_rounds(raw, rater):
    """They need data: the error says so, and the stages before are kept."""
    rater.good = 0
    for rounds in (1, 4):
        recipe = load_recipe(raw, [f"stages.1.rounds={rounds}", f"name=ends-{rounds}"])
        with pytest.raises(
            MmkdError, match=r"no answer becomes a record: of 12 answers, .* 'judge'"
        ):
            pipeline.run(recipe)
        assert student(Path(f"runs/ends-{rounds}/01-align"))


def test_two_processes(raw, tmp_path):
    del raw["evaluate"]
    for stage in raw["stages"]:
        stage["batch"] = {"size": 1, "total": 2}
    Path("recipe.yaml").write_text(yaml.safe_dump(raw))
    command = warm.Command("run", "recipe.yaml", "--nproc", 2, cwd=tmp_path)
    text, _ = command.communicate(timeout=200)
    assert command.returncode == 0, text
    assert text.count("tune-2: no question of make.own is left; the rounds end") == 1
    assert steps() == [2, 2, 0, 0, 0, 2]


def test_members_share_rounds_that_ended(raw):
    del raw["evaluate"]
    variants = {"slow": ["stages.2.optimizer.lr=1e-3"]}
    pipeline.run(load_recipe({**raw, "variants": variants}))
    one, other = (RUN / name / STAGES[4].name for name in ("student", "slow"))
    assert student(one) == student(other)
    shutil.rmtree(RUN / "slow" / STAGES[5].name)
    pipeline.run(load_recipe({**raw, "variants": variants}))
    assert student(RUN / "slow" / STAGES[5].name)
