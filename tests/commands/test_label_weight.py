"""`mmkd label-weight`: the weights of two trained students, its output and its refusals."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmkd.cli import main
from mmkd.cli.scoring import find_trained
from mmkd.commands import label_weight as module
from mmkd.commands.calibrate import calibrate
from mmkd.commands.label_weight import label_weight, print_label_weight, recipe_lines
from mmkd.errors import CheckpointError, DataError, MmkdError, RecipeError
from mmkd.recipe import Recipe, load_recipe
from mmkd.runs import pipeline
from tests.support.pages import ROOT
from tests.support.recipes import tiny_recipe

TAUGHT = ROOT / "assets" / "scenes_teacher"


def raw_recipe(scenes: Path, student: Path, out: Path, **changes: Any) -> dict[str, Any]:
    raw = tiny_recipe(scenes, student, out, stage={"steps": 3}, **changes)
    raw["teacher"] = {"model": str(TAUGHT)}
    raw["data"]["validation"] = str(scenes / "validation.parquet")
    return raw


@pytest.fixture(scope="module")
def run(scenes_dir: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two students: `gold` was trained with ce, `taught` with kl."""
    out = tmp_path_factory.mktemp("runs")
    variants = {"taught": ["stages.0.objectives=[{kind: kl}]"]}
    raw = raw_recipe(scenes_dir, tiny_model_dir, out, label="gold", variants=variants)
    return pipeline.run(load_recipe(raw))


@pytest.fixture(scope="module")
def read(run: Path) -> Recipe:
    return load_recipe(run / "recipe.yaml")


@pytest.fixture(scope="module")
def students(run: Path) -> tuple[str, str]:
    return find_trained(run, "gold"), find_trained(run, "taught")


@pytest.fixture(scope="module")
def found(read: Recipe, students: tuple[str, str]) -> dict[str, Any]:
    return label_weight(read, *students, device="cpu")


def test_the_mixture_is_at_least_as_likely_as_each_student(
    found: dict[str, Any], students: tuple[str, str]
) -> None:
    assert (found["labels"], found["teacher"]) == students
    assert (found["records"], found["tokens"] > 16) == (16, True)
    assert 0 <= found["weight"] <= 1
    nll = found["nll"]
    assert nll["mixture"] <= min(nll["labels"], nll["teacher"])
    assert nll["labels"] != nll["teacher"]
    json.dumps(found)


def test_the_losses_are_those_of_calibrate(
    found: dict[str, Any], run: Path, students: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmkd.commands.calibrate.fit_temperature", lambda *_, **__: 1.0)
    for name, student in zip(("labels", "teacher"), students, strict=True):
        recipe = load_recipe(run / "recipe.yaml", [f"teacher.model={student}"])
        other = calibrate(recipe, device="cpu")
        assert found["nll"][name] == pytest.approx(other["before"]["nll"], rel=1e-6)
        assert found["tokens"] == other["tokens"]


@pytest.mark.parametrize("size", [1, 5])
def test_the_batch_size_changes_nothing(
    size: int, found: dict[str, Any], read: Recipe, students: tuple[str, str]
) -> None:
    other = label_weight(read, *students, batch_size=size, device="cpu")
    assert other["weight"] == pytest.approx(found["weight"], abs=1e-4)
    assert other["nll"] == pytest.approx(found["nll"], rel=1e-6)
    assert other["tokens"] == found["tokens"]


def test_a_good_student_has_nearly_all_of_the_weight(
    read: Recipe, students: tuple[str, str], scenes_dir: Path
) -> None:
    path = str(scenes_dir / "train.parquet")
    good = label_weight(read, str(TAUGHT), students[1], data=path, records=6, device="cpu")
    assert good["records"] == 6
    assert good["weight"] > 0.9
    bad = label_weight(read, students[1], str(TAUGHT), data=path, records=6, device="cpu")
    assert bad["weight"] == pytest.approx(1 - good["weight"], abs=1e-9)


def command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["mmkd", "label-weight", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_command_prints_json_or_lines_for_the_recipe(
    found: dict[str, Any],
    run: Path,
    students: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command([str(run), "gold", "taught", "--json", "--device", "cpu"], monkeypatch) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == found
    assert "students 16/16" in captured.err
    words = [str(run / "recipe.yaml"), *students, "--device", "cpu"]
    assert command(words, monkeypatch) == 0
    text = capsys.readouterr().out
    assert recipe_lines(found["weight"]) in text
    for loss in found["nll"].values():
        assert f"{loss:.4f}" in text
    assert all(len(line) <= 80 for line in text.splitlines() if "/" not in line)


def test_the_lines_are_objectives_with_weights_that_sum_to_1(read: Recipe) -> None:
    for weight, want in (
        (0.25, [("ce", 0.25), ("kl", 0.75)]),
        (1 / 3, [("ce", 0.3333), ("kl", 0.6667)]),
        (0.0001, [("ce", 0.0001), ("kl", 0.9999)]),
        (1.0, [("ce", 1.0)]),
        (0.0, [("kl", 1.0)]),
        (1 - 1e-6, [("ce", 1.0)]),
    ):
        lines = yaml.safe_load(recipe_lines(weight))
        raw = read.model_dump(mode="json", exclude_unset=True)
        raw["stages"][0] |= lines
        objectives = load_recipe(raw).stages[0].objectives
        assert [(o.kind, o.weight) for o in objectives] == want


@pytest.mark.parametrize(("weight", "warns"), [(0.0, True), (0.5, False), (1.0, True)])
def test_a_minimum_at_a_bound_is_a_warning(
    weight: float, warns: bool, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_label_weight({**found, "weight": weight})
    text = " ".join(capsys.readouterr().out.split())
    assert (f"Warning: The minimum is at {weight:.0f}" in text) is warns


def test_two_equal_students_have_no_best_weight(
    read: Recipe, students: tuple[str, str], tmp_path: Path
) -> None:
    shutil.copytree(students[0], tmp_path / "copy")
    with pytest.raises(DataError, match=r"copy: there is no best weight: .* the same probability"):
        label_weight(read, students[0], str(tmp_path / "copy"), device="cpu")


def test_students_with_different_tokenizers_or_processors_are_refused(
    read: Recipe, students: tuple[str, str], tmp_path: Path
) -> None:
    other = shutil.copytree(students[1], tmp_path / "other")
    settings = next(
        path
        for path in (other / "processor_config.json", other / "preprocessor_config.json")
        if path.exists()
    )
    text = settings.read_text()
    assert '"do_normalize": true' in text
    settings.write_text(text.replace('"do_normalize": true', '"do_normalize": false'))
    with pytest.raises(CheckpointError, match=r"other: the students have different processors"):
        label_weight(read, students[0], str(other), device="cpu")
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match=r"other: the students have different tokenizers"):
        label_weight(read, students[0], str(other), device="cpu")


def test_folders_without_a_student_and_recipes_without_records_are_refused(
    read: Recipe, run: Path, students: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}: the folder holds no processor"):
        label_weight(read, students[0], str(tmp_path), device="cpu")
    none = load_recipe(run / "recipe.yaml", ["data.validation=null"])
    with pytest.raises(RecipeError, match=r"no records are held out -- add .*--data FILE"):
        label_weight(none, *students)
    with pytest.raises(MmkdError, match=r"--images: .* -- add --data"):
        label_weight(read, *students, images="folder")


def test_records_without_answers_are_refused(
    read: Recipe, students: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.Encoder.encode

    def silent(self: Any, indices: list[int]) -> Any:
        batch = real(self, indices)
        batch.targets.response.zero_()
        return batch

    monkeypatch.setattr(module.Encoder, "encode", silent)
    with pytest.raises(DataError, match="no record has an answer -- give records with answers"):
        label_weight(read, *students, device="cpu")


def test_weights_that_are_damaged_are_refused(
    read: Recipe, students: tuple[str, str], tmp_path: Path
) -> None:
    other = shutil.copytree(students[1], tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"other: cannot load the model"):
        label_weight(read, students[0], str(other), device="cpu")


def test_logits_that_are_not_finite_are_refused(
    read: Recipe, students: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "token_logps", lambda hidden, *_, **__: hidden[:, 0] * torch.nan)
    with pytest.raises(DataError, match="the log-probabilities are not finite"):
        label_weight(read, *students, device="cpu")


def test_students_are_found_by_label_or_folder(
    run: Path, students: tuple[str, str], tmp_path: Path
) -> None:
    assert find_trained(None, students[0]) == students[0]
    assert find_trained(run, students[1]) == students[1]
    assert find_trained(None, "me/student") == "me/student"
    with pytest.raises(MmkdError, match="no student 'glod' -- did you mean 'gold'"):
        find_trained(run, "glod")
    with pytest.raises(MmkdError, match="has 2 finished students -- name the folder of one: gold"):
        find_trained(None, str(run))
    with pytest.raises(MmkdError, match=r"gold: no such folder, .* -- .* in place of the recipe"):
        find_trained(None, "gold")
