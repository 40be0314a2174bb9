"""Calibration of models on records and tasks: the same numbers as from the model's own logits."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmkd.data.schema import Record
from mmkd.evaluation.answer_options import options_of, truth_of
from mmkd.evaluation.calibration import Calibration, Exercise, place_of_difference
from mmkd.evaluation.run import evaluate
from mmkd.report.calibration import merged, print_reliability
from tests.support import benchmarks_in_small as small
from tests.support.benchmarks_in_small import put

QUESTIONS = [
    ("Is there a cat?", "yes", ("yes", "no"), "red"),
    ("How many objects are there in the picture, cats and dogs?", "3", (), None),
    ("Which one do you see? A. cat B. dog C. cup D. key", "C", ("A", "B", "C", "D"), "blue"),
    ("What do you see?", "A cat on a red card and a dog on a blue card.", (), "green"),
    ("Do you see a dog?", "no", ("yes", "no"), "white"),
]


def exercise(question: str, truth: str, options: tuple[str, ...], colour: str | None) -> Exercise:
    images = [] if colour is None else [Image.new("RGB", (64, 64), colour)]
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    record = Record(question, [{"role": "user", "content": content}], images)
    return Exercise(record, truth, options)


EXERCISES = [exercise(*question) for question in QUESTIONS]


def loaded(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


def facts_of(folder: Path, batches: list[list[Exercise]]) -> dict[str, Any]:
    model, processor = loaded(folder)
    found = Calibration(model, processor, "test")
    for batch in batches:
        found.add(found.predict(batch))
    return found.facts()


def twin(folder: Path, part: Exercise, colour: str | None) -> tuple[list[Any], Any]:
    """(confidence, correct, NLL) of each answer token, and the probabilities of the options, from
    the logits of transformers' own forward pass of one unpadded conversation."""
    model, processor = loaded(folder)
    tokenizer = processor.tokenizer
    question = next(p["text"] for p in part.record.messages[0]["content"] if p["type"] == "text")
    prompt = f"<|user|>{'<image>' if colour else ''}{question}<|assistant|>"
    whole = processor(
        text=f"{prompt}{part.truth}{tokenizer.eos_token}",
        images=part.record.images or None,
        return_tensors="pt",
    )
    asked = processor(text=prompt, images=part.record.images or None, return_tensors="pt")
    start = asked["input_ids"].shape[1]
    with torch.no_grad():
        log_p = model(**whole).logits[0].double().log_softmax(-1)  # [T, V]
    ids = whole["input_ids"][0]
    tokens = [
        (float(row.max().exp()), int(row.argmax()) == int(true), -float(row[true]))
        for row, true in zip(log_p[start - 1 : -1], ids[start:], strict=True)
    ]
    first = [tokenizer(option, add_special_tokens=False)["input_ids"][0] for option in part.options]
    return tokens, log_p[start - 1, first].softmax(0).tolist() if first else None


@pytest.mark.parametrize("number", range(len(EXERCISES)))
def test_predictions_are_those_of_the_models_own_logits(tiny_model_dir: Path, number: int) -> None:
    part = EXERCISES[number]
    tokens, options = twin(tiny_model_dir, part, QUESTIONS[number][3])
    facts = facts_of(tiny_model_dir, [[part]])
    assert facts["tokens"]["count"] == len(tokens) > 1  # the end of turn is a token too
    for name, values in zip(
        ("confidence", "accuracy", "nll"), zip(*tokens, strict=True), strict=True
    ):
        mean = sum(values) / len(values)
        assert facts["tokens"][name] == pytest.approx(mean, rel=1e-4, abs=1e-6), name
    if options is None:
        assert "answers" not in facts
        return
    true = part.options.index(part.truth)
    answers = facts["answers"]
    assert answers["count"] == 1
    assert answers["confidence"] == pytest.approx(max(options), rel=1e-4)
    assert answers["nll"] == pytest.approx(-math.log(options[true]), rel=1e-4)
    assert answers["accuracy"] == float(options.index(max(options)) == true)
    want = sum((p - (i == true)) ** 2 for i, p in enumerate(options))
    assert answers["brier"] == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_batches_and_padding_change_nothing(tiny_model_dir: Path, size: int) -> None:
    whole = facts_of(tiny_model_dir, [EXERCISES])
    parts = facts_of(
        tiny_model_dir, [EXERCISES[i : i + size] for i in range(0, len(EXERCISES), size)]
    )
    assert whole["answers"]["count"] == parts["answers"]["count"] == 3
    for kind in ("tokens", "answers"):
        for name, value in whole[kind].items():
            if name == "bins":
                assert [b["count"] for b in value] == [b["count"] for b in parts[kind][name]]
            else:
                assert value == pytest.approx(parts[kind][name], rel=1e-5, abs=1e-7), (kind, name)


def test_a_model_that_is_always_right_and_sure(tiny_model_dir: Path) -> None:
    """A head that gives nearly all mass to the true token: confidence 1, error 0."""
    model, processor = loaded(tiny_model_dir)
    yes = processor.tokenizer("yes", add_special_tokens=False)["input_ids"][0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
    with torch.no_grad():
        model.lm_head.bias[yes] = 50.0
    found = Calibration(model, processor, "test")
    part = exercise("Is there a cat?", "yes", ("yes", "no"), "red")
    found.add(found.predict([part] * 3))
    answers = found.facts()["answers"]
    assert (answers["ece"], answers["accuracy"]) == (pytest.approx(0, abs=1e-9), 1.0)
    wrong = Calibration(model, processor, "test")
    wrong.add(wrong.predict([exercise("Is there a cat?", "no", ("yes", "no"), "red")]))
    assert wrong.facts()["answers"]["ece"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "place"),
    [
        ([[1, 9], [2, 9]], 0),
        ([[5, 1, 9], [5, 2, 9]], 1),
        ([[1, 9], [1, 2, 9]], 1),
        ([[1, 9], [1, 2, 9], [3, 9]], None),  # two of them share the first token
        ([[1, 9], [1, 9]], None),
        ([[1], [1, 2]], None),
        ([[1]], None),
    ],
)
def test_options_are_compared_where_they_differ(
    options: list[list[int]], place: int | None
) -> None:
    assert place_of_difference(options) == place


@pytest.mark.parametrize(
    ("document", "truth", "options"),
    [
        ({"kind": "existence"}, "no", ("yes", "no")),
        ({}, "Yes", ("Yes", "No")),
        ({"kind": "choice"}, "D", ("A", "B", "C", "D")),
        ({"kind": "choice"}, "E", ()),
        ({"choices": ["a", "b", "c"]}, "C", ("A", "B", "C")),
        ({"choices": ["a", "b"]}, "C", ()),
        ({"A": "x", "B": "y", "C": "nan", "D": None}, "B", ("A", "B")),
        ({"choice_a": "x", "choice_b": "y", "choice_c": "z", "choice_d": "w"}, "A",
         ("A", "B", "C", "D")),
        ({"options": "['a', 'b']"}, "B", ("A", "B")),
        ({"options": "[]"}, "B", ()),
        ({"options": "[a, b"}, "B", ()),
        ({"options": "a or b"}, "B", ()),
        ({"kind": "count"}, "3", ()),
        ({}, "A", ()),
    ],
)  # fmt: skip
def test_options_come_from_the_document(
    document: dict[str, Any], truth: str, options: tuple[str, ...]
) -> None:
    assert options_of(document, truth) == options


@pytest.mark.parametrize(
    ("document", "target", "template", "truth"),
    [
        ({"answer": "red "}, "red ", "answer", "red"),
        ({"answers": ["go", "stop", "stop"]}, "answer", "answer", "stop"),
        ({"answers": [{"answer": "a"}, {"answer": "b"}, {"answer": "b"}]}, "a", None, "b"),
        ({"label": "x"}, "answer", "answer", ""),  # no such column
        ({"word": "answer"}, "answer", "word", "answer"),
        ({}, ["a", "b"], "answers", ""),
        ({}, 3, "answer", ""),
        ({"answers": None}, "", "answers", ""),
    ],
)
def test_the_true_answer_comes_from_the_document(
    document: dict[str, Any], target: Any, template: Any, truth: str
) -> None:
    assert truth_of(document, target, template) == truth


def run(folder: Path, scenes_dir: Path, out: Path | None, **settings: Any) -> Any:
    tasks = ["scenes_pope", "scenes_vqa", "scenes_caption"]
    return evaluate(
        folder, tasks=tasks, include_path=scenes_dir / "tasks", out=out, limit=9, **settings
    )


def test_an_evaluation_has_calibration_if_it_is_asked_for(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    plain = run(tiny_model_dir, scenes_dir, tmp_path / "plain")
    result = run(tiny_model_dir, scenes_dir, tmp_path / "out", calibration=True, batch_size=4)
    assert "calibration" not in json.loads((tmp_path / "plain" / "results.json").read_text())
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == result.summary()
    assert set(written["calibration"]) == set(plain.scores)
    for task, facts in written["calibration"].items():
        added = set(result.scores[task]) - set(plain.scores[task])
        assert added == {"token_ece"} | ({"answer_ece"} if "answers" in facts else set())
        assert {k: v for k, v in result.scores[task].items() if k not in added} == plain.scores[
            task
        ]
        assert result.scores[task]["token_ece"] == facts["tokens"]["ece"]
        assert "left_out" not in facts
        assert "without_options" not in facts
    assert written["calibration"]["scenes_pope"]["answers"]["count"] == 9
    assert 0 < written["calibration"]["scenes_vqa"]["answers"]["count"] < 9
    assert "answers" not in written["calibration"]["scenes_caption"]
    assert result.samples == plain.samples
    other = run(tiny_model_dir, scenes_dir, None, calibration=True, batch_size=32)
    for task, facts in other.calibration.items():
        assert facts["tokens"]["ece"] == pytest.approx(
            result.calibration[task]["tokens"]["ece"], rel=1e-4, abs=1e-6
        )


def test_a_model_without_a_plain_head_has_scores_but_no_calibration(
    scenes_dir: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = loaded(tiny_model_dir)
    model.config.text_config.logit_scale = 0.5
    result = run(model, scenes_dir, None, processor=processor, calibration=True)
    assert result.calibration == {}
    assert "answer_ece" not in result.scores["scenes_pope"]
    assert "no calibration: " in capsys.readouterr().out


def test_a_model_that_diverged_has_scores_but_no_calibration(
    scenes_dir: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = loaded(tiny_model_dir)
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    result = run(model, scenes_dir, None, processor=processor, calibration=True)
    assert result.calibration == {}
    assert "scenes_pope: no calibration (a prediction is not finite)" in capsys.readouterr().out


def test_bins_of_seeds_are_merged() -> None:
    def bins(*held: tuple[int, float, float]) -> list[dict[str, float]]:
        return [dict(zip(("count", "confidence", "accuracy"), b, strict=True)) for b in held]

    one, two = bins((0, 0, 0), (10, 0.8, 0.5)), bins((0, 0, 0), (30, 0.6, 0.9))
    assert merged([one, two]) == [(40, pytest.approx(0.65), pytest.approx(0.8))]
    assert merged([]) == []
    assert merged([one, bins((1, 1.0, 1.0))]) == [(10, 0.8, 0.5)]


def test_the_terminal_shows_bins_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from rich.console import Console

    from mmkd.report import calibration as module

    console = Console(record=True, width=80, file=io.StringIO())
    monkeypatch.setattr(module, "console", console)
    held = [{"count": 0, "confidence": 0.0, "accuracy": 0.0} for _ in range(10)]
    held[9] = {"count": 12_345, "confidence": 0.97, "accuracy": 0.5}
    facts = {"count": 12_345, "ece": 0.47, "bins": held}
    print_reliability("kd", {"scenes_pope": {"answers": facts, "tokens": facts}, "other": {}})
    text = console.export_text()
    assert "kd, scenes_pope: answers with options, ECE 47.0 %" in text
    assert re.search(r"90 to 100\s+12,345\s+97\.0\s+50\.0\s+█{10}·{9}│", text)
    assert "next tokens" not in text
    assert all(len(line) <= 80 for line in text.splitlines())


def put_benchmarks(local: Path) -> dict[str, int | None]:
    """Small files of benchmarks; the number of questions with known options of each task."""
    put([small.pope(i, a) for i, a in enumerate(("yes", "no"))], local / "POPE/test.parquet")
    put([small.mme("a", "OCR", a) for a in ("Yes", "No")], local / "MME/test.parquet")
    put(
        [small.scienceqa(["owl", "cod", "elk"], i) for i in range(3)],
        local / "ScienceQA/ScienceQA-IMG/test.parquet",
    )
    put([small.mmbench(i, a) for i, a in enumerate("ABC")], local / "MMBench/en/dev.parquet")
    put([small.seed(a, "image", a) for a in "ABD"], local / "SEED-Bench/test.parquet")
    put([small.ai2d(a) for a in "0123"], local / "ai2d/test.parquet")
    rows = [small.mmmu(i, "multiple-choice", "['a lake', 'a hill', 'a road']", a)
            for i, a in enumerate("BC")]  # fmt: skip
    put([*rows, small.mmmu(3, "open", "[]", "12")], local / "MMMU/validation.parquet")
    put([small.textvqa(1, ["stop"] * 10)], local / "textvqa/validation.parquet")
    counts = {"pope": 2, "mme": 2, "scienceqa_img": 3, "mmbench_en_dev_static": 3, "seedbench": 3}
    return counts | {"ai2d": 4, "mmmu_val": 2, "textvqa_val": None}


def test_options_of_benchmarks_are_known(
    tiny_model_dir: Path, tmp_path: Path, datasets_cache: None
) -> None:
    counts = put_benchmarks(tmp_path)
    result = evaluate(
        tiny_model_dir,
        tasks=list(counts),
        include_path=None,
        local=tmp_path,
        out=None,
        calibration=True,
    )
    found = {t: facts.get("answers", {}).get("count") for t, facts in result.calibration.items()}
    assert found == counts
    tokens = len(AutoProcessor.from_pretrained(tiny_model_dir).tokenizer("stop")["input_ids"])
    assert result.calibration["textvqa_val"]["tokens"]["count"] == tokens + 1
