"""The report on a written run directory: numbers, aggregation, escaping, self-containment."""

import io
import json
import math
import re
import struct
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image
from rich.console import Console

from mmkd.errors import CheckpointError
from mmkd.recipe import load_recipe, to_yaml
from mmkd.report import tables as tables_module
from mmkd.report import write_report
from mmkd.report.metrics import direction, headline_columns, vqa_kinds
from mmkd.report.page import every_metric, render
from mmkd.report.plots import smoothed
from mmkd.report.rundata import read_run
from mmkd.report.samples import choose_samples, data_file, disagree, join, pick
from mmkd.report.summary import describe_objectives, summary, warnings
from mmkd.report.tables import Value, build_tables, compact, format_value, print_scores

EVIL = '<script>alert("x")</script> & <img src=x onerror=alert(1)>'
KINDS = ("count", "colour")
# accuracies of [seed 0, seed 1, seed 2]
ACCURACY = {"kd": [0.70, 0.74, 0.72], "ce": [0.66, 0.71, 0.61]}
TASK = "scenes_vqa"


def scores(accuracy: float) -> dict[str, dict[str, float]]:
    vqa = {"vqa_accuracy": accuracy, "vqa_majority_accuracy": 0.4}
    for kind in KINDS:
        vqa |= {f"vqa_{kind}_accuracy": accuracy - 0.1, f"vqa_{kind}_majority_accuracy": 0.35}
    pope = {f"pope_{kind}_accuracy": accuracy for kind in ("random", "popular", "adversarial")}
    return {
        "scenes_pope": {**pope, "pope_yes_rate": 0.5},
        TASK: vqa,
        "scenes_caption": {"caption_chair_i": 1 - accuracy, "caption_bleu": accuracy / 2},
    }


def results(accuracy: float, parameters: int, limit: int | None = None) -> dict[str, Any]:
    return {
        "model": "somewhere/student",
        "scores": scores(accuracy),
        "parameters": parameters,
        "weights_bytes": 4 * parameters,
        "tokens_per_second": 1000 * accuracy,
        "seconds": 12.5,
        "lmms_eval": "0.7.3",
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 32,
        "limit": limit,
    }


def raw_recipe(tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "study",
        "label": "kd",
        "output_dir": str(tmp_path / "runs"),
        "teacher": {"model": "artifacts/teacher"},
        "student": {"model": "artifacts/start"},
        "data": {"train": "train.parquet"},
        "stages": [
            {
                "name": "mimic",
                "steps": 40,
                "objectives": [
                    {"kind": "ce", "weight": 0.5},
                    {"kind": "kl", "temperature": 2.0},
                ],
            }
        ],
        "variants": {"ce": ["stages.0.objectives=[{kind: ce}]"]},
        "seeds": [0, 1, 2],
        "evaluate": {"tasks": list(scores(1.0)), "include": str(tmp_path / "data" / "tasks")},
    }


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def metrics(steps: int, scale: float, names: list[str]) -> str:
    lines = []
    for step in range(1, steps + 1):
        loss = scale * (1 + 4 / step)
        line = {"step": step, "loss": loss, **dict.fromkeys(names, loss), "lr": 1e-3 / step}
        line |= {"grad_norm": 1.0, "tokens": 900.0, "supervised_tokens": 100.0, "skipped": 0.0}
        lines.append(json.dumps({**line, "seconds": 0.1}) + "\n")
    return "".join(lines)


def put_member(folder: Path, recipe: Any, steps: int, done: bool = True) -> None:
    stage = folder / "01-mimic"
    put(folder / "training.yaml", to_yaml(recipe))
    names = [o.name or o.kind for o in recipe.stages[0].objectives]
    put(stage / "metrics.jsonl", metrics(steps, 1.0 + recipe.seed / 10, names))
    if done:
        put(stage / "done.json", json.dumps({"steps": steps, "metrics": {}}))
        put_safetensors(stage / "student" / "model.safetensors")


def put_safetensors(path: Path) -> None:
    header = json.dumps(
        {"__metadata__": {"format": "pt"},
         "a": {"dtype": "F32", "shape": [10, 20], "data_offsets": [0, 800]},
         "b": {"dtype": "F32", "shape": [50], "data_offsets": [800, 1000]}}
    ).encode()  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 1000)


def samples(right: list[bool], evil: bool = False) -> str:
    lines = []
    for doc, correct in enumerate(right):
        said = "3" if correct else EVIL if evil else "4"
        line = {"doc_id": doc, "question": f"How many {doc}?", "answer": "3", "prediction": said}
        line |= {"correct": correct, "kind": KINDS[doc % 2], "id": f"test-{doc}"}
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(out, "PNG")
    return out.getvalue()


def put_data(folder: Path, documents: int) -> None:
    """The task's YAML, with an include and a tag as lmms-eval's have, and its parquet file."""
    base = "dataset_path: parquet\ntest_split: test\ndoc_to_visual: !function mmkd.x.images\n"
    put(folder / "tasks" / "_base", base)
    own = f"task: {TASK}\ninclude: _base\n"
    own += "dataset_kwargs: {data_files: {test: ../eval/vqa.parquet}}\n"
    put(folder / "tasks" / f"{TASK}.yaml", own)
    (folder / "eval").mkdir()
    rows = [{"id": f"test-{i}", "image": {"bytes": png(), "path": None}} for i in range(documents)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "eval" / "vqa.parquet")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished study: two students, three seeds, a teacher, scores and samples."""
    raw = raw_recipe(tmp_path)
    folder = tmp_path / "runs" / "study"
    put(folder / "recipe.yaml", to_yaml(load_recipe(raw)))
    provenance = {
        "command": ["mmkd", "run", "study.yaml"],
        "seeds": raw["seeds"],
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "git": {"commit": "abc123", "changed": True},
        "machine": {"processor": "A CPU", "cpus": 2, "threads": 1, "gpus": []},
        "data": {"train.parquet": "c6b0c417"},
    }
    put(folder / "provenance.json", json.dumps(provenance))
    put_data(tmp_path / "data", documents=20)
    right = [True] * 20
    put_evaluation(folder, "teacher", results(0.9, 4_000_000), samples(right))
    for seed in raw["seeds"]:
        for label, overrides in {"kd": [], **raw["variants"]}.items():
            own = raw | {"variants": {}, "seeds": [], "evaluate": None}
            recipe = load_recipe(own | {"seed": seed, "label": label}, overrides)
            name = f"{label}-seed{seed}"
            put_member(folder / name, recipe, steps=40)
            verdicts = [doc % (4 if label == "kd" else 3) != 0 for doc in range(20)]
            found = results(ACCURACY[label][seed], 1_000_000)
            put_evaluation(folder, name, found, samples(verdicts, evil=label == "ce"))
    return folder


def put_evaluation(folder: Path, label: str, found: dict[str, Any], lines: str) -> None:
    put(folder / "evaluation" / label / "results.json", json.dumps(found))
    put(folder / "evaluation" / label / "samples" / f"{TASK}.jsonl", lines)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    """A console that records, wide enough for models as rows."""
    console = Console(record=True, width=220, file=io.StringIO())
    monkeypatch.setattr(tables_module, "console", console)
    return console


class Loads(HTMLParser):
    """What a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        loading = ("src", "href", "xlink:href", "srcset", "data", "action", "poster")
        self.addresses += [v or "" for k, v in attrs if k in loading]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def loads(html: str) -> Loads:
    parser = Loads()
    parser.feed(html)
    return parser


# The page


def test_the_page_is_whole_in_itself(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    html = path.read_text(encoding="utf-8")
    found = loads(html)
    assert all(a.startswith(("data:", "#")) for a in found.addresses), found.addresses
    assert any(a.startswith("data:image/png;base64,") for a in found.addresses)
    assert not found.tags & {"script", "iframe", "object", "embed"}
    assert "@import" not in html
    assert not re.search(r"url\(\s*['\"]?(?!#)", html)
    assert not list(run_dir.glob("*.partial"))


def test_the_same_run_gives_the_same_page(run_dir: Path) -> None:
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir).read_bytes() == first


def test_text_from_the_run_cannot_become_markup(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "&lt;script&gt;alert" in html
    assert not loads(html).handlers
    assert EVIL in unescape(html)


def test_a_malicious_recipe_and_provenance_are_escaped(run_dir: Path) -> None:
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    recipe["name"] = EVIL
    recipe["teacher"]["model"] = EVIL
    put(run_dir / "recipe.yaml", yaml.safe_dump(recipe))
    put(run_dir / "provenance.json", json.dumps({"command": [EVIL], "data": {EVIL: EVIL}}))
    for path in run_dir.glob("*/01-mimic/metrics.jsonl"):
        path.write_text(path.read_text().replace('"ce"', json.dumps(EVIL)))
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "<script" not in html
    assert not loads(html).handlers


def test_the_page_says_what_the_files_say(run_dir: Path) -> None:
    html = unescape(write_report(run_dir).read_text(encoding="utf-8"))
    for text in (
        "A teacher of 4.0 M parameters (artifacts/teacher)",
        "2 students of 1.0 M parameters, 4.0 times smaller",
        "Each student trained for 40 steps (4.0 k supervised tokens)",
        "0.5 × ce + kl (T = 2)",
        "kd − ce",
        "majority answer 35.0",
        "c6b0c417",
        "abc123 with local changes",
        "lmms-eval 0.7.3",
        "temperature: 2.0",
    ):
        assert text in html, text
    assert html.count("<figure>") == 5  # ce, kl, total loss, learning rate, gradient norm
    assert "--series-0" in html


def test_answers_of_all_models_stand_under_one_question(run_dir: Path) -> None:
    (task,) = choose_samples(read_run(run_dir))
    assert (task.task, task.documents) == (TASK, 20)
    # the teacher is always right; kd is wrong on multiples of 4, ce on multiples of 3
    assert task.disagreements == len({d for d in range(20) if d % 4 == 0 or d % 3 == 0})
    assert all([a.label for a in s.answers] == ["teacher", "kd", "ce"] for s in task.shown)
    mixed = [len({a.correct for a in s.answers}) > 1 for s in task.shown]
    assert mixed == [True] * 5 + [False] * 4
    assert all(s.picture and s.picture.startswith("data:image/png") for s in task.shown)


# What is not there


def test_a_run_without_evaluation_still_has_its_page(run_dir: Path, terminal: Console) -> None:
    for path in sorted((run_dir / "evaluation").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    html = unescape(write_report(run_dir).read_text(encoding="utf-8"))
    assert "2 students of 250 parameters" in html
    assert "Evaluated so far: 0 of 6 students." in html
    assert "<svg" in html
    assert 'id="samples"' not in html
    assert "250" in terminal.export_text()


def test_an_unfinished_run_says_where_it_stands(run_dir: Path) -> None:
    member = run_dir / "ce-seed2" / "01-mimic"
    (member / "done.json").unlink()
    with (member / "metrics.jsonl").open("w") as file:
        file.write(metrics(7, 1.0, ["ce"]) + '{"step": 8, "lo')
    html = unescape(write_report(run_dir).read_text(encoding="utf-8"))
    assert "ce-seed2 is not finished: step 7 of 40 of stage mimic." in html


def test_students_that_wait_their_turn_are_counted(run_dir: Path) -> None:
    for path in sorted((run_dir / "ce-seed2").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (run_dir / "ce-seed2").rmdir()
    html = unescape(write_report(run_dir).read_text(encoding="utf-8"))
    assert "Not begun: 1 of 6 students." in html
    assert "Each student has trained for 40 steps so far" in html


def test_a_run_that_has_not_begun(tmp_path: Path, terminal: Console) -> None:
    put(tmp_path / "recipe.yaml", to_yaml(load_recipe(raw_recipe(tmp_path))))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Nothing was trained yet." in html
    assert "no scores yet" in terminal.export_text()


def test_one_student_without_teacher(tmp_path: Path) -> None:
    raw = raw_recipe(tmp_path) | {"variants": {}, "seeds": [], "teacher": None, "label": "student"}
    raw["stages"][0]["objectives"] = [{"kind": "ce"}]
    recipe = load_recipe(raw)
    folder = tmp_path / "runs" / "study"
    put(folder / "recipe.yaml", to_yaml(recipe))
    put_member(folder, recipe, steps=20)
    put_evaluation(folder, "student", results(0.5, 1_000_000, limit=9), samples([True, False]))
    html = unescape(write_report(folder).read_text(encoding="utf-8"))
    assert "One student of 1.0 M parameters. No teacher." in html
    assert "It trained for 20 steps" in html
    assert "Scores are of the first 9 questions per task only." in html
    assert "±" not in html.split("<tbody>")[1].split("</tbody>")[0]
    assert "total loss" not in html  # the one objective says it already


def test_a_student_that_is_called_teacher_is_a_student(tmp_path: Path) -> None:
    raw = raw_recipe(tmp_path) | {"variants": {}, "seeds": [], "teacher": None, "label": "teacher"}
    raw["stages"][0]["objectives"] = [{"kind": "ce"}]
    put(tmp_path / "recipe.yaml", to_yaml(load_recipe(raw)))
    put_member(tmp_path, load_recipe(raw), steps=5)
    put_evaluation(tmp_path, "teacher", results(0.5, 100), samples([True]))
    (row, _) = build_tables(read_run(tmp_path)).main.rows
    assert (row.label, row.role) == ("teacher", "student")


def test_samples_without_their_pictures(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "eval" / "vqa.parquet").write_bytes(b"broken")
    assert [s.picture for s in choose_samples(read_run(run_dir))[0].shown] == [None] * 9
    (tmp_path / "data" / "eval" / "vqa.parquet").unlink()
    write_report(run_dir)


def test_a_picture_of_another_document_is_not_shown(run_dir: Path, tmp_path: Path) -> None:
    rows = [{"id": f"other-{i}", "image": {"bytes": png(), "path": None}} for i in range(20)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "eval" / "vqa.parquet")
    assert not any(s.picture for s in choose_samples(read_run(run_dir))[0].shown)


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no recipe\.yaml"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


# Tables


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
    found = {"gqa": {"exact_match": 0.61234, "odd_[bold]thing": 1234.5}}
    print_scores({"a": found, "b": {"gqa": {"exact_match": 0.5, "odd_[bold]thing": 1.0}}})
    text = terminal.export_text()
    assert "0.612 *" in text
    assert "1,234" in text  # half to even
    assert "odd [bold]thing" in text
    assert len(headline_columns("gqa", list(found["gqa"]))) == 2


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


# Small parts


def test_documents_are_joined_only_where_the_question_is_the_same() -> None:
    a: list[dict[str, Any]] = [
        {"doc_id": 0, "question": "x"},
        {"doc_id": 1, "question": "y"},
        {"doc_id": 2},
    ]
    b: list[dict[str, Any]] = [{"doc_id": 1, "question": "z"}, {"doc_id": 0, "question": "x"}]
    assert list(join({"a": a[:2], "b": b})) == [0]
    assert join({}) == {}


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
    found = data_file(run, TASK)
    assert found is not None
    assert found.resolve() == tmp_path / "data" / "eval" / "vqa.parquet"
    assert data_file(run, "other") is None


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
    assert render(run, build_tables(run)).startswith("<!doctype html>")
