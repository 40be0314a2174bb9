"""Packed forward and backward passes equal those of single records, for every family."""

import copy

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmkd.data.packing import bins_of
from mmkd.errors import RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.packed_rows import isolate_packed_sequences
from mmkd.recipe import MambaConfig
from mmkd.runtime.seeds import set_seed
from mmkd.students import convert
from mmkd.teachers import LiveTeacher
from mmkd.training.packing_check import check_packing
from scripts.families.bench import Workbench
from tests.support.zoo import ZOO

KINDS = ("one", "none", "several", "other", "frames")
PACKED = [name for name in ZOO if name not in ("paligemma", "nemotron_h_omni")]
TOLD = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "lfm2_vl", "lfm3_vl"]
"""Families for which position ids are not enough to isolate records."""


@pytest.fixture
def batches(tmp_path):
    """Single records, the same records packed into rows, and their positions there."""

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
    isolate_packed_sequences(model)
    assert max(compare(model, *found)) < 1e-6


@pytest.mark.parametrize("name", TOLD)
def test_without_borders_records_see_each_other(name, batches):
    """Without isolation, the test above would fail."""
    found = batches(name)
    assert min(compare(ZOO[name].make(1), *found)) > 1e-3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "qwen3_5", "lfm3_vl"])
def test_layers_that_run_again_in_the_backward_pass(name, batches):
    model = ZOO[name].make(1)
    isolate_packed_sequences(model)
    model = copy.deepcopy(model)  # as a student's own teacher is
    isolate_packed_sequences(model)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) <= 3
    model.train()
    model.activation_checkpointing_enable()
    assert max(compare(model, *batches(name))) < 1e-6


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_hybrid_students(name, batches):
    model = ZOO[name].make(1)
    set_seed(1)  # of the mixer's new weights
    convert(model, [MambaConfig(kind="mamba", layers=[1])])
    isolate_packed_sequences(model)
    assert max(compare(model, *batches(name))) < 1e-6


def naive_flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Flash attention as transformers calls it: with sequence boundaries, or causal over whole rows
    with padding on the right."""
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
        later = torch.ones(end - start, end - start).triu(1).bool()
        scores = (q @ k.transpose(1, 2) * scaling).masked_fill(later, float("-inf"))
        made.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(made).unflatten(0, (rows, length)), None


@pytest.fixture
def flash(monkeypatch):
    """Run a model's decoder on it."""
    known = ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
    for functions, function in zip(known, (naive_flash, flash_attention_mask), strict=True):
        monkeypatch.setitem(functions._global_mapping, "naive_flash", function)

    def switch(model):
        model.get_decoder().config._attn_implementation_internal = "naive_flash"
        return model

    return switch


FLASH = [name for name in PACKED if name != "gemma3"]  # which transformers does not run on flash


@pytest.mark.parametrize("name", FLASH)
def test_flash_attention_is_told_the_borders(name, batches, flash):
    found = batches(name)
    model = flash(ZOO[name].make(1))
    isolate_packed_sequences(model)
    assert max(compare(model, *found)) < 1e-6


def packed_stage(tmp_path, monkeypatch, name, kinds, change=lambda model: model):
    """A stage without hooks that isolate records."""
    monkeypatch.setattr("mmkd.training.build.isolate_packed_sequences", lambda model: None)
    bench = Workbench(ZOO[name].make, ZOO[name].processor(), tmp_path)
    return bench.stage(change(bench.make(1)), *kinds, batch={"pack": 4096})


def test_a_picture_is_looked_for_before_the_first_step(tmp_path, monkeypatch):
    """Without isolation, only image tokens of Gemma 3's records mix."""
    texts = ["none"] * 5
    packed_stage(tmp_path, monkeypatch, "gemma3", texts)
    with pytest.raises(RecipeError, match=r"Gemma3.* does not isolate packed records"):
        packed_stage(tmp_path, monkeypatch, "gemma3", [*texts, "one", "other"])


def test_several_rows_are_looked_at_before_the_first_step(tmp_path, monkeypatch, flash):
    """Flash attention derives the boundaries of a single row from position ids."""
    with pytest.raises(RecipeError, match="does not isolate packed records"):
        packed_stage(tmp_path, monkeypatch, "llava", ["one", "none", "other"], flash)


def test_every_teacher_is_looked_at(tmp_path):
    bench = Workbench(ZOO["gemma3"].make, ZOO["gemma3"].processor(), tmp_path)
    told, untold = bench.make(1), bench.make(2)
    isolate_packed_sequences(told)
    encoder, device = bench.encoder("none", "one"), torch.device("cpu")
    check_packing(encoder, told, [LiveTeacher(told, device)], device)
    with pytest.raises(RecipeError, match="does not isolate packed records"):
        check_packing(encoder, told, [LiveTeacher(m, device) for m in (told, untold)], device)
