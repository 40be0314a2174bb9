"""`mmkd calibrate`: the fitted temperature, its files and its refusals."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mmkd.cli import main
from mmkd.commands.build_cache import build_cache
from mmkd.commands.calibrate import calibrate, choose_teacher, recipe_lines
from mmkd.errors import DataError, MmkdError, RecipeError
from mmkd.recipe import Recipe, load_recipe
from mmkd.runs import pipeline
from tests.support.pages import ROOT
from tests.support.recipes import tiny_recipe


def recipe(scenes: Path, teacher: Any, validation: Any = None, **changes: Any) -> dict[str, Any]:
    model = teacher["model"] if isinstance(teacher, dict) and "model" in teacher else "student"
    raw = tiny_recipe(scenes, model, Path("runs"), **changes)
    raw["teacher"] = teacher
    raw["data"]["validation"] = str(scenes / "validation.parquet") if validation is None else None
    return raw


@pytest.fixture(scope="module")
def taught() -> Path:
    """A small teacher whose answers are better than chance."""
    return ROOT / "assets" / "scenes_teacher"


@pytest.fixture(scope="module")
def found(scenes_dir: Path, taught: Path) -> dict[str, Any]:
    return calibrate(load_recipe(recipe(scenes_dir, {"model": str(taught)})), device="cpu")


def test_the_temperature_lowers_the_loss_and_keeps_the_accuracy(found: dict[str, Any]) -> None:
    assert found["records"] == 16
    assert found["tokens"] == found["before"]["count"] == found["after"]["count"] > 16
    assert found["after"]["nll"] < found["before"]["nll"]
    assert found["after"]["accuracy"] == found["before"]["accuracy"]
    json.dumps(found)


@pytest.mark.parametrize("factor", [3.0, 0.5])
def test_a_teacher_with_scaled_logits_gets_a_temperature_scaled_alike(
    factor: float,
    found: dict[str, Any],
    scenes_dir: Path,
    taught: Path,
    tmp_path: Path,
) -> None:
    for path in taught.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    (norm,) = [name for name in weights if name.endswith("language_model.model.norm.weight")]
    weights[norm] = factor * weights[norm].float()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    scaled = calibrate(load_recipe(recipe(scenes_dir, {"model": str(tmp_path)})), device="cpu")
    assert scaled["temperature"] == pytest.approx(factor * found["temperature"], rel=1e-5)
    assert scaled["after"]["ece"] < scaled["before"]["ece"]
    assert scaled["after"]["nll"] == pytest.approx(found["after"]["nll"], rel=1e-5)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_the_batch_size_changes_nothing(
    size: int, found: dict[str, Any], scenes_dir: Path, taught: Path
) -> None:
    read = load_recipe(recipe(scenes_dir, {"model": str(taught)}))
    other = calibrate(read, batch_size=size, device="cpu")
    assert other["temperature"] == pytest.approx(found["temperature"], rel=1e-6)
    assert other["tokens"] == found["tokens"]
    assert other["before"]["ece"] == pytest.approx(found["before"]["ece"], rel=1e-5, abs=1e-7)


def test_the_same_command_gives_the_same_temperature(
    found: dict[str, Any], scenes_dir: Path, taught: Path
) -> None:
    read = load_recipe(recipe(scenes_dir, {"model": str(taught)}))
    assert calibrate(read, device="cpu") == found


def test_records_of_a_file_and_part_of_them(scenes_dir: Path, taught: Path) -> None:
    read = load_recipe(recipe(scenes_dir, {"model": str(taught)}, "none"))
    path = str(scenes_dir / "train.parquet")
    assert calibrate(read, data=path, records=6, device="cpu")["records"] == 6
    share = load_recipe(
        recipe(scenes_dir, {"model": str(taught)}) | {
            "data": {"train": path, "validation": 0.25}
        }
    )  # fmt: skip
    assert calibrate(share, device="cpu")["records"] == 16


def command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["mmkd", "calibrate", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_prints_json_or_lines_for_the_recipe(
    found: dict[str, Any],
    scenes_dir: Path,
    taught: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = recipe(scenes_dir, {"model": str(taught)})
    folder = tmp_path / "run"
    folder.mkdir()
    for path in (tmp_path / "recipe.yaml", folder / "recipe.yaml"):
        path.write_text(yaml.safe_dump(raw))
    assert command([str(folder), "--json", "--device", "cpu"], monkeypatch) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == found
    assert "teacher 16/16" in captured.err
    assert command([str(tmp_path / "recipe.yaml"), "--device", "cpu"], monkeypatch) == 0
    text = capsys.readouterr().out
    assert f"teacher_temperature: {found['temperature']:.4g}" in text
    assert f"{found['before']['nll']:.4f}" in text
    assert f"{100 * found['after']['ece']:.2f}" in text
    assert all(len(line) <= 80 for line in text.splitlines() if "records of" not in line)


@pytest.mark.parametrize("source", ["live", "cache"])
def test_a_recipe_with_the_lines_trains(
    source: str, found: dict[str, Any], scenes_dir: Path, taught: Path, tmp_path: Path
) -> None:
    lines = yaml.safe_load(recipe_lines(found["temperature"], source))
    raw = recipe(scenes_dir, {"model": str(taught)}, "none", stage={"steps": 1, **lines})
    raw |= {"student": {"model": str(taught)}, "output_dir": str(tmp_path / "runs")}
    if source == "cache":
        raw["teacher"] |= {"source": "cache", "cache": {"folder": str(tmp_path / "cache")}}
        build_cache(load_recipe(raw))
    folder = pipeline.run(load_recipe(raw))
    line = json.loads((folder / "01-mimic" / "metrics.jsonl").read_text())
    assert line["kl"] > 0  # the same model, at another temperature


def test_a_teacher_without_knowledge_has_no_temperature(
    scenes_dir: Path, tiny_model_dir: Path
) -> None:
    with pytest.raises(DataError, match=r"at temperature 20, .*no better than chance: check"):
        calibrate(read(scenes_dir, {"model": str(tiny_model_dir)}), device="cpu")


def test_a_teacher_that_is_always_right_has_no_temperature(
    scenes_dir: Path, taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmkd.commands import calibrate as module

    real = module.collect

    def right(*words: Any) -> Any:
        rows = real(*words)
        hidden = torch.nn.functional.one_hot(rows.targets, rows.vocabulary).float()
        return module.Rows(
            hidden, rows.targets, (torch.eye(rows.vocabulary), None), rows.vocabulary, rows.records
        )

    monkeypatch.setattr(module, "collect", right)
    with pytest.raises(DataError, match=r"no temperature fits.*give more records"):
        calibrate(read(scenes_dir, {"model": str(taught)}), device="cpu")


def read(scenes: Path, teacher: Any, validation: Any = None) -> Recipe:
    return load_recipe(recipe(scenes, teacher, validation))


def test_recipes_without_logits_or_records_are_refused(scenes_dir: Path, tmp_path: Path) -> None:
    model = {"model": "somewhere"}
    cached = {"source": "cache", "cache": {"folder": str(tmp_path)}}
    for teacher, named, words in (
        (None, None, "teacher: there is no teacher to calibrate -- add 'model'"),
        ({"source": "self"}, None, "teacher.source: the teacher is the student before each stage"),
        (cached, None, "teacher: the teacher has no trained weights.* -- add 'model'"),
        (model, "other", "--teacher: no teacher 'other'"),
        ([model, {"name": "second", "model": "b"}], None, "choose one with --teacher: teacher, s"),
    ):
        with pytest.raises(RecipeError, match=words):
            choose_teacher(read(scenes_dir, teacher), named)
    several = read(scenes_dir, [model, {"name": "second", "model": "b"}])
    assert choose_teacher(several, "second").model == "b"
    assert choose_teacher(read(scenes_dir, {**cached, **model}), None).model == "somewhere"
    with pytest.raises(RecipeError, match=r"no records are held out -- add .*--data FILE"):
        calibrate(read(scenes_dir, model, "none"))
    with pytest.raises(MmkdError, match=r"--images: .* -- add --data"):
        calibrate(read(scenes_dir, model), images="folder")
