"""Tiny random models of the families, from their real classes, with one image a row.

`make(name)` returns a model in float32 and eval mode; `inputs(name, lengths)` what it is called
with: for each row an image's tokens in the midst of that many words.
"""

import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

VOCABULARY = 99
IMAGE_TOKEN = 7
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}


@dataclass(frozen=True)
class Family:
    """How to build a family's tiny model, and what one image looks like to it.

    Attributes:
        model_type: of its config.
        settings: of its config.
        tokens: image tokens of an image.
        picture: shape of an image's pixel values.
        extra: further inputs for an image.
    """

    model_type: str
    settings: dict[str, Any]
    tokens: int
    picture: tuple[int, ...]
    extra: dict[str, Tensor]
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


def _qwen_vision(**settings: Any) -> dict[str, Any]:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 1,
        "out_hidden_size": 32,
        **settings,
    }


GRID = {"image_grid_thw": torch.tensor([[1, 4, 4]])}
PATCHES = (16, 3 * 4 * 4)
CLIP = CLIPVisionConfig(**TOWER, image_size=16, patch_size=8)
SIGLIP = SiglipVisionConfig(**TOWER, image_size=16, patch_size=8)
QWEN_IDS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": 8,
    "vision_start_token_id": 9,
    "vision_end_token_id": 10,
}

FAMILIES: dict[str, Family] = {
    "llava": Family(
        "llava",
        {
            "text_config": LlamaConfig(**TEXT),
            "vision_config": CLIP,
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_layer": -1,
        },
        4,
        (3, 16, 16),
        {},
    ),
    "llava_onevision": Family(
        "llava_onevision",
        {
            "text_config": Qwen2Config(**TEXT),
            "vision_config": SIGLIP,
            "image_token_index": IMAGE_TOKEN,
            "video_token_index": 8,
            "vision_feature_layer": -1,
            "image_grid_pinpoints": [[16, 16]],
        },
        # the base view of 2 x 2 tokens, and the grid's 2 x 2 with a newline each row
        4 + 6,
        (2, 3, 16, 16),
        {"image_sizes": torch.tensor([[16, 16]])},
    ),
    "qwen2_5_vl": Family(
        "qwen2_5_vl",
        {
            "text_config": {**TEXT, "rope_parameters": QWEN_ROPE},
            "vision_config": _qwen_vision(window_size=16, fullatt_block_indexes=[1]),
            **QWEN_IDS,
        },
        4,
        PATCHES,
        GRID,
        (9,),
        (10,),
    ),
    "qwen3_vl": Family(
        "qwen3_vl",
        {
            "text_config": {**TEXT, "head_dim": 8, "rope_parameters": QWEN_ROPE},
            "vision_config": _qwen_vision(num_position_embeddings=16, deepstack_visual_indexes=[0]),
            **QWEN_IDS,
        },
        4,
        PATCHES,
        GRID,
        (9,),
        (10,),
    ),
    "gemma3": Family(
        "gemma3",
        {
            "text_config": Gemma3TextConfig(
                **TEXT,
                head_dim=8,
                layer_types=[*["full_attention"] * 2, "sliding_attention", "full_attention"],
                sliding_window=8,
            ),
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": 9,
            "eoi_token_index": 10,
        },
        4,
        (3, 16, 16),
        {},
        (9,),
        (10,),
    ),
    **{
        name: Family(
            name,
            {
                "text_config": LlamaConfig(**TEXT),
                "vision_config": {**TOWER, "image_size": 16, "patch_size": 4},
                "image_token_id": IMAGE_TOKEN,
                "scale_factor": 2,
            },
            4,
            (1, 3, 16, 16),
            {},
        )
        for name in ("smolvlm", "idefics3")
    },
    "internvl": Family(
        "internvl",
        {
            "text_config": Qwen2Config(**TEXT),
            "vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
            "image_token_id": IMAGE_TOKEN,
            "downsample_ratio": 0.5,
        },
        4,
        (3, 16, 16),
        {},
    ),
    "mistral3": Family(
        "mistral3",
        {
            "text_config": MistralConfig(**TEXT, head_dim=8, sliding_window=None),
            "vision_config": {
                "model_type": "pixtral",
                **TOWER,
                "head_dim": 16,
                "image_size": 16,
                "patch_size": 4,
            },
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_layer": -1,
            "spatial_merge_size": 2,
        },
        4,
        (3, 16, 16),
        {"image_sizes": torch.tensor([[16, 16]])},
    ),
}


@cache
def config_of(name: str) -> Any:
    family = FAMILIES[name]
    return CONFIG_MAPPING[family.model_type](**family.settings)


def make(name: str, seed: int = 0, **text: Any) -> Any:
    """A new tiny model of the family; `text` changes its decoder's config."""
    config = type(config_of(name)).from_dict(config_of(name).to_dict())
    for key, value in text.items():
        setattr(config.get_text_config(), key, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForImageTextToText.from_config(config).eval()


def inputs(name: str, lengths: list[int], side: str = "left", seed: int = 1) -> dict[str, Tensor]:
    """One image and `lengths[i]` words in row i, padded to one length on the given side."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        words = torch.randint(11, VOCABULARY, (length,), generator=generator).tolist()
        picture = [*family.before, *[IMAGE_TOKEN] * family.tokens, *family.after]
        rows.append([*words[:2], *picture, *words[2:]])
    longest = max(len(r) for r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    pictures = torch.randn(len(rows), *family.picture, generator=generator)
    if family.extra.keys() & {"image_grid_thw"}:
        pictures = pictures.flatten(0, 1)
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": pictures}
    batch |= {k: v.repeat(len(rows), 1) for k, v in family.extra.items()}
    if name == "gemma3" or "image_grid_thw" in batch:
        kinds = (ids == IMAGE_TOKEN).long()
        batch["token_type_ids" if name == "gemma3" else "mm_token_type_ids"] = kinds
    return batch


def row_of(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch without its padding."""
    real = batch["attention_mask"][row].bool()
    rows = batch["input_ids"].shape[0]
    alone = {}
    for name, value in batch.items():
        part = value.unflatten(0, (rows, -1))[row]
        alone[name] = part[:, real] if value.shape == batch["input_ids"].shape else part
    return alone


def run_alone(script: str, home: Path, *arguments: Path, **environment: str) -> str:
    """What a script prints in a process that sees neither mmkd's environment nor its folder;
    `environment` is added to the little that it sees."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={
            "HF_HOME": str(home / "home"),
            "HF_HUB_OFFLINE": "1",
            "DS_ACCELERATOR": "cpu",  # it prints what it finds
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),  # other sums would be other bits
            **environment,
        },
        cwd=home,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
