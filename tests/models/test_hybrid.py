"""Hybrid students of nine families: convert, pad, save, generate, train."""

import copy

import pytest
import torch
from transformers import DynamicCache

from mmkd.modeling.loading import load_pretrained
from mmkd.recipe import MambaConfig
from mmkd.students import convert, set_trainable
from mmkd_models.cache import GrowingLayer, HybridCache, MambaLayer, cache_bytes
from tests.support import families
from tests.support.hybrids import generate, student

# Gemma3's third layer is a sliding-window attention, which stays.
LAYOUTS = [
    (name, layers)
    for name in families.FAMILIES
    for layers in ([1, 3], [0, 1, 2, 3])
    if (name, layers) != ("gemma3", [0, 1, 2, 3])
]


def extended(batch, sequences):
    """The inputs of a forward over prompt and answer."""
    new = sequences.shape[1] - batch["input_ids"].shape[1]
    longer = {"input_ids": sequences}
    for key, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if key in batch:
            tail = torch.full((len(sequences), new), fill)
            longer[key] = torch.cat([batch[key], tail], dim=1)
    return {**batch, **longer}


@pytest.mark.parametrize(("name", "layers"), LAYOUTS)
def test_convert_pad_save_load_generate(name, layers, tmp_path):
    model = student(name, layers)
    # In float64, so that rounding hides little; decay, norm and generate's logits are float32.
    exact = copy.deepcopy(model).double()
    left, right = (families.inputs(name, [5, 9], side=side) for side in ("left", "right"))
    wide, right = ({**x, "pixel_values": x["pixel_values"].double()} for x in (left, right))
    with torch.no_grad():
        padded = [(batch, exact(**batch).logits) for batch in (wide, right)]
        for row in range(2):
            alone = exact(**families.row_of(wide, row)).logits[0]
            for batch, logits in padded:
                real = batch["attention_mask"][row].bool()
                torch.testing.assert_close(logits[row, real], alone, rtol=1e-6, atol=5e-6)

    greedy = generate(exact, wide, do_sample=False)
    with torch.no_grad():
        uncached = exact(**extended(wide, greedy.sequences), use_cache=False).logits[:, -7:-1]
    torch.testing.assert_close(torch.stack(greedy.logits, 1), uncached.float(), rtol=0, atol=5e-6)

    model.save_pretrained(tmp_path)
    assert {"scan.py", "mixer.py", "modeling_mmkd.py"} <= {p.name for p in tmp_path.iterdir()}
    loaded = load_pretrained(str(tmp_path))
    assert type(loaded) is type(model)
    with torch.no_grad():
        assert torch.equal(loaded(**left).logits, model(**left).logits)


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_model_from_a_folder_becomes_a_folder_again(name, tmp_path):
    """Families load and save under older weight names, a student under its own."""
    families.make(name).save_pretrained(tmp_path / "family")
    model = load_pretrained(str(tmp_path / "family"))
    convert(model, MambaConfig(kind="mamba", layers=[1]))
    model.save_pretrained(tmp_path / "student")
    loaded = load_pretrained(str(tmp_path / "student"))
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[n], w) for n, w in model.state_dict().items())


@pytest.mark.parametrize("layers", [[1, 3], [0, 1, 2, 3]])
def test_sampling_beams_and_chunked_prefill(layers):
    model = student("llava", layers)
    batch = families.inputs("llava", [5, 9])
    torch.manual_seed(0)
    first = generate(model, batch, do_sample=True).sequences
    torch.manual_seed(0)
    assert torch.equal(first, generate(model, batch, do_sample=True).sequences)

    beams = generate(model, batch, num_beams=3, do_sample=False).sequences
    assert torch.equal(beams, generate(model, batch, num_beams=3, use_cache=False).sequences)

    text = {"input_ids": batch["input_ids"][1:].clone()}
    text["input_ids"][text["input_ids"] == families.IMAGE_TOKEN] = 20
    text["attention_mask"] = torch.ones_like(text["input_ids"])
    whole = generate(model, text, do_sample=False)
    chunked = generate(model, text, do_sample=False, prefill_chunk_size=4)
    assert torch.equal(whole.sequences, chunked.sequences)
    torch.testing.assert_close(
        torch.stack(whole.logits), torch.stack(chunked.logits), rtol=1e-5, atol=1e-5
    )


def test_left_padding_changes_no_answer():
    model = student("llava", [0, 1, 2, 3])
    batch = families.inputs("llava", [4, 8, 12])
    together = generate(model, batch, do_sample=False).sequences[:, -6:]
    for row in range(3):
        alone = generate(model, families.row_of(batch, row), do_sample=False).sequences[0, -6:]
        assert torch.equal(alone, together[row])


def test_states_and_keys_take_the_bytes_they_should():
    model = student("llava", [0, 2, 3])
    batch = families.inputs("llava", [9])
    cache = model(**batch, use_cache=True).cache
    assert isinstance(cache, HybridCache)
    kinds = [MambaLayer, GrowingLayer, MambaLayer, MambaLayer]
    assert [type(layer) for layer in cache.layers] == kinds
    state = 4 * 8 * 8 * 4 + (4 + 2 + 2) * 8 * 3 * 4  # SSM, and convolution
    assert cache_bytes(cache) == 3 * state + 2 * 2 * 8 * 13 * 4
    assert cache.get_seq_length() == 13


def test_growing_keys_are_concatenated_keys():
    growing = GrowingLayer()
    keys = torch.randn(2, 3, 150, 4)
    for start, stop in ((0, 10), (10, 11), (11, 90), (90, 91)):
        got, values = growing.update(keys[:, :, start:stop], -keys[:, :, start:stop])
        assert torch.equal(got, keys[:, :, :stop])
        assert torch.equal(values, -keys[:, :, :stop])
    growing.reorder_cache(torch.tensor([1, 0]))
    got, _ = growing.update(keys[[1, 0], :, 91:150], keys[:, :, 91:150])
    assert torch.equal(got, keys[[1, 0]])
    growing.crop(-50)
    assert growing.get_seq_length() == 100


def test_a_cache_of_another_layout_is_refused():
    batch = families.inputs("llava", [5])
    one, other = student("llava", [0, 2]), student("llava", [1])
    cache = one(**batch, use_cache=True).cache
    with pytest.raises(ValueError, match=r"belongs to layers \[0, 2\].*layers \[1\]"):
        other(input_ids=torch.tensor([[11]]), cache=cache)
    plain = families.make("llava")(**batch, use_cache=True).cache
    with pytest.raises(ValueError, match="belongs to a model without Mamba layers"):
        one(input_ids=torch.tensor([[11]]), cache=plain)
    with pytest.raises(ValueError, match="belongs to a model without Mamba layers"):
        one(**batch, cache=DynamicCache())  # empty, and it would stay so
    with pytest.raises(ValueError, match="cache_implementation 'static'"):
        one.generate(**batch, max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_packed_rows_stay_apart(name):
    """Positions that restart, without a mask, are transformers' sign of packed documents."""
    model = student(name, [0, 1, 2, 3])
    one, two = torch.randint(11, 99, (1, 7)), torch.randint(11, 99, (1, 5))
    packed = torch.cat([one, two], dim=1)
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    if name == "qwen3_vl":  # plain ones, time, height and width
        positions = positions.expand(4, 1, -1)
    with torch.no_grad():
        got = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        want = torch.cat([model(input_ids=d, use_cache=False).logits for d in (one, two)], dim=1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_student_trains_in_all_its_groups():
    model = student("qwen3_vl", [1, 3], "inherit")
    new, inherited = (set(set_trainable(model, [g])) for g in ("mamba.new", "mamba.inherited"))
    assert {n.split(".")[-1] for n in new} >= {"A_log", "D", "dt_bias", "conv_weight"}
    assert {n.split("self_attn.")[1] for n in inherited} == {
        *(f"{p}_proj.weight" for p in "qkvo"), "q_norm.weight", "k_norm.weight"
    }  # fmt: skip
    assert not new & inherited
    assert set(set_trainable(model, ["mamba"])) == new | inherited
    qkv = set_trainable(model, ["mamba.qkv"])
    assert len(qkv) == 6
    model.train()
    batch = families.inputs("qwen3_vl", [5, 9])
    set_trainable(model, ["mamba"])
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == new | inherited


def test_activation_checkpointing_keeps_the_padding():
    batch = families.inputs("llava", [4, 9])
    gradients = []
    for checkpointing in (False, True):
        model = student("llava", [0, 2]).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, rtol=1e-4, atol=1e-6)
