"""Packed forward and gradient of every family are those of each record alone."""

import copy

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from zoo import ZOO

from mmkd.borders import tell_borders
from mmkd.data.packing import bins_of
from mmkd.recipe import MambaConversion
from mmkd.signals import capture
from mmkd.students import convert
from scripts.families.bench import Workbench

KINDS = ("one", "none", "several", "other", "frames")
PACKED = [name for name in ZOO if name not in ("paligemma", "nemotron_h_omni")]
TOLD = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "lfm2_vl", "lfm3_vl"]
"""Those whom positions alone do not tell where records begin."""


@pytest.fixture
def batches(tmp_path):
    """Records alone, the same packed in rows of several, and where each of them lies there."""

    def make(name):
        member = ZOO[name]
        try:
            bench = Workbench(member.make, member.processor(), tmp_path)
        except ImportError as error:
            pytest.skip(" ".join(str(error).split())[:80])
        encoder = bench.encoder(*KINDS)
        alone = [encoder.encode([i]) for i in range(len(KINDS))]
        lengths = [batch.inputs["input_ids"].shape[1] for batch in alone]
        encoder.pack = sum(sorted(lengths)[-2:])
        packed = encoder.encode(list(range(len(KINDS))))
        places = {}
        for row, members in enumerate(bins_of(lengths, encoder.pack)):
            at = 0
            for record in members:
                places[record] = row, slice(at, at + lengths[record])
                at += lengths[record]
        assert len({row for row, _ in places.values()}) > 1
        assert len(places) > len({row for row, _ in places.values()})
        return alone, packed, places

    return make


def compare(model, alone, packed, places):
    """Relative distances of hidden states, and of the gradients of random sums of them, the
    farthest parameter's."""
    generator = torch.Generator().manual_seed(5)
    model.double()

    def run(runs):
        model.zero_grad()
        found = []
        for inputs, records in runs:
            inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
            hidden = capture(model, inputs).hidden
            parts = [hidden[row, place] for row, place in records.values()]
            sum(
                (p * w).sum() for p, w in zip(parts, map(weights.get, records), strict=True)
            ).backward()
            found += [p.detach() for p in parts]
        return torch.cat(found), [p.grad for p in model.parameters() if p.grad is not None]

    weights = {
        i: torch.randn(b.inputs["input_ids"].shape[1], 32, generator=generator).double()
        for i, b in enumerate(alone)
    }
    hidden, gradient = run([(b.inputs, {i: (0, slice(None))}) for i, b in enumerate(alone)])
    order = sorted(places)
    hidden_packed, gradient_packed = run([(packed.inputs, {i: places[i] for i in order})])
    least = 1e-9 * max(g.norm() for g in gradient)  # keys' biases have none but rounding
    pairs = zip(gradient_packed, gradient, strict=True)
    apart = max((a - b).norm() / b.norm() for a, b in pairs if b.norm() > least)
    return float((hidden_packed - hidden).norm() / hidden.norm()), float(apart)


@pytest.mark.parametrize("name", PACKED)
def test_a_packed_record_is_what_it_is_alone(name, batches):
    found = batches(name)
    model = ZOO[name].make(1)
    tell_borders(model)
    assert max(compare(model, *found)) < 1e-6


@pytest.mark.parametrize("name", TOLD)
def test_without_borders_records_see_each_other(name, batches):
    """Or the test above would show nothing."""
    found = batches(name)
    assert min(compare(ZOO[name].make(1), *found)) > 1e-3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_5", "lfm3_vl"])
def test_layers_that_run_again_in_the_backward_pass(name, batches):
    model = ZOO[name].make(1)
    tell_borders(model)
    model = copy.deepcopy(model)  # as a student's own teacher is
    tell_borders(model)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) <= 3
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert max(compare(model, *batches(name))) < 1e-6


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_hybrid_students(name, batches):
    model = ZOO[name].make(1)
    convert(model, [MambaConversion(kind="mamba", layers=[1])])
    tell_borders(model)
    assert max(compare(model, *batches(name))) < 1e-6


def naive_flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Flash attention as transformers calls it: by borders, else causal over whole rows."""
    assert attention_mask is None
    rows, heads, length, _ = query.shape
    edges = kwargs.get("cu_seq_lens_q")
    edges = torch.arange(0, rows * length + 1, length) if edges is None else edges
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    groups = heads // key.shape[1]
    made = []
    for start, end in zip(edges.tolist(), edges.tolist()[1:], strict=False):
        assert end - start <= kwargs.get("max_length_q", length)
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(groups, 0) for x in (k, v))
        scores = (q @ k.transpose(1, 2) * scaling).masked_fill(
            torch.ones(end - start, end - start).triu(1).bool(), float("-inf")
        )
        made.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(made).unflatten(0, (rows, length)), None


FLASH = [name for name in PACKED if name != "gemma3"]  # which transformers does not run on flash


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_is_told_the_borders(name, batches, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "naive_flash", naive_flash)
    masks = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    monkeypatch.setitem(masks, "naive_flash", flash_attention_mask)
    found = batches(name)
    model = ZOO[name].make(1)
    for part in (model.get_decoder(), *model.get_decoder().modules()):
        if hasattr(part, "config"):
            part.config._attn_implementation_internal = "naive_flash"
    tell_borders(model)
    assert max(compare(model, *found)) < 1e-6
