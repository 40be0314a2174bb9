"""A random LLaVA model of 0.1 M weights, float32, with the scenes' processor."""

from pathlib import Path

import torch
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)


def write_tiny_model(processor: Path, out: Path, *, dropout: float = 0.0) -> None:
    """Write the model's folder; `dropout` is that of the decoder's attention."""
    words = AutoProcessor.from_pretrained(processor)
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
            vocab_size=len(words.tokenizer),
            initializer_range=0.3,
            max_position_embeddings=512,
            attention_dropout=dropout,
        ),
        image_token_index=words.tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=64,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(out)
    words.save_pretrained(out)
