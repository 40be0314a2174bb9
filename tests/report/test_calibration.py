"""Calibration in the report and on the card of a release."""

import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from mmkd.recipe import ReleaseConfig
from mmkd.release.card import make_card
from mmkd.release.source import choose
from mmkd.report import write_report
from mmkd.report.calibration import calibration_panels
from mmkd.report.metrics import headline_columns
from mmkd.report.rundata import read_run
from mmkd.report.tables import build_tables
from mmkd.runtime.run_folder import EvaluationFolder


def facts(ece: float) -> dict[str, Any]:
    held = [{"count": 0, "confidence": 0.0, "accuracy": 0.0} for _ in range(10)]
    held[6] = {"count": 30, "confidence": 0.65, "accuracy": 0.6}
    held[9] = {"count": 70, "confidence": 0.97, "accuracy": 0.97 - ece}
    return {"count": 100, "ece": ece, "bins": held}


def add(run_dir: Path, label: str, ece: float) -> None:
    path = EvaluationFolder(run_dir / "evaluation" / label).results
    found = json.loads(path.read_text())
    found["scores"]["scenes_pope"] |= {"answer_ece": ece, "token_ece": ece / 2}
    kinds = {"answers": facts(ece), "tokens": facts(ece / 2)}
    found["calibration"] = {"scenes_pope": kinds}
    path.write_text(json.dumps(found))


@pytest.fixture
def calibrated(run_dir: Path) -> Path:
    add(run_dir, "teacher", 0.02)
    for seed, ece in enumerate((0.08, 0.10, 0.12)):
        add(run_dir, f"kd-seed{seed}", ece)
        add(run_dir, f"ce-seed{seed}", 2 * ece)
    return run_dir


def test_the_table_has_the_error_of_teacher_and_students(calibrated: Path) -> None:
    main = build_tables(read_run(calibrated)).main
    (column,) = [c for c in main.columns if c.name == "POPE ECE"]
    assert (column.better, column.unit) == ("lower", "percent")
    values = {r.label: r.values[column.key].mean for r in main.rows if column.key in r.values}
    assert values == {
        "teacher": pytest.approx(0.02),
        "kd": pytest.approx(0.10),
        "ce": pytest.approx(0.20),
    }
    assert main.best(column) == {"kd"}


def test_the_page_draws_a_diagram_for_each_kind(calibrated: Path) -> None:
    panels = calibration_panels(read_run(calibrated))
    assert list(panels) == ["answers with options", "next tokens"]
    (panel,) = panels["answers with options"]
    assert panel.title == "scenes_pope"
    for colour in ("var(--teacher)", "var(--series-0)", "var(--series-1)"):
        assert colour in panel.svg
    assert "var(--series-2)" not in panel.svg
    assert "share of right predictions" in panel.svg
    html = unescape(write_report(calibrated).read_text(encoding="utf-8"))
    assert html.count("<figure>") == 5 + 2
    assert 'id="calibration"' in html
    assert "Expected calibration error of questions" in html


def test_runs_without_calibration_have_neither(run_dir: Path) -> None:
    assert calibration_panels(read_run(run_dir)) == {}
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert 'id="calibration"' not in html
    assert "ECE" not in html


def test_one_model_with_calibration_is_enough(run_dir: Path) -> None:
    add(run_dir, "kd-seed1", 0.1)
    (panel,) = calibration_panels(read_run(run_dir))["answers with options"]
    assert "var(--series-0)" in panel.svg
    assert "var(--teacher)" not in panel.svg


@pytest.mark.parametrize(
    "broken", [{"scenes_pope": {"answers": {"count": 3}}}, {"scenes_pope": 7}, [1]]
)
def test_damaged_calibration_is_left_out(
    broken: Any, calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = EvaluationFolder(calibrated / "evaluation" / "kd-seed0").results
    path.write_text(json.dumps(json.loads(path.read_text()) | {"calibration": broken}))
    assert "kd-seed0" not in read_run(calibrated).results
    assert "it is damaged and left out" in capsys.readouterr().out


def test_the_card_has_the_error(calibrated: Path) -> None:
    card = make_card(choose(calibrated, None, 1), ReleaseConfig(repo="me/student"))
    (line,) = [line for line in card.text.splitlines() if "POPE ECE" in line]
    shown = "| `scenes_pope` | POPE ECE % (lower is better) | 2.0 | 10.0 | 10.0 ± 2.0 | – |"
    assert line == shown
    found = {(r.dataset_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found["scenes_pope", "answer_ece"] == pytest.approx(0.1)


def test_other_tasks_get_a_column_too() -> None:
    columns = headline_columns("pope", ["pope_accuracy", "token_ece", "answer_ece"])
    assert [c.name for c in columns] == ["POPE accuracy", "POPE ECE"]
    (_, ece) = headline_columns("okvqa", ["exact_match", "answer_ece"])
    assert (ece.better, ece.unit) == ("lower", "percent")
