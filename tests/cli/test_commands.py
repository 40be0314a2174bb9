"""The command line: help, the order of commands, scores of a run's students, what a run says at
its end."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from mmkd.cli import cache, calibrate, data, main, models, release, runs, setup  # noqa: F401
from mmkd.cli.app import ORDER, app
from mmkd.cli.scoring import find_models
from mmkd.errors import CheckpointError, EvaluationError, MmkdError
from mmkd.recipe import load_recipe
from mmkd.report import write_report
from mmkd.report.rundata import read_run
from mmkd.report.use import how_to_use
from mmkd.runs import pipeline
from mmkd.runtime.files import read_json
from tests.support.recipes import tiny_recipe

COMMANDS: list[tuple[str, ...]] = []


def _walk(command: Any, words: tuple[str, ...] = ()) -> None:
    COMMANDS.append(words)
    for name, inner in getattr(command, "commands", {}).items():
        _walk(inner, (*words, name))


_walk(get_command(app))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_h_is_help_on_every_command(words: tuple[str, ...]) -> None:
    short, long = (CliRunner().invoke(app, [*words, flag]) for flag in ("-h", "--help"))
    assert short.exit_code == 0
    assert "Usage:" in short.output
    assert short.output == long.output


def test_commands_are_listed_in_the_order_of_their_use() -> None:
    top: Any = get_command(app)
    assert tuple(top.list_commands(None)) == ORDER
    assert set(top.commands) == set(ORDER)
    shown = re.findall(r"^│ ([a-z][a-z-]*) ", CliRunner().invoke(app, ["-h"]).output, re.MULTILINE)
    assert tuple(shown) == ORDER


@pytest.fixture
def two_students(scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A finished run of two students, trained for one step and not evaluated."""
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path / "runs",
        stage={"steps": 1, "batch": {"size": 2}},
        variants={"other": ["stages.0.optimizer.lr=0.5"]},
    )
    folder = pipeline.run(load_recipe(raw))
    raw["evaluate"] = {"tasks": ["scenes_vqa"], "include": str(scenes_dir / "tasks")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder


def test_eval_scores_a_runs_students(
    two_students: Path,
    scenes_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    terminal: Any,
) -> None:
    asked = find_models(str(two_students), None, None, None, None)
    assert list(asked.models) == ["student", "other"]
    assert asked.tasks == ["scenes_vqa"]
    assert asked.include == scenes_dir / "tasks"
    (two_students / "other" / "01-mimic" / "done.json").unlink()
    assert list(find_models(str(two_students), None, ["pope"], None, None).models) == ["student"]
    with pytest.raises(CheckpointError, match="no student of this run is finished"):
        find_models(str(two_students), "other", ["pope"], None, None)
    with pytest.raises(MmkdError, match="no student 'othr' -- did you mean 'other'"):
        find_models(str(two_students), "othr", ["pope"], None, None)
    words = ["mmkd", "eval", str(two_students), "--limit", "2", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    found = read_json(tmp_path / "out" / "student" / "results.json")
    assert found["model"].endswith("student/01-mimic/student")
    assert set(found["scores"]) == {"scenes_vqa"}
    assert "student" in terminal.export_text()
    assert not (two_students / "evaluation").exists()


def test_one_student_that_fails_does_not_lose_the_other(
    two_students: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmkd.cli.scoring import score_models
    from mmkd.evaluation import run

    asked = find_models(str(two_students), None, None, None, None)

    def evaluate(model: str, **more: Any) -> Any:
        if "other" in model:
            raise EvaluationError("1 of 2 tasks failed", scores={"a": {"x": 0.25}})
        if "student" in model:
            raise CheckpointError("broken", where=model)

    monkeypatch.setattr(run, "evaluate", evaluate)
    scores, failed = score_models(asked, None)
    assert scores == {"other": {"a": {"x": 0.25}}}
    assert [e.what for e in failed] == ["broken", "1 of 2 tasks failed"]


def test_a_models_folder_is_no_run(tiny_model_dir: Path) -> None:
    asked = find_models(str(tiny_model_dir), None, ["pope"], None, None)
    assert (asked.models, asked.is_run) == ({"tiny": str(tiny_model_dir)}, False)
    with pytest.raises(MmkdError, match="no tasks to evaluate -- name some"):
        find_models(str(tiny_model_dir), None, None, None, None)
    with pytest.raises(MmkdError, match="not a run's folder, and --student"):
        find_models(str(tiny_model_dir), "kd", ["pope"], None, None)


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
def test_a_run_ends_with_lines_that_work(
    kind: str,
    scenes_dir: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are run as they are printed, in a process of their own without mmkd."""
    convert = [{"kind": "mamba", "layers": [1], "init": "inherit"}]
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path / "runs",
        stage={"steps": 1, "batch": {"size": 2}},
        student={
            "model": str(tiny_model_dir),
            "convert": convert if kind == "hybrid" else [],
        },
    )
    folder = pipeline.run(load_recipe(raw))
    capsys.readouterr()
    write_report(folder, use=True)
    printed = capsys.readouterr().out
    assert f"student student: {folder / '01-mimic' / 'student'}" in printed.splitlines()
    code = printed.partition("try it in Python:\n\n")[2]
    assert code
    assert ("trust_remote_code=True" in code) is (kind == "hybrid")
    row = pq.read_table(scenes_dir / "validation.parquet").slice(0, 1).to_pylist()[0]
    images = row.get("images") or [row["image"]]
    (tmp_path / "picture.png").write_bytes(images[0]["bytes"])
    lines = [line.removeprefix("    ") for line in code.splitlines()]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert torch.cuda.is_available() or "cuda" not in done.stderr.lower()


def test_eval_finds_a_recipes_relative_paths_from_another_folder(
    two_students: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = yaml.safe_load((two_students / "recipe.yaml").read_text())
    raw["evaluate"]["include"] = "tasks"
    (two_students / "recipe.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "tasks").mkdir()  # beside runs/, where the recipe was run
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(place)
        include = find_models(str(two_students), None, None, None, None).include
        assert include is not None
        assert include.resolve() == tmp_path / "tasks"


def test_an_earlier_student_does_not_stand_in_for_a_deleted_one(
    two_students: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two_students / "student"
    shutil.copytree(folder / "01-mimic" / "student", folder / "00-start" / "student")
    shutil.rmtree(folder / "01-mimic" / "student")
    asked = find_models(str(two_students), None, ["pope"], None, None)
    assert list(asked.models) == ["other"]
    assert "student: its last student is gone, left out" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="its students are gone -- bring"):
        find_models(str(two_students), "student", ["pope"], None, None)
    text = how_to_use(read_run(two_students))
    assert text is not None
    assert str(folder) not in text


def test_an_unfinished_run_names_no_student(two_students: Path) -> None:
    text = how_to_use(read_run(two_students))
    assert text is not None
    assert "student other: " in text
    for label in ("student", "other"):
        (two_students / label / "01-mimic" / "done.json").unlink()
    assert how_to_use(read_run(two_students)) is None
