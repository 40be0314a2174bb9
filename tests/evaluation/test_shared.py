"""Evaluation on several processes: the same answers, scores and reports as on one."""

import json
import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from typer.testing import CliRunner

import mmkd
import mmkd.cli.models
from mmkd.cli.app import app
from mmkd.errors import CheckpointError
from mmkd.evaluation import models
from mmkd.modeling.conversation import load_answering
from mmkd.recipe import EvaluateConfig, ModelConfig, StudentConfig
from mmkd.runtime import consent, distributed
from mmkd.runtime.distributed import rank, unknown_to_libraries, world_size
from mmkd.runtime.processes import Processes
from tests.evaluation.test_refusals import own_scenes, spoil  # noqa: F401
from tests.support import interrupted, warm
from tests.support.ranks import on_ranks
from tests.support.recipes import tiny_recipe
from tests.support.slow import slow

TASKS = "scenes_pope,scenes_vqa,scenes_caption"


def evaluate(model: Path, tasks: Path, out: Path, processes: int, *more: object) -> Any:
    words = ["--tasks", TASKS, "--include", tasks, "--out", out, "--limit", 9, "--batch-size", 2]
    done = warm.run("eval", model, *words, "--calibration", *more, "--nproc", processes)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def written(out: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Results without times, and the bytes of all samples."""
    results = json.loads((out / "results.json").read_text())
    for key in ("seconds", "tokens_per_second"):
        del results[key]
    return results, {path.name: path.read_bytes() for path in (out / "samples").iterdir()}


@pytest.mark.parametrize("processes", [2, slow(3)])
def test_scores_and_answers_do_not_depend_on_the_number_of_processes(
    own_scenes: Path,  # noqa: F811
    tiny_model_dir: Path,
    tmp_path: Path,
    processes: int,
) -> None:
    """9 documents are 5 batches, so that the shares differ, and one document of the last process
    cannot be asked about."""
    spoil(own_scenes, "pope", {3: {"image": {"bytes": b"no image", "path": None}}})
    one, more = tmp_path / "one", tmp_path / "more"
    alone = evaluate(tiny_model_dir, own_scenes, one, 1)
    together = evaluate(tiny_model_dir, own_scenes, more, processes)
    assert alone.returncode == together.returncode == 0, together.stderr
    expected, found = written(one), written(more)
    assert found[0] == expected[0]
    assert found[1] == expected[1]
    assert written(one)[0]["unanswered"]["scenes_pope"]["documents"] == 1
    assert together.stdout.replace(str(more), str(one)) == alone.stdout
    assert not (more / "unfinished").exists()


def test_a_run_scores_its_models_on_all_processes(
    own_scenes: Path,  # noqa: F811
    scenes_dir: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    tasks = {"tasks": TASKS.split(","), "include": str(own_scenes), "limit": 9, "batch_size": 2}
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        teacher={"model": str(tiny_model_dir)},
        stage={"steps": 1, "batch": {"size": 2}},
        evaluate=tasks,
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    done = warm.run("run", tmp_path / "recipe.yaml", "--nproc", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("student: evaluation") == done.stdout.count("teacher: evaluation") == 1
    folder = tmp_path / "tiny"
    for label, model in (("teacher", tiny_model_dir), ("student", folder / "01-mimic" / "student")):
        assert evaluate(model, own_scenes, tmp_path / label, 1).returncode == 0
        found, expected = written(folder / "evaluation" / label), written(tmp_path / label)
        assert {**found[0], "model": ""} == {**expected[0], "model": ""}
        assert found[1] == expected[1]


def test_a_task_that_fails_fails_on_all_processes(
    own_scenes: Path,  # noqa: F811
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    (own_scenes.parent / "eval" / "vqa.parquet").write_bytes(b"no parquet")
    done = evaluate(tiny_model_dir, own_scenes, tmp_path, 2)
    assert done.returncode == 2
    assert done.stdout.count("scenes_vqa: failed") == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["scores"]) == ["scenes_pope", "scenes_caption"]
    assert list(results["failed"]) == ["scenes_vqa"]


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT), slow(signal.SIGKILL)])
def test_an_evaluation_that_was_stopped_continues(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path, number: int
) -> None:
    """All processes get the signal, in the middle of an answer or while one waits for the other;
    SIGKILL is for one process only."""
    words = ["--tasks", TASKS, "--include", scenes_dir / "tasks", "--out", tmp_path / "more"]
    words += ["--limit", 24, "--batch-size", 2]
    one = ["eval", tiny_model_dir, *words[:-5], tmp_path / "one", *words[-4:]]
    more = ["eval", tiny_model_dir, *words, "--nproc", 2]
    process = interrupted.start(*more)
    kept = tmp_path / "more" / "unfinished" / "task-scenes_pope.json"
    interrupted.wait_for(kept.exists, process)
    if number == signal.SIGKILL:
        interrupted.below(process)[-1].send_signal(number)
    else:
        os.killpg(process.pid, number)
    status, output = interrupted.finish(process)
    assert "Traceback" not in output
    assert "terminate called" not in output
    expected = {signal.SIGTERM: 0, signal.SIGINT: 130, signal.SIGKILL: 137}
    assert status == expected[number], output
    assert ("was killed" if number == signal.SIGKILL else "stopped") in output
    assert output.count("mmkd: stopped") == (number != signal.SIGKILL)
    assert kept.exists()
    assert not (tmp_path / "more" / "results.json").exists()
    again = warm.run(*more)
    assert again.returncode == 0, again.stderr
    assert "scenes_pope: already answered" in again.stdout
    assert warm.run(*one).returncode == 0
    assert written(tmp_path / "more") == written(tmp_path / "one")


def test_a_model_that_fails_on_one_process_fails_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process cannot load the first model; the first cannot write the second one's
    request."""
    monkeypatch.chdir(tmp_path)
    settings = EvaluateConfig(tasks=["scenes_pope"])

    def work(rank: int) -> Any:
        def score(model: str, **settings: Any) -> None:
            if (model, rank) == ("a", 1):
                raise CheckpointError("it is broken", where="a")

        def write(path: Path, content: Any) -> None:
            if path.parent.name == "b":
                raise CheckpointError("it cannot be written", where="b")

        processes = Processes(rank, 2)
        sources: dict[str, ModelConfig] = {name: StudentConfig(model=name) for name in "abc"}
        with (
            mock.patch("mmkd.evaluation.run.evaluate", score),
            mock.patch.object(models, "write_json", write),
            mock.patch.object(models, "_data_of", return_value=None),
            mock.patch.object(distributed, "leave"),
        ):
            models.evaluate_models(sources, settings, tmp_path / "out", "cpu", processes)

    [first, second] = on_ranks(work, 2, tmp_path)
    assert first.startswith("a: a: the evaluation of 2 of 3 models failed, the first: it is broken")
    assert second is None


def test_an_evaluation_within_training_waits_for_no_other_process(
    own_scenes: Path,  # noqa: F811
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of two processes that a launcher has started evaluates; the second does not."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    def work(rank: int) -> Any:
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        if rank == 1:
            return None
        model, processor = load_answering(str(tiny_model_dir))
        tasks, include = ["scenes_pope"], own_scenes
        return mmkd.evaluate(model, tasks, processor=processor, include=include, limit=4).scores

    [scores, _] = on_ranks(work, 2, tmp_path)
    assert list(scores) == ["scenes_pope"]


def test_unknown_models_and_tasks_are_one_line(scenes_dir: Path, tmp_path: Path) -> None:
    done = evaluate(tmp_path / "none", scenes_dir / "tasks", tmp_path / "out", 2)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_libraries_do_not_see_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with unknown_to_libraries():
        assert "RANK" not in os.environ
        assert "WORLD_SIZE" not in os.environ
        assert (rank(), world_size()) == (1, 4)
    assert (os.environ["RANK"], rank(), world_size()) == ("1", 1, 4)


def test_all_options_reach_the_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The code that the user trusts too, or each process would refuse it."""
    launched: list[Any] = []
    monkeypatch.setattr("mmkd.cli.launch.launch", lambda *given: launched.append(given) or 0)
    code = tmp_path / "model"
    code.mkdir()
    words = ["--tasks=pope", "--student=kd", "--device=cpu", "--revision=main", "--include=a"]
    words += ["--local=b", "--out=c", "--batch-size=3", "--limit=4", "--calibration"]
    trusted = ["--trust-remote-code", str(code)]
    try:
        CliRunner().invoke(app, ["eval", str(code), *words, *trusted, "--nproc", "2"])
        asked = consent.words()
    finally:
        consent.withdraw()
    ((passed, processes),) = launched
    assert processes == 2
    assert asked
    assert passed == ["eval", str(code), *words, *asked]
