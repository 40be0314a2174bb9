"""Decoding after long contexts: what is timed is what generate does, and it reaches the report."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers.cache_utils import DynamicCache

from mmkd.errors import MmkdError, RecipeError
from mmkd.evaluation.decode import Decoder, measure_decode
from mmkd.recipe import load_recipe
from mmkd.report import tables as tables_module
from mmkd.report import write_report
from mmkd.report.decoding import decoding_sentence, decoding_table
from mmkd.report.rundata import read_run
from mmkd.report.tables import Value, format_value
from mmkd.runs import pipeline
from mmkd.runtime.files import read_json
from mmkd_models.cache import GrowingLayer, HybridCache
from tests.support import families
from tests.support.hybrids import student
from tests.support.recipes import tiny_recipe

CONTEXT, STEPS = 70, 3
KEYS_VALUES = 2 * 2 * 8 * 4  # bytes a token and layer: 2 kv heads of 8, float32
STATE = 4 * 8 * 8 * 4 + (4 + 2 + 2) * 8 * 3 * 4  # SSM, and convolution


@pytest.mark.parametrize(
    ("layers", "preallocated", "kind"),
    [
        (None, False, DynamicCache),
        (None, True, HybridCache),
        ([0, 1, 3], False, HybridCache),
        ([0, 1, 2, 3], False, HybridCache),
    ],
)
def test_a_filled_cache_decodes(layers, preallocated, kind):
    model = families.make("llava") if layers is None else student("llava", layers)
    decoder = Decoder(model, preallocated=preallocated)
    decoder.fill(CONTEXT)
    assert type(decoder.cache) is kind
    if kind is HybridCache:
        found = sum(isinstance(layer, GrowingLayer) for layer in decoder.cache.layers)
        assert found == 4 - len(layers or [])
    mamba = len(layers or [])
    for tokens in range(CONTEXT, CONTEXT + STEPS):
        assert decoder.tokens == tokens
        assert decoder.cache_bytes == mamba * STATE + (4 - mamba) * tokens * KEYS_VALUES
        seconds, logits = decoder.step()
        assert seconds > 0
        assert logits.shape == (1, 1, families.VOCABULARY)
        assert logits.isfinite().all()
    assert decoder.tokens == CONTEXT + STEPS


@pytest.mark.parametrize("name", families.FAMILIES)
def test_rows_of_all_families(name):
    linear = [0, 1, 3] if name == "gemma3" else [0, 1, 2, 3]  # Gemma3 keeps its sliding window
    teacher, grown = (
        measure_decode(families.make(name), [20, 200], steps=2, preallocated=p)
        for p in (False, True)
    )
    rows = measure_decode(student(name, linear), [20, 200], steps=2)
    assert [r.context for r in rows] == [20, 200]
    assert all(r.milliseconds > 0 for r in (*teacher, *grown, *rows))
    assert [r.cache_bytes for r in grown] == [r.cache_bytes for r in teacher]
    assert rows[0].cache_bytes == rows[1].cache_bytes
    assert teacher[1].cache_bytes > 4 * teacher[0].cache_bytes


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_steps_are_called_as_generate_calls(layers):
    model = families.make("llava") if layers is None else student("llava", layers)
    seen = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    decoder = Decoder(model)
    recorded = seen[-1]
    decoder.fill(CONTEXT)
    decoder.step()
    assert seen[-1].keys() == recorded.keys()
    assert seen[-1]["position_ids"].tolist() == [[CONTEXT]]
    assert seen[-1]["input_ids"].shape == recorded["input_ids"].shape == (1, 1)
    assert seen[-1].get("attention_mask") is None
    assert len({type(k["cache"]) for k in (seen[-1], recorded)}) == 1


def test_random_streams_stay_untouched():
    model = families.make("llava")
    before = torch.get_rng_state()
    measure_decode(model, [9], steps=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("contexts", "steps"), [([0], 3), ([5], 1)])
def test_what_cannot_be_timed(contexts, steps):
    with pytest.raises(MmkdError, match="cannot time"):
        measure_decode(families.make("llava"), contexts, steps=steps)


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(
        scenes_dir,
        tiny_model_dir,
        tmp_path,
        student={
            "model": str(tiny_model_dir),
            "convert": [{"kind": "mamba", "layers": [0, 1]}],
        },
        stage={"steps": 1},
        teacher={"model": str(tiny_model_dir)},
        evaluate={
            "tasks": ["scenes_pope"],
            "include": str(scenes_dir / "tasks"),
            "limit": 2,
            "decode": [20, 200],
        },
    )
    return load_recipe(raw)


def test_a_run_times_its_models_and_keeps_what_is_there(recipe):
    folder = pipeline.run(recipe)
    found = {
        n: read_json(folder / "evaluation" / n / "decode.json") for n in ("teacher", "student")
    }
    for decoding in found.values():
        assert [r["context"] for r in decoding["rows"]] == [20, 200]
        assert (decoding["device"], decoding["dtype"]) == ("cpu", "float32")
    teacher, linear = ([r["cache_bytes"] for r in d["rows"]] for d in found.values())
    assert teacher == [2 * 2 * 32 * 4 * n for n in (20, 200)]  # layers, k and v, width, bytes
    assert linear[0] == linear[1]

    def times(name):
        paths = sorted((folder / "evaluation").glob(f"*/{name}"))
        return [p.stat().st_mtime_ns for p in paths]

    scored, timed = times("results.json"), times("decode.json")
    pipeline.run(recipe)
    assert (times("results.json"), times("decode.json")) == (scored, timed)
    more = recipe.model_copy(deep=True)
    more.evaluate.decode = [30]
    pipeline.run(more)
    assert times("results.json") == scored
    assert all(new > old for new, old in zip(times("decode.json"), timed, strict=True))
    page = write_report(folder).read_text()
    assert "Decoding after 30 tokens" in page


def test_a_context_of_nothing_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"evaluate\.decode\.0"):
        load_recipe(recipe.model_dump(mode="json"), ["evaluate.decode=[0]"])


def put(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def row(context, milliseconds, cache_bytes):
    return {"context": context, "milliseconds": milliseconds, "cache_bytes": cache_bytes}


@pytest.fixture
def run_dir(recipe, tmp_path):
    """A run of two seeds whose members were timed, one of them at one context only."""
    folder = tmp_path / "study"
    raw = recipe.model_dump(mode="json")
    put(folder / "recipe.yaml", json.dumps({**raw, "seeds": [0, 1]}))
    timed = {
        "teacher": [row(1000, 4.0, 5_000), row(9000, 30.0, 45_000)],
        "student-seed0": [row(1000, 2.0, 700), row(9000, 2.0, 700)],
        "student-seed1": [row(1000, 4.0, 700)],
    }
    for label, rows in timed.items():
        put(folder / "evaluation" / label / "decode.json", {"request": {}, "rows": rows})
        if label != "teacher":
            put(folder / label / "training.yaml", json.dumps({**raw, "seed": int(label[-1])}))
    return folder


def test_the_table_has_times_speeds_and_caches(run_dir):
    table = decoding_table(read_run(run_dir))
    assert table.title == "Decoding"
    assert [c.group for c in table.columns] == ["1,000 tokens"] * 3 + ["9,000 tokens"] * 3
    teacher, found = table.rows
    assert (teacher.label, teacher.role) == ("teacher", "teacher")
    assert (found.label, found.role) == ("student", "student")
    said = [format_value(teacher.values[c.key], c.unit) for c in table.columns]
    assert said == ["4.000", "1.0×", "5.0 kB", "30.0", "1.0×", "45.0 kB"]
    # seeds 0 and 1 by hand: 2 and 4 ms, twice and once as fast
    assert found.values[("1000", "milliseconds")] == Value.of([2.0, 4.0])
    assert found.values[("1000", "speed")] == Value.of([2.0, 1.0])
    assert found.values[("9000", "speed")] == Value(15.0)
    assert format_value(found.values[("9000", "speed")], "times") == "15.0×"


def test_the_table_stands_on_the_page_and_in_the_terminal(run_dir, monkeypatch):
    console = Console(record=True, width=160)
    monkeypatch.setattr(tables_module, "console", console)
    page = write_report(run_dir).read_text()
    assert "15.0×" in page
    assert "DynamicCache" in page
    assert "15.0×" in console.export_text()


def test_a_sentence_says_what_decoding_costs_where_all_seeds_were_timed(run_dir):
    assert decoding_sentence(read_run(run_dir)) == (
        "After 1,000 tokens student decodes 1.5 times as fast as the teacher, "
        "and its cache takes 700 B instead of 5.0 kB."
    )
    (run_dir / "evaluation" / "teacher" / "decode.json").unlink()
    assert decoding_sentence(read_run(run_dir)) == ""


def test_the_page_says_how_the_structure_changed(run_dir):
    changes = ["decoder: Mamba-2 mixers (mimic) in layers [1], attention in [0]", "  new: A_log"]
    put(
        run_dir / "student-seed0" / "00-start" / "done.json",
        {"before": 2, "after": 1, "changes": changes},
    )
    put(
        run_dir / "student-seed1" / "00-start" / "done.json",
        {"before": 2, "after": 1, "changes": changes},
    )
    page = write_report(run_dir).read_text()
    assert "in layers [1], attention in [0]; new: A_log" in page


def test_without_a_teacher_there_is_no_speed(run_dir):
    (run_dir / "evaluation" / "teacher" / "decode.json").write_text('{"rows"')
    table = decoding_table(read_run(run_dir))
    assert [c.title for c in table.columns] == ["ms", "cache"] * 2
    assert "DynamicCache" not in write_report(run_dir).read_text()


def test_a_run_that_was_not_timed_has_no_table(run_dir):
    for path in run_dir.glob("evaluation/*/decode.json"):
        path.unlink()
    assert decoding_table(read_run(run_dir)) is None
    assert 'id="decoding"' not in write_report(run_dir).read_text()
