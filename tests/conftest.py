"""What many tests share: a small scene data set and a tiny model that can be loaded."""

import io
import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene data set: 64 training pictures, 16 for validation, 6 behind each evaluation file."""
    from mmkd.data.scenes.build import build_scenes

    out = tmp_path_factory.mktemp("data") / "scenes"
    build_scenes(out, seed=0, train=64, validation=16, evaluation=6)
    return out


@pytest.fixture(scope="session")
def tiny_model_dir(scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA model (0.1 M weights, float32) and the scenes' processor."""
    import torch
    from transformers import (
        AutoProcessor,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        SiglipVisionConfig,
    )

    processor = AutoProcessor.from_pretrained(scenes_dir / "processor")
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**small, image_size=64, patch_size=8),
        # a wide initialisation, so that different questions get different answers
        text_config=LlamaConfig(
            **small,
            num_key_value_heads=2,
            vocab_size=len(processor.tokenizer),
            initializer_range=0.3,
            max_position_embeddings=512,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=64,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    out = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished study: two students, three seeds, a teacher, scores and samples."""
    from written_runs import put_study

    return put_study(tmp_path)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A console that records, wide enough for models as rows."""
    from rich.console import Console

    from mmkd.report import tables

    console = Console(record=True, width=220, file=io.StringIO())
    monkeypatch.setattr(tables, "console", console)
    return console
