"""Tiny random models of the families' real classes, whose configs fit the processors.

`ZOO[name]` has what docs/families.md tells about: `make` gives a model in float32 and eval mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests.support import processors

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
VISION = ("torchvision",)
QWEN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
}


@dataclass(frozen=True)
class Member:
    """One family.

    Attributes:
        title: as its makers write it.
        model_type: of its config.
        processor: makes its processor; None where transformers has none that mmkd could use.
        settings: of its config, from the processor.
        needs: packages without which transformers does not load the processor from a folder.
    """

    title: str
    model_type: str
    processor: Callable[[], Any] | None
    settings: Callable[[Any], dict[str, Any]]
    needs: tuple[str, ...] = ()

    def make(self, seed: int = 0) -> Any:
        """A new model, random by `seed`."""
        processor = None if self.processor is None else self.processor()
        config = CONFIG_MAPPING[self.model_type](**self.settings(processor))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForImageTextToText.from_config(config).eval()


def _text(processor: Any, kind: str, **more: Any) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    return {
        "model_type": kind,
        **TEXT,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **more,
    }


def _id(processor: Any, token: str) -> int:
    return processor.tokenizer.convert_tokens_to_ids(token)


def _tower(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **TOWER, "image_size": processors.SIDE, "patch_size": 8, **more}


def _llava(processor: Any) -> dict[str, Any]:
    return {
        "text_config": _text(processor, "llama"),
        "vision_config": _tower("clip_vision_model"),
        "image_token_index": _id(processor, "<image>"),
        "image_seq_length": 16,
    }


def _llava_next(processor: Any) -> dict[str, Any]:
    return {
        **_llava(processor),
        "text_config": _text(processor, "mistral", sliding_window=None),
        "image_grid_pinpoints": processors.PINPOINTS,
    }


def _llava_onevision(processor: Any) -> dict[str, Any]:
    return {
        "text_config": _text(processor, "qwen2"),
        "vision_config": _tower("siglip_vision_model"),
        "image_token_index": _id(processor, "<image>"),
        "video_token_index": _id(processor, "<video>"),
        "vision_feature_layer": -1,
        "image_grid_pinpoints": processors.PINPOINTS,
    }


def _qwen_ids(processor: Any) -> dict[str, int]:
    return {
        "image_token_id": _id(processor, "<|image_pad|>"),
        "video_token_id": _id(processor, "<|video_pad|>"),
        "vision_start_token_id": _id(processor, "<|vision_start|>"),
        "vision_end_token_id": _id(processor, "<|vision_end|>"),
    }


def _qwen2(processor: Any) -> dict[str, Any]:
    tower = {k: v for k, v in QWEN_TOWER.items() if not k.endswith("_size")}
    return {
        "text_config": _text(processor, "qwen2_vl_text", rope_parameters=QWEN_ROPE),
        "vision_config": {
            **tower,
            "embed_dim": 32,
            "hidden_size": 32,
            "patch_size": 4,
            "mlp_ratio": 2,
        },
        **_qwen_ids(processor),
    }


def _qwen2_5(processor: Any) -> dict[str, Any]:
    return {
        "text_config": _text(processor, "qwen2_5_vl_text", rope_parameters=QWEN_ROPE),
        "vision_config": {**QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
        **_qwen_ids(processor),
    }


def _qwen3(processor: Any) -> dict[str, Any]:
    return {
        "text_config": _text(processor, "qwen3_vl_text", head_dim=8, rope_parameters=QWEN_ROPE),
        "vision_config": {
            **QWEN_TOWER,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        **_qwen_ids(processor),
    }


def _qwen3_5(processor: Any) -> dict[str, Any]:
    return {
        "text_config": _text(
            processor,
            "qwen3_5_text",
            head_dim=8,
            layer_types=["linear_attention", "full_attention"],
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            rope_parameters={**QWEN_ROPE, "partial_rotary_factor": 1.0},
        ),
        "vision_config": {**QWEN_TOWER, "num_position_embeddings": 16},
        **_qwen_ids(processor),
    }


def _idefics3(processor: Any) -> dict[str, Any]:
    return {
        "text_config": _text(processor, "llama"),
        "vision_config": {**TOWER, "image_size": processors.SIDE, "patch_size": 8},
        "image_token_id": _id(processor, "<image>"),
        "scale_factor": 2,
    }


def _internvl(processor: Any) -> dict[str, Any]:
    side = processors.SIDE
    return {
        "text_config": _text(processor, "qwen2"),
        "vision_config": {**TOWER, "image_size": [side, side], "patch_size": [8, 8]},
        "image_token_id": _id(processor, "<IMG_CONTEXT>"),
        "downsample_ratio": 0.5,
    }


def _gemma3(processor: Any) -> dict[str, Any]:
    return {
        "text_config": _text(
            processor,
            "gemma3_text",
            head_dim=8,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=8,
        ),
        "vision_config": _tower("siglip_vision_model"),
        "mm_tokens_per_image": 4,
        "image_token_index": _id(processor, "<image_soft_token>"),
        "boi_token_index": _id(processor, "<start_of_image>"),
        "eoi_token_index": _id(processor, "<end_of_image>"),
    }


def _paligemma(processor: Any) -> dict[str, Any]:
    return {
        "text_config": _text(processor, "gemma", head_dim=8),
        "vision_config": _tower("siglip_vision_model", projection_dim=32),
        "image_token_index": _id(processor, "<image>"),
        "projection_dim": 32,
    }


def _pixtral(processor: Any) -> dict[str, Any]:
    return {
        "text_config": _text(processor, "mistral", head_dim=8, sliding_window=None),
        "vision_config": _tower("pixtral", head_dim=16),
        "image_token_index": _id(processor, "[IMG]"),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }


def _mistral3(processor: Any) -> dict[str, Any]:
    settings = _pixtral(processor)
    settings.pop("vision_feature_select_strategy")
    return {**settings, "spatial_merge_size": 2}


def _lfm2(processor: Any) -> dict[str, Any]:
    return {
        "text_config": _text(
            processor, "lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8
        ),
        "vision_config": {
            "model_type": "siglip2_vision_model",
            **TOWER,
            "patch_size": 8,
            "num_patches": 16,
        },
        "image_token_id": _id(processor, "<image>"),
        "projector_hidden_size": 32,
    }


def _lfm3(processor: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return {
        "text_config": _text(
            processor,
            "lfm3",
            head_dim=8,
            layer_types=["conv", "full_attention"],
            rope_parameters={"full_attention": rope, "sliding_attention": rope},
        ),
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "patch_size": 4,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": ["conv", "full_attention"],
        },
        "projector_hidden_size": 32,
        **_qwen_ids(processor),
    }


def _nemotron(_: Any) -> dict[str, Any]:
    return {
        "text_config": {
            "model_type": "nemotron_h",
            **TEXT,
            "vocab_size": 64,
            "head_dim": 8,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
        },
        "vision_config": {
            "model_type": "radio",
            **TOWER,
            "image_size": processors.SIDE,
            "patch_size": 8,
            "video_temporal_patch_size": 2,
        },
        "audio_config": None,
        "vision_hidden_size": 32,
        "projector_hidden_size": 32,
        "image_token_id": 3,
    }


ZOO = {
    "llava": Member("LLaVA-1.5", "llava", processors.llava, _llava),
    "llava_next": Member("LLaVA-NeXT", "llava_next", processors.llava_next, _llava_next),
    "llava_onevision": Member(
        "LLaVA-OneVision",
        "llava_onevision",
        processors.llava_onevision,
        _llava_onevision,
        VISION,
    ),
    "qwen2_vl": Member("Qwen2-VL", "qwen2_vl", processors.qwen2, _qwen2, VISION),
    "qwen2_5_vl": Member("Qwen2.5-VL", "qwen2_5_vl", processors.qwen, _qwen2_5, VISION),
    "qwen3_vl": Member("Qwen3-VL", "qwen3_vl", processors.qwen3, _qwen3, VISION),
    "idefics3": Member("Idefics3, SmolVLM", "idefics3", processors.smolvlm, _idefics3),
    "smolvlm": Member(
        "SmolVLM2", "smolvlm", processors.smolvlm2, _idefics3, (*VISION, "num2words")
    ),
    "internvl": Member("InternVL", "internvl", processors.internvl, _internvl, VISION),
    "gemma3": Member("Gemma 3", "gemma3", processors.gemma3, _gemma3),
    "paligemma": Member("PaliGemma", "paligemma", processors.paligemma, _paligemma),
    "pixtral": Member("Pixtral", "llava", processors.pixtral, _pixtral, VISION),
    "mistral3": Member("Mistral Small 3", "mistral3", processors.mistral3, _mistral3, VISION),
    "qwen3_5": Member("Qwen3.5 (hybrid)", "qwen3_5", processors.qwen3, _qwen3_5, VISION),
    "lfm2_vl": Member("LFM2-VL (hybrid)", "lfm2_vl", processors.lfm2, _lfm2, VISION),
    "lfm3_vl": Member("LFM3-VL (hybrid)", "lfm3_vl", processors.lfm3, _lfm3, VISION),
    "nemotron_h_omni": Member("Nemotron Omni (hybrid)", "nemotron_h_omni", None, _nemotron, VISION),
}
