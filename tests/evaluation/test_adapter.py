"""The lmms-eval adapter: answers, families, folders that cannot be used."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lmms_eval.api.instance import GenerationResult
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmkd.errors import CheckpointError, DataError, MmkdError
from mmkd.evaluation.adapter import (
    MmkdModel,
    answer_length,
    cut_at,
    split_images,
)
from mmkd.runtime.distributed import choose_device


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
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from tests.support.processors import qwen

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
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, LlamaConfig

    from tests.support.processors import smolvlm

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
    """Images of unequal sizes and numbers, and a question without any."""
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
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(MmkdError, match="unknown device 'gpu'"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == torch.device("cpu")
        with pytest.raises(MmkdError, match="no GPU"):
            choose_device("cuda")


def test_numbers_on_a_cpu_are_float32_unless_asked(tiny_model_dir: Path) -> None:
    for asked in (None, "float32"):
        assert MmkdModel(tiny_model_dir, device="cpu", dtype=asked).model.dtype is torch.float32
    found = MmkdModel(tiny_model_dir, device="cpu", dtype="bfloat16")
    assert found.model.dtype is torch.bfloat16
    with pytest.raises(CheckpointError, match="unknown dtype 'bfloat'"):
        MmkdModel(tiny_model_dir, device="cpu", dtype="bfloat")


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
