"""Decoding after long contexts: what is timed is what generate does, and it reaches the report."""

import families
import pytest
import torch
from test_hybrid import student
from transformers.cache_utils import DynamicCache

from mmkd.errors import MmkdError
from mmkd.evaluation.decode import Decoder, measure_decode
from mmkd_models.cache import GrowingLayer, HybridCache

CONTEXT, STEPS = 70, 3
KEYS_VALUES = 2 * 2 * 8 * 4  # bytes a token and layer: 2 kv heads of 8, float32
STATE = 4 * 8 * 8 * 4 + (4 + 2 + 2) * 8 * 3 * 4  # SSM, and convolution


@pytest.mark.parametrize(
    ("layers", "preallocated", "kind"),
    [
        (None, False, DynamicCache),
        (None, True, HybridCache),
        ([0, 1, 3], False, HybridCache),
        ([0, 1, 2, 3], False, HybridCache),
    ],
)
def test_a_filled_cache_decodes(layers, preallocated, kind):
    model = families.make("llava") if layers is None else student("llava", layers)
    decoder = Decoder(model, preallocated=preallocated)
    decoder.fill(CONTEXT)
    assert type(decoder.cache) is kind
    if kind is HybridCache:
        assert decoder.cache_bytes == decoder.cache.nbytes
        found = sum(isinstance(layer, GrowingLayer) for layer in decoder.cache.layers)
        assert found == 4 - len(layers or [])
    mamba = len(layers or [])
    for tokens in range(CONTEXT, CONTEXT + STEPS):
        assert decoder.tokens == tokens
        assert decoder.cache_bytes == mamba * STATE + (4 - mamba) * tokens * KEYS_VALUES
        seconds, logits = decoder.step()
        assert seconds > 0
        assert logits.shape == (1, 1, families.VOCABULARY)
        assert logits.isfinite().all()
    assert decoder.tokens == CONTEXT + STEPS


@pytest.mark.parametrize("name", families.FAMILIES)
def test_rows_of_all_families(name):
    linear = [0, 1, 3] if name == "gemma3" else [0, 1, 2, 3]  # Gemma3 keeps its sliding window
    teacher, grown = (
        measure_decode(families.make(name), [20, 200], steps=2, preallocated=p)
        for p in (False, True)
    )
    rows = measure_decode(student(name, linear), [20, 200], steps=2)
    assert [r.context for r in rows] == [20, 200]
    assert all(r.milliseconds > 0 for r in (*teacher, *grown, *rows))
    assert [r.cache_bytes for r in grown] == [r.cache_bytes for r in teacher]
    assert rows[0].cache_bytes == rows[1].cache_bytes
    assert teacher[1].cache_bytes > 4 * teacher[0].cache_bytes


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_steps_are_called_as_generate_calls(layers):
    model = families.make("llava") if layers is None else student("llava", layers)
    seen = []
    model.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    decoder = Decoder(model)
    recorded = seen[-1]
    decoder.fill(CONTEXT)
    decoder.step()
    assert seen[-1].keys() == recorded.keys()
    assert seen[-1]["position_ids"].tolist() == [[CONTEXT]]
    assert seen[-1]["input_ids"].shape == recorded["input_ids"].shape == (1, 1)
    assert seen[-1].get("attention_mask") is None
    assert len({type(k["cache"]) for k in (seen[-1], recorded)}) == 1


def test_random_streams_stay_untouched():
    model = families.make("llava")
    before = torch.get_rng_state()
    measure_decode(model, [9], steps=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("contexts", "steps"), [([0], 3), ([5], 1)])
def test_what_cannot_be_timed(contexts, steps):
    with pytest.raises(MmkdError, match="cannot time"):
        measure_decode(families.make("llava"), contexts, steps=steps)
