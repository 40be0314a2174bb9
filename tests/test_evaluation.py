"""Scores against hand-computed values, the lmms-eval adapter, and whole evaluations."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmkd.data.scenes.build import POPE_CATEGORIES
from mmkd.data.scenes.questions import ASKERS
from mmkd.errors import CheckpointError, DataError, MmkdError
from mmkd.evaluation import scenes
from mmkd.evaluation.adapter import (
    MmkdModel,
    answer_length,
    cut_at,
    resolve_device,
    resolve_dtype,
    split_images,
)
from mmkd.evaluation.isolation import isolated
from mmkd.evaluation.run import (
    _simple_evaluate,
    collect_scores,
    evaluate,
    find_tasks,
    require_lmms_eval,
)

TASKS = ["scenes_pope", "scenes_vqa", "scenes_vqa_attributes", "scenes_vqa_assets"]
TASKS += ["scenes_caption"]
POPE_NAMES = {
    f"{prefix}_{measure}"
    for prefix in ("pope", *(f"pope_{c}" for c in POPE_CATEGORIES))
    for measure in ("accuracy", "precision", "recall", "f1", "yes_rate")
}


def judged(process: Any, rows: list[tuple[dict[str, Any], str]]) -> dict[str, list[Any]]:
    """Verdicts per metric name, collected as lmms-eval does it."""
    collected: dict[str, list[Any]] = {}
    for i, (doc, prediction) in enumerate(rows):
        verdicts = process({"id": str(i), "question": "?", **doc}, [prediction])
        for name, verdict in verdicts.items():
            collected.setdefault(name, []).append(verdict)
    return collected


# The scores


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"),
        ("Yes, there is a cat.", "yes"),
        (" **No.**", "no"),
        ("NO\nyes", "no"),
        ("not at all", None),
        ("yesterday", None),
        ("there is: yes", None),
        ("", None),
    ],
)
def test_only_an_exact_first_word_is_yes_or_no(text: str, expected: str | None) -> None:
    assert scenes.yes_or_no(text) == expected


def test_pope_scores_by_hand() -> None:
    rows = [
        # random: 2 true positives, 1 false negative, 1 false positive, 1 true negative, 1 neither
        ({"answer": "yes", "category": "random"}, "Yes."),
        ({"answer": "yes", "category": "random"}, "yes, on the left"),
        ({"answer": "yes", "category": "random"}, "no"),
        ({"answer": "no", "category": "random"}, "yes"),
        ({"answer": "no", "category": "random"}, "no"),
        ({"answer": "no", "category": "random"}, "maybe"),
        # adversarial: always yes
        ({"answer": "yes", "category": "adversarial"}, "yes"),
        ({"answer": "no", "category": "adversarial"}, "yes"),
    ]
    found = judged(scenes.process_pope, rows)
    by_hand = {
        "pope_random_accuracy": (scenes.accuracy, 3 / 6),
        "pope_random_precision": (scenes.precision, 2 / 3),
        "pope_random_recall": (scenes.recall, 2 / 3),
        "pope_random_f1": (scenes.f1, 2 / 3),
        "pope_random_yes_rate": (scenes.yes_rate, 3 / 6),
        "pope_adversarial_accuracy": (scenes.accuracy, 1 / 2),
        "pope_adversarial_precision": (scenes.precision, 1 / 2),
        "pope_adversarial_recall": (scenes.recall, 1.0),
        "pope_adversarial_f1": (scenes.f1, 2 / 3),
        "pope_adversarial_yes_rate": (scenes.yes_rate, 1.0),
        "pope_accuracy": (scenes.accuracy, 4 / 8),
        "pope_precision": (scenes.precision, 3 / 5),
        "pope_recall": (scenes.recall, 3 / 4),
        "pope_f1": (scenes.f1, 2 * 0.6 * 0.75 / 1.35),
        "pope_yes_rate": (scenes.yes_rate, 5 / 8),
    }
    assert set(found) == set(by_hand)
    for name, (aggregate, expected) in by_hand.items():
        assert aggregate(found[name]) == pytest.approx(expected), name


def test_pope_scores_of_a_model_that_never_says_yes() -> None:
    found = judged(scenes.process_pope, [({"answer": "yes", "category": "random"}, "cat")])
    verdicts = found["pope_accuracy"]
    measures = [scenes.accuracy, scenes.precision, scenes.recall, scenes.f1, scenes.yes_rate]
    assert [m(verdicts) for m in measures] == [0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("kind", "answer", "prediction", "correct"),
    [
        ("count", "3", "3", True),
        ("count", "3", " 3. ", True),
        ("count", "3", "13", False),
        ("name", "tree", "Tree", True),
        ("name", "tree", "trees", False),
        ("choice", "D", "d", True),
        ("choice", "D", "D. grape", True),
        ("choice", "A", "A grape", False),
        ("choice", "D", "B. grape", False),
        ("choice", "A", "apple", False),
        ("relation", "yes", "Yes, it is.", True),
        ("existence", "no", "nope", False),
        ("ocr", "5843", "5843", True),
        ("ocr", "5843", "584", False),
    ],
)
def test_vqa_answers(kind: str, answer: str, prediction: str, correct: bool) -> None:
    verdicts = judged(scenes.process_vqa, [({"answer": answer, "kind": kind}, prediction)])
    assert verdicts["vqa_accuracy"][0]["correct"] is correct


def test_vqa_scores_and_majority_by_hand() -> None:
    rows = [
        ({"answer": "2", "kind": "count"}, "2"),
        ({"answer": "2", "kind": "count"}, "1"),
        ({"answer": "1", "kind": "count"}, "1"),
        ({"answer": "red", "kind": "colour"}, "blue"),
        ({"answer": "blue", "kind": "colour"}, "blue"),
    ]
    found = judged(scenes.process_vqa, rows)
    assert scenes.accuracy(found["vqa_count_accuracy"]) == pytest.approx(2 / 3)
    assert scenes.accuracy(found["vqa_colour_accuracy"]) == pytest.approx(1 / 2)
    assert scenes.accuracy(found["vqa_accuracy"]) == pytest.approx(3 / 5)
    assert scenes.majority_accuracy(found["vqa_count_majority_accuracy"]) == pytest.approx(2 / 3)
    assert scenes.majority_accuracy(found["vqa_colour_majority_accuracy"]) == pytest.approx(1 / 2)
    # one constant answer per kind, not one for all: (2 + 1) / 5
    assert scenes.majority_accuracy(found["vqa_majority_accuracy"]) == pytest.approx(3 / 5)


def test_mentioned_objects_are_whole_words_and_plurals() -> None:
    text = "Two cherries, a Fox and buses. A category of hats, the cat!"
    assert scenes.mentioned_objects(text) == ["cherry", "fox", "bus", "hat", "cat"]


def test_caption_scores_by_hand() -> None:
    rows = [
        # one of three mentions is invented, one of two objects is found
        ({"answer": "a", "objects": ["cat", "dog"]}, "A cat, a cat and a fox."),
        # nothing invented, everything found
        ({"answer": "b", "objects": ["bus"]}, "Buses."),
        # nothing mentioned
        ({"answer": "c", "objects": ["key"]}, "Hello."),
    ]
    verdicts = judged(scenes.process_caption, rows)["caption_chair_s"]
    assert scenes.chair_s(verdicts) == pytest.approx(1 / 3)
    assert scenes.chair_i(verdicts) == pytest.approx(1 / 4)
    assert scenes.object_recall(verdicts) == pytest.approx(2 / 4)
    assert [v["correct"] for v in verdicts] == [False, True, False]


def test_caption_scores_when_no_object_is_named() -> None:
    doc = {"answer": "The number 5.", "objects": []}
    rows = [(doc, "A number."), (doc, "The number 5."), (doc, "The number 6.")]
    verdicts = judged(scenes.process_caption, rows)["caption_chair_i"]
    assert scenes.chair_i(verdicts) == 0
    assert scenes.object_recall(verdicts) == 0
    assert [v["correct"] for v in verdicts] == [False, True, False]


def test_caption_bleu_by_hand() -> None:
    def score(prediction: str) -> float:
        doc = {"answer": "a cat on a red card .", "objects": ["cat"]}
        return scenes.bleu(judged(scenes.process_caption, [(doc, prediction)])["caption_bleu"])

    assert score("a cat on a red card .") == pytest.approx(1)
    # 1- to 4-gram precisions 6/7, 4/6, 2/5, 1/4; equal lengths, so no brevity penalty
    by_hand = (6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25
    assert score("a cat on a blue card .") == pytest.approx(by_hand)


# The adapter


def picture(colour: str) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


DOCS = [
    {"question": "Is there a cat?", "images": [picture("red")]},
    {"question": "How many objects are there in the picture, cats and dogs?", "images": []},
    {"question": "Read the number.", "images": [picture("blue")]},
    {"question": "What?", "images": [picture("green"), picture("white")]},
    {"question": "Which group does the object on the red card belong to?",
     "images": [picture("black")]},
    {"question": "What do you see?", "images": [picture("red")]},
]  # fmt: skip


def to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]


def requests(docs: list[dict[str, Any]], **settings: Any) -> list[Any]:
    kwargs = {"max_new_tokens": 12, "do_sample": False, **settings}
    return [
        SimpleNamespace(args=(doc["question"], to_messages, kwargs, i, "task", "test"))
        for i, doc in enumerate(docs)
    ]


def adapter_of(folder: Path, docs: list[dict[str, Any]], batch_size: int = 1) -> MmkdModel:
    adapter = MmkdModel(pretrained=str(folder), batch_size=batch_size, device="cpu")
    adapter.task_dict = {"task": {"test": docs}}
    return adapter


def reference(folder: Path, doc: dict[str, Any], tokens: int = 12) -> tuple[str, int, int]:
    """Text, prompt tokens and new tokens of one question, unbatched, by transformers alone."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    text = f"<|user|>{'<image>' * len(doc['images'])}{doc['question']}<|assistant|>"
    inputs = processor(text=text, images=doc["images"] or None, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=[1, 2])
    new = out[0, length:]
    return processor.tokenizer.decode(new, skip_special_tokens=True), length, len(new)


def test_batched_answers_equal_single_ones_in_order(tiny_model_dir: Path) -> None:
    adapter = adapter_of(tiny_model_dir, DOCS, batch_size=4)
    found = adapter.generate_until(requests(DOCS))
    expected = [reference(tiny_model_dir, doc) for doc in DOCS]
    assert len({text for text, _, _ in expected}) == len(DOCS)  # or order could not be seen
    assert [r.text for r in found] == [text for text, _, _ in expected]
    counts = [(r.token_counts.input_tokens, r.token_counts.output_tokens) for r in found]
    assert counts == [(prompt, new) for _, prompt, new in expected]
    assert adapter.generated_tokens == sum(new for _, _, new in expected)
    assert adapter.tokens_per_second == pytest.approx(
        adapter.generated_tokens / adapter.generation_seconds
    )


def test_until_and_max_new_tokens(tiny_model_dir: Path) -> None:
    adapter = adapter_of(tiny_model_dir, DOCS)
    full = adapter.generate_until(requests(DOCS))
    short = adapter.generate_until(requests(DOCS, max_new_tokens=3))
    assert max(r.token_counts.output_tokens for r in short) == 3
    stop = full[0].text[3:5]
    cut = adapter.generate_until(requests(DOCS, until=[stop]))
    assert [r.text for r in cut] == [r.text.split(stop)[0] for r in full]
    assert cut[0].text != full[0].text


def test_sampling_is_used_only_when_asked(tiny_model_dir: Path) -> None:
    adapter = adapter_of(tiny_model_dir, DOCS)

    def answers(seed: int, **settings: Any) -> list[str]:
        torch.manual_seed(seed)
        return [r.text for r in adapter.generate_until(requests(DOCS, **settings))]

    hot = {"do_sample": True, "temperature": 5.0}
    assert answers(0, **hot) == answers(0, **hot) != answers(1, **hot)
    greedy = {"do_sample": True, "temperature": 0.0}
    assert answers(0, **greedy) == answers(1, **greedy) == answers(0)


def test_stop_strings_and_answer_length() -> None:
    assert cut_at("yes\nno\n\n", ["\n\n", "\n", ""]) == "yes"
    assert cut_at("yes", []) == "yes"
    assert answer_length(torch.tensor([5, 6, 1, 0, 1]), [1, 2]) == 3
    assert answer_length(torch.tensor([5, 6, 7]), [1, 2]) == 3


def test_messages_lose_their_pictures_to_the_processor() -> None:
    image = Image.new("L", (4, 4))
    turns, images = split_images(to_messages({"images": [image], "question": "?"}), "here")
    assert turns == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
    ]
    assert [i.mode for i in images] == ["RGB"]
    with pytest.raises(DataError, match=r"task document 3: .* video"):
        split_images([{"role": "user", "content": [{"type": "video"}]}], "task document 3")


def test_model_in_memory_keeps_its_state(tiny_model_dir: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    processor = AutoProcessor.from_pretrained(tiny_model_dir)
    model.train()
    model.model.vision_tower.eval()  # a frozen tower stays in eval mode during training
    before = [m.training for m in model.modules()]
    adapter = MmkdModel(model=model, processor=processor, batch_size=2)
    adapter.task_dict = {"task": {"test": DOCS}}
    seen: list[bool] = []
    handle = model.register_forward_hook(lambda m, *_: seen.append(m.training))
    adapter.generate_until(requests(DOCS))
    handle.remove()
    adapter.clean()
    assert seen
    assert not any(seen)
    assert [m.training for m in model.modules()] == before
    assert any(before)
    assert processor.tokenizer.padding_side == "right"
    assert adapter.model is model
    model(**processor(text="<|user|>hi", return_tensors="pt")).logits.sum().backward()


def test_both_end_tokens_stop_an_answer(tiny_model_dir: Path) -> None:
    """LlamaConfig's own end token is 2; the scenes' tokenizer ends with 1."""
    adapter = adapter_of(tiny_model_dir, DOCS)
    assert adapter.model.generation_config.eos_token_id == 2
    assert adapter.tokenizer.eos_token_id == 1
    assert adapter.end_tokens == [1, 2]


def tiny_qwen() -> tuple[Any, Any]:
    from processors import qwen
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor = qwen()
    token = processor.tokenizer.convert_tokens_to_ids
    small = {"hidden_size": 32, "intermediate_size": 64}
    text = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": len(processor.tokenizer),
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
        },
    }
    vision = {
        "depth": 2,
        "num_heads": 2,
        "patch_size": 4,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config={**small, **text},
        vision_config={**small, **vision},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def tiny_smolvlm() -> tuple[Any, Any]:
    from processors import smolvlm
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    processor = smolvlm()
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    words = len(processor.tokenizer)
    config = Idefics3Config(
        text_config=LlamaConfig(**small, vocab_size=words, initializer_range=0.3, pad_token_id=0),
        vision_config={**small, "image_size": 32, "patch_size": 8},
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return Idefics3ForConditionalGeneration(config), processor


@pytest.mark.parametrize("build", [tiny_qwen, tiny_smolvlm])
def test_other_families_answer_batched_as_singly(build: Any) -> None:
    """Pictures of unequal sizes and numbers, and a question without any."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = build()
    sizes = [[(64, 64)], [(64, 32)], [], [(40, 64), (64, 64)]]
    docs = [
        {"question": q, "images": [Image.new("RGB", size, "red") for size in pictures]}
        for q, pictures in zip(("cat?", "two cats and a dog?", "no", "dog"), sizes, strict=True)
    ]

    def answers(batch_size: int) -> list[GenerationResult]:
        adapter = MmkdModel(model=model, processor=processor, batch_size=batch_size)
        adapter.task_dict = {"task": {"test": docs}}
        return adapter.generate_until(requests(docs, max_new_tokens=6))

    single = answers(1)
    assert answers(4) == single
    assert len({r.text for r in single}) == len(docs)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(MmkdError, match="unknown device 'gpu'"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        assert resolve_device(None) == torch.device("cpu")
        with pytest.raises(MmkdError, match="no GPU"):
            resolve_device("cuda")


def test_numbers_on_a_cpu_are_float32_unless_asked() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_dtype(None, cpu) is torch.float32
    assert resolve_dtype(None, gpu) == "auto"
    assert resolve_dtype("bfloat16", cpu) is torch.bfloat16
    with pytest.raises(CheckpointError, match="unknown dtype 'bfloat'"):
        resolve_dtype("bfloat", cpu)


# Folders that cannot be used


def broken_copy(source: Path, target: Path, *without: str) -> Path:
    shutil.copytree(source, target)
    for name in without:
        (target / name).unlink()
    return target


def message_of(folder: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        MmkdModel(pretrained=folder, device="cpu")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{folder}: ")
    return text


def test_folders_that_are_no_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert "no such model folder" in message_of(tmp_path / "absent")
    assert "no such model folder" in message_of("absent")
    (tmp_path / "empty").mkdir()
    assert "holds no processor" in message_of(tmp_path / "empty")
    bare = broken_copy(
        tiny_model_dir, tmp_path / "bare", "processor_config.json", "tokenizer_config.json",
        "tokenizer.json", "chat_template.jinja",
    )  # fmt: skip
    assert "processor" in message_of(bare)
    mute = broken_copy(tiny_model_dir, tmp_path / "mute", "chat_template.jinja")
    assert "no chat template" in message_of(mute)
    weightless = broken_copy(tiny_model_dir, tmp_path / "weightless", "model.safetensors")
    assert "cannot load the model" in message_of(weightless)
    garbage = broken_copy(tiny_model_dir, tmp_path / "garbage")
    (garbage / "model.safetensors").write_bytes(b"not weights at all")
    assert "cannot load the model" in message_of(garbage)


def test_missing_weights_are_not_made_up(tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = broken_copy(tiny_model_dir, tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    name = next(n for n in weights if "layers.1" in n and "q_proj" in n)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing" in message_of(folder)


def test_a_model_in_memory_needs_a_processor(tiny_model_dir: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    with pytest.raises(CheckpointError, match="needs its processor"):
        MmkdModel(model=model)


# Whole evaluations


class Oracle(lmms):
    """Answers with the truth."""

    is_simple = False
    batch_size = 1

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        found = []
        for _, _, _, doc_id, task, split in (r.args for r in requests):
            found.append(GenerationResult(self.task_dict[task][split][doc_id]["answer"]))
        return found

    def loglikelihood(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
        raise NotImplementedError


def test_true_answers_get_full_scores_through_lmms_eval(scenes_dir: Path) -> None:
    manager = find_tasks(["scenes"], scenes_dir / "tasks")
    raw = _simple_evaluate(Oracle(), TASKS, manager, None)
    scores = collect_scores(raw, TASKS)
    assert list(scores) == TASKS
    assert scores["scenes_caption"] == pytest.approx(
        {
            "caption_chair_s": 0,
            "caption_chair_i": 0,
            "caption_object_recall": 1,
            "caption_bleu": 1,
        }
    )
    assert set(scores["scenes_pope"]) == POPE_NAMES
    for name, value in scores["scenes_pope"].items():
        assert value == (0.5 if name.endswith("yes_rate") else 1.0), name
    for task in TASKS[1:4]:
        kinds = {s["doc"]["kind"] for s in raw["samples"][task]}
        measures = ("accuracy", "majority_accuracy")
        prefixes = ("vqa", *(f"vqa_{k}" for k in kinds))
        assert set(scores[task]) == {f"{p}_{m}" for p in prefixes for m in measures}
        for name, value in scores[task].items():
            assert value <= 1 if "majority" in name else value == 1, name
        assert 0 < scores[task]["vqa_majority_accuracy"] < 1


def test_every_score_a_task_can_yield_is_in_its_yaml(scenes_dir: Path) -> None:
    """lmms-eval drops a metric that the YAML does not list, without a word."""
    from lmms_eval.utils import load_yaml_config

    def listed(task: str) -> dict[str, Any]:
        config = load_yaml_config(str(scenes_dir / "tasks" / f"{task}.yaml"), mode="full")
        return {m["metric"]: m["aggregation"].__name__ for m in config["metric_list"]}

    doc = {"answer": "a", "objects": []}
    pope = [({**doc, "category": c}, "no") for c in POPE_CATEGORIES]
    vqa = [({**doc, "kind": k}, "no") for k in ASKERS]
    assert set(listed("scenes_pope")) == set(judged(scenes.process_pope, pope)) == POPE_NAMES
    for task in TASKS[1:4]:
        assert set(listed(task)) == set(judged(scenes.process_vqa, vqa))
    assert set(listed("scenes_caption")) == set(judged(scenes.process_caption, [(doc, "no")]))
    for task in TASKS:
        for metric, aggregation in listed(task).items():
            assert metric.endswith(f"_{aggregation}"), metric


def test_evaluation_of_a_folder_writes_everything(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "evaluation"
    result = evaluate(
        tiny_model_dir,
        tasks=["scenes_pope", "scenes_caption"],
        include_path=scenes_dir / "tasks",
        out=out,
        batch_size=16,
        limit=5,
    )
    written = json.loads((out / "results.json").read_text())
    assert written == result.summary()
    assert list(written["scores"]) == ["scenes_pope", "scenes_caption"]
    assert set(written["scores"]["scenes_pope"]) == {
        n for n in POPE_NAMES if "popular" not in n and "adversarial" not in n
    }
    model = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    assert written["model"] == str(tiny_model_dir)
    assert written["parameters"] == sum(p.numel() for p in model.parameters())
    assert written["weights_bytes"] == (tiny_model_dir / "model.safetensors").stat().st_size
    assert written["tokens_per_second"] > 0
    assert written["seconds"] > 0
    assert written["lmms_eval"] == "0.7.3"
    assert (written["device"], written["dtype"]) == ("cpu", "float32")
    assert (written["batch_size"], written["limit"]) == (16, 5)

    files = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert files == ["results.json", "samples/scenes_caption.jsonl", "samples/scenes_pope.jsonl"]
    lines = (out / "samples" / "scenes_pope.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["doc_id"] for s in samples] == [0, 1, 2, 3, 4]
    assert {"question", "answer", "prediction", "correct", "category"} <= set(samples[0])
    shown = sum(s["correct"] for s in samples) / 5
    assert shown == written["scores"]["scenes_pope"]["pope_accuracy"]


def test_evaluation_in_memory_leaves_no_trace(scenes_dir: Path, tiny_model_dir: Path) -> None:
    from loguru import logger

    model = AutoModelForImageTextToText.from_pretrained(tiny_model_dir).train()
    processor = AutoProcessor.from_pretrained(tiny_model_dir)
    log = io.StringIO()
    handler = logger.add(log, level="INFO", format="{message}")
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    expected = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    filters = list(warnings.filters)

    def run() -> Any:
        return evaluate(
            model,
            processor=processor,
            tasks=["scenes_vqa"],
            include_path=scenes_dir / "tasks",
            out=None,
            batch_size=8,
            limit=9,
        )

    first = run()
    assert random.getstate() == expected[0]
    assert np.random.get_state()[1].tolist() == expected[1]
    assert torch.equal(torch.get_rng_state(), expected[2])
    assert model.training
    assert list(warnings.filters) == filters
    logger.info("still here")
    logger.remove(handler)
    assert log.getvalue() == "still here\n"  # neither lost nor flooded
    second = run()  # the model is still there
    assert first.scores == second.scores
    assert first.samples == second.samples
    assert first.weights_bytes == 4 * first.parameters


def test_isolation_undoes_what_lmms_eval_does_at_import() -> None:
    import datasets
    from loguru import logger

    log = io.StringIO()
    handler = logger.add(log, format="{message}")
    filters, bars = list(warnings.filters), datasets.are_progress_bars_disabled()

    def fail_inside() -> None:
        with isolated(progress=False):
            warnings.filterwarnings("ignore")
            logger.remove()
            logger.info("inside")
            assert datasets.are_progress_bars_disabled()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert list(warnings.filters) == filters
    assert datasets.are_progress_bars_disabled() == bars
    logger.info("outside")
    logger.remove(handler)
    assert log.getvalue() == "outside\n"


def test_unknown_task_names_the_nearest(scenes_dir: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(MmkdError) as caught:
        evaluate(
            tiny_model_dir,
            tasks=["scenes_pop"],
            include_path=scenes_dir / "tasks",
            out=None,
        )
    text = str(caught.value)
    assert "unknown task 'scenes_pop'" in text
    assert "did you mean scenes_pope?" in text
    assert all(task in text for task in TASKS)
    assert "\n" not in text


def test_requests_that_make_no_sense(
    scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    def run(tasks: list[str], include_path: Path, **more: Any) -> None:
        evaluate(tiny_model_dir, tasks=tasks, include_path=include_path, out=tmp_path / "o", **more)

    tasks = scenes_dir / "tasks"
    with pytest.raises(DataError, match="no such folder of tasks"):
        run(["scenes_pope"], tmp_path / "absent")
    with pytest.raises(MmkdError, match="no tasks to evaluate"):
        run([], tasks)
    with pytest.raises(MmkdError, match="limit is 0"):
        run(["scenes_pope"], tasks, limit=0)
    with pytest.raises(MmkdError, match="batch_size is 0"):
        run(["scenes_pope"], tasks, batch_size=0)
    shutil.copytree(tasks, tmp_path / "alone" / "tasks")
    with pytest.raises(DataError, match=r"data of task scenes_pope is missing.*mmkd data build"):
        run(["scenes_pope"], tmp_path / "alone" / "tasks")
    assert not (tmp_path / "o").exists()


def test_silent_failures_of_lmms_eval_are_errors() -> None:
    raw = {
        "results": {
            "a": {"alias": "a", "x,none": 0.5, "x_stderr,none": "N/A"},
            "b": {"alias": "b"},
        },
        "group_subtasks": {"a": [], "b": [], "both": ["a", "b"]},
        "samples": {"a": [{}, {}], "b": [{}]},
        "n-samples": {"a": {"effective": 2}, "b": {"effective": 1}},
    }
    assert collect_scores(raw, ["a"]) == {"a": {"x": 0.5}}
    for asked in ("b", "both", "c"):
        with pytest.raises(MmkdError, match="returned no scores"):
            collect_scores(raw, [asked])
    raw["n-samples"]["a"]["effective"] = 3
    with pytest.raises(MmkdError, match="2 of 3 documents"):
        collect_scores(raw, ["a"])


def test_missing_lmms_eval_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require_lmms_eval()
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(MmkdError, match=r"pip install .*sacrebleu.* --no-deps lmms-eval==0\.7\.3"):
        require_lmms_eval()


def test_command_line_of_lmms_eval(scenes_dir: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "mmkd"),
        *("--model_args", f"pretrained={tiny_model_dir},device=cpu", "--tasks", "scenes_pope"),
        *("--include_path", str(scenes_dir / "tasks"), "--batch_size", "16"),
        *("--output_path", str(tmp_path / "out"), "--log_samples"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ), timeout=300
    )
    # it exits with 0 on failure too, so only the file counts
    written = list((tmp_path / "out").rglob("*_results.json"))
    assert len(written) == 1, done.stdout + done.stderr
    found = json.loads(written[0].read_text())
    scores = {k.split(",")[0] for k in found["results"]["scenes_pope"] if "stderr" not in k}
    assert scores - {"alias"} == POPE_NAMES
    own = evaluate(
        tiny_model_dir,
        tasks=["scenes_pope"],
        include_path=scenes_dir / "tasks",
        out=None,
        batch_size=16,
    )
    for name, value in own.scores["scenes_pope"].items():
        assert found["results"]["scenes_pope"][f"{name},none"] == pytest.approx(value), name
    assert found["efficiency"]["overall"]["total_output_tokens"] > 0
