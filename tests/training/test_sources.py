"""Runs whose objectives cover the records of some data sources only."""

import json
import random

import pytest
import torch
from safetensors.torch import load_file

from mmkd.commands.build_cache import build_cache
from mmkd.commands.plan import make_plan
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from tests.support.recipes import tiny_recipe

RATIONALES = ("because it is red", "because it is red and has four corners and is near the edge")


def record(number, question, answer):
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"{question[:3]}-{number}", "messages": said}


@pytest.fixture
def world(scenes_dir, tiny_model_dir, tmp_path):
    """Short answers, and a rationale for each of them in a source of its own."""
    random.seed(0)
    answers = [record(i, f"what {i % 7}?", random.choice(["red", "two"])) for i in range(8)]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    for name, said in zip(("short", "long"), RATIONALES, strict=True):
        why = [record(i, f"why {i % 7}?", said) for i in range(8)]
        (tmp_path / f"{name}.json").write_text(json.dumps(why))

    def make(name, objectives, why="short", *, steps=2, teacher=None, **stage):
        raw = tiny_recipe(
            scenes_dir,
            tiny_model_dir,
            tmp_path,
            name=name,
            stage={"objectives": objectives, "steps": steps, "batch": {"size": 16}, **stage},
            **({"teacher": teacher} if teacher else {}),
        )
        sources = [
            {"train": str(tmp_path / "answers.json"), "name": "answers"},
            {"train": str(tmp_path / f"{why}.json"), "name": "why"},
        ]
        raw["data"] = {"sources": sources}
        return raw

    make.folder = tmp_path
    return make


def trained(raw):
    folder = pipeline.run(load_recipe(raw)) / "01-mimic"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(folder / "student" / "model.safetensors")


def ce(source, weight=1.0):
    return {"kind": "ce", "name": source, "sources": [source], "weight": weight}


def test_a_rationale_of_weight_0_and_its_length_change_nothing(world):
    """The answers are trained on as if they were alone, with the same records in a step."""
    alone, weights = trained(world("alone", [ce("answers")]))
    for why in ("short", "long"):
        lines, same = trained(world(f"zero-{why}", [ce("answers"), ce("why", 0)], why))
        for mine, theirs in zip(lines, alone, strict=True):
            assert mine["answers"] == pytest.approx(theirs["answers"], rel=1e-6)
            assert mine["loss"] == pytest.approx(mine["answers"], rel=1e-6)
            assert mine["why"] > 0
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        for name, tensor in same.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=2e-5)


def test_a_step_without_an_objectives_records_has_no_value_of_it(world):
    """A mean over no token is not 0: the curve would fall to 0."""
    objectives = [ce("answers"), {"kind": "kl", "sources": ["why"]}]
    raw = world("one-by-one", objectives, steps=6, batch={"size": 1})
    raw["teacher"] = raw["student"]
    lines, _ = trained(raw)
    for line in lines:
        names = {"answers": {"answers"}, "why": {"kl", "kl/acceptance"}}
        seen = [source for source, count in line["sources"].items() if count]
        assert len(seen) == 1
        (source,) = seen
        present = names["answers"] | names["why"]
        assert present & set(line) == names[source] & set(line)
        assert line["loss"] == pytest.approx(line["answers" if source == "answers" else "kl"])
    assert len({tuple(line["sources"].values()) for line in lines}) == 2


def test_layout_and_packing_change_nothing(world):
    """Of objectives of one source, of a teacher and of its own source, and of validation."""
    kinds = [ce("answers"), ce("why"), {"kind": "kl", "sources": ["why"]}]
    held = {"validation": {"interval": 2}}
    found = []
    for number, batch in enumerate(({"size": 16}, {"size": 4, "accumulate": 4, "pack": 64})):
        raw = world(f"layout-{number}", kinds, **held, batch=batch)
        raw["teacher"] = raw["student"]
        raw["data"]["validation"] = 0.25
        found.append((trained(raw)[0], world.folder / f"layout-{number}"))
    whole, folder = found[0]
    for lines, other in found[1:]:
        for mine, theirs in zip(lines, whole, strict=True):
            for key in ("loss", "answers", "why", "kl"):
                assert mine[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
        pair = [
            json.loads((f / "01-mimic" / "validation.jsonl").read_text()) for f in (other, folder)
        ]
        for key in ("loss", "answers", "why", "kl", "answer_ce"):
            assert pair[0][key] == pytest.approx(pair[1][key], rel=1e-4, abs=1e-6), key


def test_a_cache_serves_an_objective_of_one_source(world):
    """The mean is that of a run on the source's records alone."""
    found = []
    for name, objective in (("both", {"kind": "kl", "sources": ["why"]}), ("one", {"kind": "kl"})):
        cache = {"folder": str(world.folder / f"cache-{name}"), "k": 400}
        raw = world(name, [objective], steps=1, teacher={"source": "cache", "cache": cache})
        raw["teacher"]["model"] = raw["student"]["model"]
        raw["student"] = {**raw["student"], "convert": [{"kind": "mamba", "layers": [1]}]}
        if name == "one":
            raw["data"]["sources"] = raw["data"]["sources"][1:]
            raw["stages"][0]["batch"] = {"size": 8}
        build_cache(load_recipe(raw))
        found.append(trained(raw)[0][0])
    assert found[0]["kl"] == pytest.approx(found[1]["kl"], rel=1e-5)
    assert found[0]["kl"] > 0.1
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-4)


def test_a_plan_counts_the_rows_of_the_sources(world):
    """The head runs on the tokens of the covered records."""
    both = make_plan(load_recipe(world("both", [{"kind": "ce"}], "long")))
    one = make_plan(load_recipe(world("one", [ce("answers")], "long")))
    heads = [p["members"]["student"]["stages"][0]["flops_per_step"]["student_head"]
             for p in (one, both)]  # fmt: skip
    assert 0 < heads[0] < heads[1] / 2
