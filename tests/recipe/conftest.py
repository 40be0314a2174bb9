"""A model as deep as those of the papers."""

import pytest
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

DEPTH = 32


@pytest.fixture(scope="session")
def deep_model_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model with 32 decoder layers."""
    config = AutoConfig.from_pretrained(tiny_model_dir)
    config.text_config.num_hidden_layers = DEPTH
    config.text_config.initializer_range = 0.05
    out = tmp_path_factory.mktemp("models") / "deep"
    AutoModelForImageTextToText.from_config(config).save_pretrained(out)
    AutoProcessor.from_pretrained(tiny_model_dir).save_pretrained(out)
    return out
