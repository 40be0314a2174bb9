"""The report's tables: aggregation over seeds, differences, marks, and the parts under them."""

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from rich.console import Console

from mmkd.report import tables as tables_module
from mmkd.report.metrics import COST, direction, headline_columns, vqa_kinds
from mmkd.report.page import every_metric, render
from mmkd.report.plots import smoothed
from mmkd.report.rundata import read_run
from mmkd.report.samples import disagree, join, load_pictures, pick, picture_files
from mmkd.report.summary import describe_objectives, summary, warnings
from mmkd.report.tables import Value, build_tables, compact, format_value, print_scores
from tests.support.written_runs import (
    ACCURACY,
    KINDS,
    TASK,
    put_evaluation,
    results,
    samples,
    scores,
)


def test_seeds_become_mean_and_standard_deviation(run_dir: Path) -> None:
    main = build_tables(read_run(run_dir)).main
    assert [(r.label, r.role) for r in main.rows] == [
        ("teacher", "teacher"),
        ("kd", "student"),
        ("ce", "student"),
        ("majority answer", "baseline"),
    ]
    key = (TASK, "vqa_accuracy")
    kd, ce = (next(r for r in main.rows if r.label == x).values[key] for x in ("kd", "ce"))
    # by hand: kd 70, 74, 72: mean 72, deviations -2, 2, 0, variance (4 + 4 + 0) / 2 = 4
    assert (kd.mean, kd.std, kd.n) == (pytest.approx(0.72), pytest.approx(0.02), 3)
    # ce 66, 71, 61: mean 66, deviations 0, 5, -5, variance 50 / 2 = 25
    assert (ce.mean, ce.std, ce.n) == (pytest.approx(0.66), pytest.approx(0.05), 3)
    assert format_value(ce, "percent") == "66.0 ± 5.0"
    teacher = main.rows[0].values[key]
    assert (teacher.mean, teacher.std, teacher.n) == (0.9, None, 1)
    assert main.rows[-1].values == {key: Value(0.4)}


def test_differences_are_paired_by_seed(run_dir: Path) -> None:
    found = build_tables(read_run(run_dir)).differences
    assert found is not None
    (row,) = found.rows
    value = row.values[(TASK, "vqa_accuracy")]
    # by hand: 4, 3, 11: mean 6, deviations -2, -3, 5, variance (4 + 9 + 25) / 2 = 19
    assert (row.label, row.note) == ("kd − ce", "paired over 3 seeds")
    assert value.mean == pytest.approx(0.06)
    assert value.std == pytest.approx(math.sqrt(19) / 100)
    assert format_value(value, "percent", sign=True) == "+6.0 ± 4.4"


@pytest.mark.parametrize("change", [{"steps": 80}, {"batch": {"size": 99, "accumulate": 1}}])
def test_students_of_unequal_budget_are_not_subtracted(run_dir: Path, change: Any) -> None:
    for path in run_dir.glob("ce-*/training.yaml"):
        recipe = yaml.safe_load(path.read_text())
        recipe["stages"][0] |= change
        path.write_text(yaml.safe_dump(recipe))
    assert build_tables(read_run(run_dir)).differences is None


def test_students_of_another_structure_are_subtracted(run_dir: Path) -> None:
    for path in run_dir.glob("ce-*/training.yaml"):
        recipe = yaml.safe_load(path.read_text())
        recipe["student"]["convert"] = [{"kind": "mamba", "layers": [0]}]
        path.write_text(yaml.safe_dump(recipe))
    found = build_tables(read_run(run_dir)).differences
    assert found is not None
    assert [row.label for row in found.rows] == ["kd − ce"]


def test_students_scored_on_unequal_questions_are_not_subtracted(run_dir: Path) -> None:
    for seed, accuracy in enumerate(ACCURACY["ce"]):
        found = results(accuracy, 1_000_000, limit=10)
        put_evaluation(run_dir, f"ce-seed{seed}", found, "")
    run = read_run(run_dir)
    assert build_tables(run).differences is None
    assert "Scores are of the first 10 or all questions per task only." in warnings(run)


def test_the_best_student_of_each_column_is_marked(run_dir: Path) -> None:
    main = build_tables(read_run(run_dir)).main
    best = {c.name: main.best(c) for c in main.columns}
    assert best["VQA all kinds"] == {"kd"}  # not the teacher, which is better
    assert best["Caption CHAIR-i"] == {"kd"}  # the lower one
    assert best["POPE says yes"] == set()  # no direction
    assert best["Model parameters"] == set()  # equal


def test_kinds_without_questions_are_left_out(run_dir: Path) -> None:
    for label in ("teacher", *(f"{g}-seed{s}" for g in ACCURACY for s in range(3))):
        path = run_dir / "evaluation" / label / "results.json"
        found = json.loads(path.read_text())
        found["scores"][TASK] |= {"vqa_ocr_accuracy": 0.0, "vqa_ocr_majority_accuracy": 0.0}
        path.write_text(json.dumps(found))
    (kinds,) = build_tables(read_run(run_dir)).kinds
    assert [c.title for c in kinds.columns] == ["all kinds", "count", "colour"]


def test_print_scores_marks_the_best_student(terminal: Console) -> None:
    print_scores({"teacher": scores(0.9), "kd": scores(0.72), "ce": scores(0.66)})
    text = terminal.export_text()
    rows: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip():
            rows.setdefault(line.split()[0], line)  # the first table's
    assert "72.0 *" in rows["kd"]
    assert "28.0 *" in rows["kd"]  # CHAIR, lower is better
    assert "*" not in rows["ce"]
    assert "*" not in rows["teacher"]
    assert "majority" in rows


def test_print_scores_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(record=True, width=80, file=io.StringIO())
    monkeypatch.setattr(tables_module, "console", console)
    print_scores({"kd": scores(0.72), "ce": scores(0.66)})
    text = console.export_text()
    assert "…" not in text
    assert re.search(r"POPE adversarial %\s+72\.0 \*\s+66\.0", text)


def test_a_task_nobody_knows_shows_all_its_metrics(terminal: Console) -> None:
    found = {"okvqa": {"exact_match": 0.61234, "odd_[bold]thing": 1234.5}}
    print_scores({"a": found, "b": {"okvqa": {"exact_match": 0.5, "odd_[bold]thing": 1.0}}})
    text = terminal.export_text()
    assert "0.612 *" in text
    assert "1,234" in text  # half to even
    assert "odd [bold]thing" in text
    assert len(headline_columns("okvqa", list(found["okvqa"]))) == 2


def test_every_metric_is_on_the_page_somewhere(run_dir: Path) -> None:
    names = {c.key for c in every_metric(read_run(run_dir)).columns}
    assert names == {(task, m) for task, values in scores(1.0).items() for m in values}


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("pope_f1", "higher"),
        ("exact_match", "higher"),
        ("caption_chair_s", "lower"),
        ("caption_object_recall", "higher"),
        ("wer", "lower"),
        ("answer_length", None),
        ("certainty", None),
        ("pope_yes_rate", None),
        ("vqa_majority_accuracy", None),
    ],
)
def test_the_direction_of_a_metric(metric: str, better: str | None) -> None:
    assert direction(metric) == better


def test_vqa_kinds_are_read_off_the_metrics() -> None:
    assert vqa_kinds(list(scores(1.0)[TASK])) == list(KINDS)
    assert vqa_kinds(["pope_accuracy"]) == []


def test_documents_are_joined_only_where_the_question_is_the_same() -> None:
    a: list[dict[str, Any]] = [
        {"doc_id": 0, "question": "x"},
        {"doc_id": 1, "question": "y"},
        {"doc_id": 2},
    ]
    b: list[dict[str, Any]] = [{"doc_id": 1, "question": "z"}, {"doc_id": 0, "question": "x"}]
    assert list(join({"a": a[:2], "b": b})) == [0]
    assert join({}) == {}


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_of_many_students_is_printed_in_parts(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, width=width, file=io.StringIO())
    monkeypatch.setattr(tables_module, "console", console)
    names = [f"student-{n:02d}" for n in range(15)]
    print_scores({name: scores((50 + n) / 100) for n, name in enumerate(names)})
    text = console.export_text()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    assert len({text.count(name) for name in names}) == 1  # once in each table
    assert all(f"{50 + n}.0" in text for n in range(15))
    assert ("Scores, continued" in text) == (width < 200)


def test_disagreement_without_verdicts_is_about_words() -> None:
    said: list[dict[str, Any]] = [
        {"prediction": "a ", "correct": None},
        {"prediction": "a", "correct": None},
    ]
    assert not disagree(dict(zip("xy", said, strict=True)))
    said[1]["prediction"] = "b"
    assert disagree(dict(zip("xy", said, strict=True)))


@pytest.mark.parametrize(("hard", "expected"), [(0, 0), (2, 2), (10, 5), (18, 7)])
def test_half_of_the_samples_are_disputed_where_there_are_enough(hard: int, expected: int) -> None:
    joined = {d: {"m": {"question": str(d), "kind": "ab"[d % 2]}} for d in range(20)}
    chosen = pick(joined, range(hard), 9)
    assert len(set(chosen)) == 9
    assert sum(d < hard for d in chosen) == expected
    assert pick(joined, range(hard), 9) == chosen


def test_the_data_file_is_found_from_the_project_folder(run_dir: Path, tmp_path: Path) -> None:
    run = read_run(run_dir)
    run.recipe["evaluate"]["include"] = "data/tasks"  # relative to where `mmkd run` was called
    found = picture_files(run, TASK)
    assert [path.resolve() for path in found] == [tmp_path / "data" / "eval" / "vqa.parquet"]
    assert picture_files(run, "other") == []


def test_files_of_the_evaluation_come_first_and_rows_count_through_them(
    run_dir: Path, tmp_path: Path
) -> None:
    run = read_run(run_dir)
    shards = []
    for number, colours in enumerate([["red", "lime"], ["blue"]]):
        rows = [{"image": [{"bytes": picture(c), "path": None}]} for c in colours]
        shards.append(f"local/test-{number}.parquet")  # relative to where `mmkd run` was called
        (tmp_path / "local").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / shards[-1])
    next(iter(run.results.values()))["data"] = {TASK: shards}
    found = load_pictures(run, TASK, [{"m": {"doc_id": 0}}, {"m": {"doc_id": 2}}])
    assert {doc: colour_of(uri) for doc, uri in found.items()} == {0: (255, 0, 0), 2: (0, 0, 255)}


def picture(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


def colour_of(uri: str) -> Any:
    found = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return found.convert("RGB").getpixel((0, 0))


def test_smoothing_keeps_constants_and_starts_at_the_first_value() -> None:
    assert smoothed([3.0] * 5, 4) == pytest.approx([3.0] * 5)
    # window 3 keeps one half: (0.5 * 1 + 3) / 1.5
    assert smoothed([1.0, 3.0], 3) == pytest.approx([1.0, 3.5 / 1.5])


def test_objectives_in_words() -> None:
    objectives = [
        {"kind": "ce", "weight": 0.5},
        {"kind": "jsd", "beta": 0.2, "temperature": 1.0, "region": "vision", "weight": 1.0},
    ]
    assert describe_objectives(objectives) == "0.5 × ce + jsd (β = 0.2, region = vision)"


def test_numbers_as_text() -> None:
    sizes = [compact(n) for n in (12, 1234, 69_100, 282_368, 3_140_000, 7e9)]
    assert sizes == ["12", "1.2 k", "69.1 k", "282 k", "3.1 M", "7.0 G"]
    assert format_value(None, "percent") == "–"
    assert format_value(Value(1_000_000, 5.0, 3), "bytes") == "1.0 MB"


def test_the_summary_needs_no_scores(run_dir: Path) -> None:
    run = read_run(run_dir)
    run.results.clear()
    text = " ".join(summary(run, build_tables(run)))
    assert "2 students of 250 parameters. The teacher is artifacts/teacher." in text
    run.recipe["more_teachers"] = [{"model": "artifacts/ocr"}]
    (text, *_) = summary(run, build_tables(run))
    assert text.endswith("The teacher is artifacts/teacher. Further teachers: artifacts/ocr.")
    run.recipe.update(teacher={"source": "self"}, more_teachers=[])
    (text, *_) = summary(run, build_tables(run))
    assert text.endswith("The teacher is the student before each stage.")
    assert render(run, build_tables(run)).startswith("<!doctype html>")


def test_what_earlier_stages_made_stands_before_the_student(run_dir: Path) -> None:
    """Marked as no student: nothing is best among them, and nothing is compared to them."""
    for seed in (0, 1):
        put_evaluation(run_dir, f"kd-seed{seed}@align", results(0.95, 1_000_000), samples([True]))
    path = run_dir / "kd-seed0" / "training.yaml"
    recipe = yaml.safe_load(path.read_text())
    recipe["stages"] = [{**recipe["stages"][0], "name": "align"}, *recipe["stages"]]
    path.write_text(yaml.safe_dump(recipe))
    tables = build_tables(read_run(run_dir))
    labels = [(r.label, r.role, r.note) for r in tables.main.rows]
    assert labels[1] == ("kd after align", "stage", "2 seeds")
    assert [label for label, role, _ in labels if role == "student"] == ["kd", "ce"]
    accuracy = next(c for c in tables.main.columns if c.key == (TASK, "vqa_accuracy"))
    assert tables.main.best(accuracy) == {"kd"}
    assert tables.differences is not None
    assert not any("align" in r.label for r in tables.differences.rows)


def test_sizes_are_compared_at_one_dtype(run_dir: Path) -> None:
    """A teacher scored in bfloat16 beside students in float32."""
    key = (COST, "weights_bytes")

    def shown() -> tuple[str, dict[str, float]]:
        table = build_tables(read_run(run_dir)).main
        (column,) = (c for c in table.columns if c.key == key)
        sizes = {row.label: row.values[key].mean for row in table.rows if key in row.values}
        return column.name, sizes

    name, plain = shown()
    assert name == "Model weights"
    path = run_dir / "evaluation" / "teacher" / "results.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({**held, "weights_bytes": 2 * held["parameters"]}))
    name, equal = shown()
    assert name == "Model weights, 16 bit"
    assert equal["teacher"] == 2 * held["parameters"] == plain["teacher"] / 2
    assert {k: v / plain[k] for k, v in equal.items()} == dict.fromkeys(plain, 0.5)


def test_weights_that_a_folder_holds_twice_count_once(tmp_path: Path) -> None:
    """Mistral's folders have a consolidated.safetensors beside the shards."""
    from mmkd.evaluation.model_files import weight_files

    (tmp_path / "consolidated.safetensors").write_bytes(b"0" * 10)
    assert [f.name for f in weight_files(tmp_path)] == ["consolidated.safetensors"]
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    for name in set(shards.values()):
        (tmp_path / name).write_bytes(b"0" * 10)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert [f.name for f in weight_files(tmp_path)] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    (tmp_path / "model.safetensors").write_bytes(b"0" * 10)
    assert [f.name for f in weight_files(tmp_path)] == ["model.safetensors"]
