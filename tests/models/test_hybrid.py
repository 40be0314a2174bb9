"""Hybrid students of nine families: convert, save, load, generate."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import DynamicCache, PreTrainedConfig

from mmkd.errors import CheckpointError, RecipeError
from mmkd.modeling.loading import load_model, load_pretrained, skeleton
from mmkd.recipe import LayersConfig, MambaConfig, ModelConfig
from mmkd.students import convert, set_trainable
from mmkd.students.layer_choice import choose, parse
from mmkd_models.cache import GrowingLayer, HybridCache, MambaLayer, cache_bytes
from mmkd_models.configuration_mmkd import MmkdConfig
from mmkd_models.modeling_mmkd import MmkdForImageTextToText
from mmkd_models.parts import find_parts
from tests.support import families

# Gemma3's third layer is a sliding-window attention, which stays.
LAYOUTS = [
    (name, layers)
    for name in families.FAMILIES
    for layers in ([1, 3], [0, 1, 2, 3])
    if (name, layers) != ("gemma3", [0, 1, 2, 3])
]
SPECIAL = [7, 8, 9, 10]  # image tokens, which a text must not contain


def student(name, layers, init="inherit", **form):
    model = families.make(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convert(model, MambaConfig(kind="mamba", layers=layers, init=init, **form))
    return model


def generate(model, batch, **settings):
    return model.generate(
        **batch,
        max_new_tokens=6,
        eos_token_id=None,
        suppress_tokens=SPECIAL,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student("llava", [0, 2]).save_pretrained(folder)
    return folder


ALONE = """
import sys
sys.modules["mmkd"] = sys.modules["mmkd_models"] = None
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
folder, out = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
batch = torch.load(sys.argv[2] + "/batch.pt")
with torch.no_grad():
    logits = model(**batch).logits
answer = model.generate(**batch, max_new_tokens=4, do_sample=False, suppress_tokens=[7])
model.save_pretrained(out + "/again")
again = AutoModelForImageTextToText.from_pretrained(out + "/again", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again(**batch).logits, logits)
torch.save({"logits": logits, "answer": answer}, out + "/got.pt")
print([m for m in sys.modules if m.split(".")[0] in ("mmkd", "mmkd_models") and sys.modules[m]])
"""


def test_a_folder_loads_where_only_torch_and_transformers_are(saved, tmp_path):
    batch = families.inputs("llava", [5, 9])
    torch.save(batch, tmp_path / "batch.pt")
    printed = families.run_alone(ALONE, tmp_path, saved, tmp_path)
    assert printed.strip() == "[]"
    got = torch.load(tmp_path / "got.pt")
    model = load_pretrained(str(saved))
    with torch.no_grad():
        torch.testing.assert_close(got["logits"], model(**batch).logits, rtol=0, atol=1e-6)
    want = model.generate(**batch, max_new_tokens=4, do_sample=False, suppress_tokens=[7])
    assert torch.equal(got["answer"], want)


def test_without_its_code_a_folder_is_refused_by_transformers_in_words(saved, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(saved, folder, ignore=shutil.ignore_patterns("*.py"))
    code = (
        "import sys; sys.modules['mmkd'] = sys.modules['mmkd_models'] = None\n"
        "from transformers import AutoModelForImageTextToText\n"
        f"AutoModelForImageTextToText.from_pretrained({str(folder)!r}, trust_remote_code=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "configuration_mmkd.py" in done.stderr.splitlines()[-1]
    # mmkd brings the code itself, and runs nothing that lies in the folder
    assert load_pretrained(str(folder)).config.layout["mamba"]["layers"] == [0, 2]


def test_code_in_a_folder_is_not_run(saved, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(saved, folder)
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('this code was run')")
    load_pretrained(str(folder), trust_remote_code=True)
    assert skeleton(ModelConfig(model=str(folder))).config.layout["mamba"]["layers"] == [0, 2]


IMPORTED = """
import sys
import mmkd_models
from transformers import AutoConfig, AutoModelForImageTextToText
for trusted in ({}, {"trust_remote_code": True}):
    assert AutoConfig.from_pretrained(sys.argv[1], **trusted).layout["mamba"]["layers"] == [0, 2]
    model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], **trusted)
    assert type(model).__module__ == "mmkd_models.modeling_mmkd"
print([m for m in sys.modules if m.split(".")[0] in ("mmkd", "transformers_modules")])
"""


def test_code_in_a_folder_is_not_run_after_importing_the_package_alone(saved, tmp_path):
    folder = tmp_path / "student"
    shutil.copytree(saved, folder)
    for file in folder.glob("*.py"):
        file.write_text("raise SystemExit('this code was run')")
    assert families.run_alone(IMPORTED, tmp_path, folder).strip() == "[]"


def test_a_students_config_comes_from_where_its_weights_do(saved, tmp_path, monkeypatch):
    shutil.copytree(saved, tmp_path / "repository" / "best")
    load = MmkdForImageTextToText.from_pretrained
    model = load(tmp_path / "repository", subfolder="best")
    assert model.config.layout["mamba"]["layers"] == [0, 2]
    asked = {}

    def get_config_dict(name, **settings):
        asked.update(settings, name=name)
        raise OSError("not there")

    monkeypatch.setattr(MmkdConfig, "get_config_dict", get_config_dict)
    where = {
        "revision": "v2", "token": "secret", "cache_dir": "here",
        "local_files_only": True, "force_download": False, "subfolder": "best",
    }  # fmt: skip
    with pytest.raises(OSError, match="not there"):
        load("me/student", **where, dtype=torch.bfloat16)
    assert asked["name"] == "me/student"
    assert {k: asked[k] for k in where} == where


def test_a_config_of_the_caller_is_used(saved):
    given = json.loads((saved / "config.json").read_text())
    given["text_config"]["rms_norm_eps"] = 0.5
    config = PreTrainedConfig.from_dict(given)
    model = MmkdForImageTextToText.from_pretrained(saved, config=config)
    assert model.config.text_config.rms_norm_eps == 0.5


def broken_config(saved, tmp_path, change):
    folder = tmp_path / "student"
    shutil.copytree(saved, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["layout"]["mamba"].update(layers=[0, 9]), "layer 9 of a model with 4 layers"),
        (lambda c: c["layout"]["mamba"].update(d_state=16), "another shape"),
        (lambda c: c["layout"]["mamba"].update(layers=[0, 1]), "missing"),
        (lambda c: c["layout"]["mamba"].update(width=1), "unknown key 'width'"),
        (lambda c: c.update(base_model_type="llama9"), "'llama9' is no family"),
        (lambda c: c.pop("layout"), "'layout' is missing"),
    ],
)
def test_a_layout_that_does_not_fit_its_weights_is_one_line(saved, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(broken_config(saved, tmp_path, change))
    assert "\n" not in str(caught.value)


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


def test_half_precision_keeps_decay_and_step_size(saved):
    model = load_model(ModelConfig(model=str(saved), dtype="bfloat16"))
    mixer = model.model.language_model.layers[0].self_attn
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == mixer.D.dtype == torch.float32
    assert mixer.q_proj.weight.dtype == torch.bfloat16
    batch = families.inputs("llava", [5, 9])
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert model(**batch).logits.dtype == torch.bfloat16
    assert generate(model, batch, do_sample=False).sequences.shape == (2, 19)


PLACEMENTS = [
    ("every:4", {"every": 4}, [0, 4]),
    ("every:4:last", {"every": 4, "first": False}, [3, 7]),
    ("head:2", {"head": 2}, [0, 1]),
    ("tail:2", {"tail": 2}, [6, 7]),
    ("none", [], []),
    ("1,5", [1, 5], [1, 5]),
]


@pytest.mark.parametrize(("text", "placement", "layers"), PLACEMENTS)
def test_placements(text, placement, layers):
    spoken, written = (
        MambaConfig(kind="mamba", keep_attention=p).keep_attention for p in (parse(text), placement)
    )
    assert spoken == written
    assert choose(written, 8, where="here") == layers


@pytest.mark.parametrize("text", ["every", "every:0", "every:4:middle", "head:", "half", "1,,2"])
def test_a_placement_that_cannot_be_read(text):
    with pytest.raises(RecipeError, match="every:4"):
        parse(text)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llava", {"layers": [4]}, "cannot place layers"),
        ("llava", {"keep_attention": {"head": 4}}, "all 4 layers keep their attention"),
        ("llava", {"layers": [0], "d_state": 4}, "d_state 4 is less than the head size 8"),
        ("gemma3", {"keep_attention": []}, "layer 2 cannot be converted: .*sliding-window"),
    ],
)
def test_layouts_that_do_not_fit(name, settings, message):
    with pytest.raises(RecipeError, match=message) as caught:
        convert(families.make(name), MambaConfig(kind="mamba", **settings))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_converted_faithfully_stays_untouched():
    from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        text_config=GemmaConfig(**families.TEXT, head_dim=8), vision_config=families.SIGLIP
    )
    model = PaliGemmaForConditionalGeneration(config)
    before = type(model)
    with pytest.raises(RecipeError, match="both ways over its prefix"):
        convert(model, MambaConfig(kind="mamba", keep_attention=[0]))
    assert type(model) is before


def test_a_student_is_converted_further_step_by_step(tmp_path):
    """MambaInLlama's stepwise conversion: the layers of earlier steps stay what they are."""
    model = student("llava", [1], init="inherit")
    earlier = {n: t.clone() for n, t in model.state_dict().items() if "layers.1." in n}
    report = convert(model, MambaConfig(kind="mamba", layers=[3], init="inherit"))
    assert "in layers [1, 3], attention in [0, 2]" in report.lines[0]
    assert all(torch.equal(model.state_dict()[n], t) for n, t in earlier.items())
    batch = families.inputs("llava", [5, 9])
    whole = model(**batch).logits
    found = generate(model, batch, do_sample=False)
    torch.testing.assert_close(found.logits[0], whole[:, -1], rtol=1e-5, atol=1e-5)
    alone = {k: v[:1, 4:] if v.ndim == 2 else v[:1] for k, v in batch.items()}  # 4 are padding
    torch.testing.assert_close(model(**alone).logits, whole[:1, 4:], rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = load_pretrained(str(tmp_path))
    assert torch.equal(again(**batch).logits, whole)
    at_once = student("llava", [1, 3], init="inherit")
    at_once.load_state_dict(model.state_dict())
    assert torch.equal(at_once(**batch).logits, whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1]}, "layers \\[1\\] are Mamba already"),
        ({"keep_attention": [1]}, "layer 1 cannot keep its attention: it is Mamba already"),
        ({"layers": [2], "d_conv": 3}, "d_conv 3, but layer 1 is Mamba already with 4"),
    ],
)
def test_a_further_conversion_that_does_not_fit(settings, message):
    model = student("llava", [1])
    before = [type(x.self_attn) for x in find_parts(model).decoder_layers]
    with pytest.raises(RecipeError, match=message):
        convert(model, MambaConfig(kind="mamba", init="inherit", **settings))
    assert [type(x.self_attn) for x in find_parts(model).decoder_layers] == before


def test_layers_are_dropped_before_attention_becomes_mamba():
    model = families.make("llava")
    cut = LayersConfig(kind="layers", decoder=[0, 2])
    report = convert(model, [cut, MambaConfig(kind="mamba", layers=[1])])
    assert report.lines[0] == "decoder: kept layers [0, 2] of 4"
    assert "Mamba-2 mixers (mimic) in layers [1], attention in [0]" in report.lines[1]
    assert "inherited: q_proj.weight" in report.lines[2]
    with pytest.raises(RecipeError, match="put 'layers' before 'mamba' and 'moe'"):
        convert(model, cut)
