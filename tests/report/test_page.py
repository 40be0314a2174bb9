"""The report page of a written run: whole in itself, escaped, honest about what is missing."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console

from mmkd.errors import CheckpointError
from mmkd.recipe import load_recipe, to_yaml
from mmkd.report import write_report
from mmkd.report.experts import load_tables
from mmkd.report.glossary import ABOUT, glossary, meaning
from mmkd.report.metrics import COSTS, HEADLINE
from mmkd.report.plots import stage_panels
from mmkd.report.rundata import read_run
from mmkd.report.samples import choose_samples
from mmkd.report.tables import build_tables
from tests.support.written_runs import (
    EVIL,
    TASK,
    metrics,
    png,
    put,
    put_evaluation,
    put_member,
    raw_recipe,
    results,
    samples,
)


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


# Held-out records


def put_validations(folder: Path, kept: int | None = None) -> None:
    """Of every member, four validations whose third is the best."""
    for path in folder.glob("*/01-mimic"):
        names = ["ce", "kl"] if path.parent.name.startswith("kd") else ["ce"]
        lines = []
        for step, value in ((10, 3.0), (20, 2.5), (30, 2.25), (40, 2.75)):
            line = {"step": step, "loss": value, **dict.fromkeys(names, value)}
            line |= {"answer_ce": value, "teacher_kl": value / 2, "records": 500.0}
            line |= {"supervised_tokens": 900.0, "skipped": 0.0, "seconds": 1.0}
            lines.append(json.dumps({**line, "best": step == 30}) + "\n")
        put(path / "validation.jsonl", "".join(lines))
        if kept is not None:
            own = yaml.safe_load((path.parent / "training.yaml").read_text())
            own["stages"][0]["validation"] |= {"keep": "best"}
            put(path.parent / "training.yaml", yaml.safe_dump(own))
            done = {"steps": 40, "metrics": {}, "validation": {"kept_step": kept}}
            put(path / "done.json", json.dumps(done))


def test_losses_on_held_out_records_are_drawn(run_dir: Path) -> None:
    before = write_report(run_dir).read_text(encoding="utf-8")
    put_validations(run_dir)
    html = unescape(write_report(run_dir).read_text(encoding="utf-8"))
    # the cross-entropy of answers is the objective's own, the divergence has a panel of its own
    assert html.count("<figure>") == before.count("<figure>") + 1
    assert "KL to the teacher on held-out answers" in html
    assert "dots: held-out records" in html
    assert "500 held-out records" in html
    assert "with a ring" not in html
    assert "All training together took 48" in html  # 6 students, 40 steps of 0.1 s, 4 s beside
    panels = {p.title: p.svg for s in stage_panels(read_run(run_dir)) for p in s.panels}
    assert panels["learning rate"].count("<use") < panels["ce"].count("<use")


def test_the_kept_step_is_ringed_and_named(run_dir: Path) -> None:
    put_validations(run_dir, kept=30)
    html = unescape(write_report(run_dir).read_text(encoding="utf-8"))
    assert "with a ring: the step that is kept" in html
    assert "kd-seed0 step 30 of 40 of mimic (loss 2.25)" in html


def test_teacher_hacking_is_drawn_and_named(run_dir: Path) -> None:
    """Answers get worse from step 20 on, while the student comes closer to its teacher."""
    lines = []
    for step in range(2, 41, 2):
        line = {"step": step, "loss": 1.0, "answer_ce": 1 + abs(step - 20) / 100}
        lines.append(json.dumps({**line, "teacher_kl": 1 / step, "records": 9.0}) + "\n")
    put(run_dir / "kd-seed0" / "01-mimic" / "validation.jsonl", "".join(lines))
    html = unescape(write_report(run_dir).read_text(encoding="utf-8"))
    assert "Teacher hacking, kd-seed0, stage mimic, by teacher_kl: the student comes closer" in html
    assert "(seen at step 26): stop at step 20." in html
    titles = {p.title: p.svg for s in stage_panels(read_run(run_dir)) for p in s.panels}
    ringed = titles["cross-entropy of held-out answers over the KL to the teacher"]
    put(run_dir / "kd-seed0" / "01-mimic" / "validation.jsonl", "".join(lines[:9]))
    titles = {p.title: p.svg for s in stage_panels(read_run(run_dir)) for p in s.panels}
    plain = titles["cross-entropy of held-out answers over the KL to the teacher"]
    assert [svg.count("fill-opacity: 0; stroke: var(--series") for svg in (ringed, plain)] == [1, 0]


def test_students_that_stopped_at_different_steps_are_not_compared(run_dir: Path) -> None:
    for path in run_dir.glob("*/training.yaml"):
        own = yaml.safe_load(path.read_text())
        own["stages"][0]["validation"] |= {"patience": 2}
        put(path, yaml.safe_dump(own))
    assert build_tables(read_run(run_dir)).differences is not None
    for seed in (0, 1, 2):
        put(run_dir / f"ce-seed{seed}" / "01-mimic" / "metrics.jsonl", metrics(25, 1.0, ["ce"]))
    assert build_tables(read_run(run_dir)).differences is None


# How it is read


def test_every_column_is_explained(run_dir: Path) -> None:
    run = read_run(run_dir)
    html = unescape(write_report(run_dir).read_text(encoding="utf-8"))
    for column in build_tables(run).main.columns:
        assert meaning(column) in html
        assert meaning(column).endswith(".")
    for known in (*(c for columns in HEADLINE.values() for c in columns), *COSTS):
        assert meaning(known)
    for said in ("says yes", "BLEU", "tokens/s"):
        assert any(said in names for names, _ in glossary(build_tables(run).main.columns))
    mine = {k for k in HEADLINE if k.startswith("scenes_")}
    assert {c.key for task in mine for c in HEADLINE[task]} <= ABOUT.keys()


def test_pictures_and_colours_are_printed(run_dir: Path) -> None:
    """A browser leaves out lazy images that were never on the screen, and all backgrounds."""
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "data:image/png" in html
    assert "lazy" not in html
    before, _, _ = html.partition("-webkit-print-color-adjust: exact")
    selectors = before[: before.rindex("{")].rpartition("*/")[2]
    coloured = {".dot", ".fill", ".track", ".mark", ".heat td", ".right", ".wrong"}
    assert coloured <= {part.strip() for part in selectors.split(",")}
    assert "@media print" in html


def test_wide_tables_can_be_scrolled_and_say_so(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    columns = len(build_tables(read_run(run_dir)).main.columns)
    assert f"{columns} columns, swipe" in html
    tables = re.findall(r"<div class=\"scroll\"[^>]*>", html)
    assert len(tables) >= 2
    assert all('tabindex="0"' in t and "aria-label" in t for t in tables if "heat" not in t)


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


def test_experts_are_drawn_by_layer(run_dir: Path) -> None:
    """Of the first seed's last ten steps; the busiest expert gets a curve."""
    path = run_dir / "kd-seed0" / "01-mimic" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        early = line["step"] <= 30
        line["expert_load"] = {"0": [1.0, 0.0] if early else [0.7, 0.3], "2": [0.5, 0.5]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (table,) = load_tables(read_run(run_dir))
    assert (table.label, table.stage) == ("kd-seed0", "mimic")
    shares = {layer: [round(s.percent) for s in found] for layer, found in table.rows}
    assert shares == {"0": [70, 30], "2": [50, 50]}
    assert [s.style for s in table.rows[0][1]] == ["--heat: 70%", "--heat: 30%"]
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "busiest expert, times an even share" in html
    assert html.count('class="heat"') == 1


def test_a_dense_run_has_no_experts_section(run_dir: Path) -> None:
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert 'id="experts"' not in html
    assert "busiest expert" not in html
