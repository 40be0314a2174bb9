"""Folders of runs, as training and evaluation write them, for tests of the report."""

import io
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmkd.recipe import load_recipe, to_yaml

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
        put(stage / "student" / "config.json", json.dumps({"model_type": "llava"}))


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


def put_evaluation(folder: Path, label: str, found: dict[str, Any], lines: str) -> None:
    put(folder / "evaluation" / label / "results.json", json.dumps(found))
    put(folder / "evaluation" / label / "samples" / f"{TASK}.jsonl", lines)


def put_study(tmp_path: Path) -> Path:
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
