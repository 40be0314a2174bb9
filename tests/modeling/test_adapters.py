"""LoRA and DoRA students: every layer's adapter learns, nothing else does, and all of it merges."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from mmkd.errors import RecipeError
from mmkd.modeling.adapters import adapted_layers, adapters_off, effective_weight, merged
from mmkd.modeling.capture import capture
from mmkd.recipe import LoraConfig, MambaConfig, MoeConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.students import convert, set_trainable
from mmkd.students.write import write_student
from tests.support.families import FAMILIES, inputs, make
from tests.support.processors import llava
from tests.support.recipes import tiny_recipe

ALL = ["vision", "connector", "language_model"]


def moved(model):
    """Adapters as after some training: B is not 0 any more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "magnitude" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.05 * noise * parameter.abs().mean().clamp(min=1))
    return model


def logits(model, batch):
    signals = capture(model, batch)
    weight = signals.head_weight
    bias = 0 if signals.head_bias is None else signals.head_bias
    return signals.hidden @ weight.T + bias


def untied(name):
    """A family's model with a head of its own."""
    model = make(name)
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
        model.config.get_text_config().tie_word_embeddings = False
    return model


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_learns_and_merges(family, dora):
    model, batch = untied(family), inputs(family, [7, 4])
    with torch.no_grad():
        before = logits(model, batch)
    names = set_trainable(model, [], LoraConfig(groups=[*ALL, "head"], rank=3, dora=dora))
    assert all("lora_" in n for n in names)
    layers = adapted_layers(model)
    assert any(m is model.get_output_embeddings() for m in layers.values())
    with torch.no_grad():
        torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-5)
    real = batch["attention_mask"].bool()
    moved(model)
    got = logits(model, batch)
    got[real].square().sum().backward()
    trained = [(n, p.grad) for n, p in model.named_parameters() if p.requires_grad]
    silent = [n for n, grad in trained if grad is None or not grad.any()]
    # Some families never read the last vision layers, Gemma 3 begins with a connector of zeros.
    assert all("vision" in n for n in silent), silent
    with torch.no_grad(), adapters_off(model):
        torch.testing.assert_close(logits(model, batch), before, rtol=1e-5, atol=1e-5)
    plain = untied(family)
    missing, unexpected = plain.load_state_dict(merged(model), strict=False)
    assert not missing
    assert not unexpected
    with torch.no_grad():
        want = logits(plain, batch)
        torch.testing.assert_close(got[real], want[real], rtol=1e-3, atol=1e-3)
        assert (want[real] - before[real]).abs().max() > 1e-2


@pytest.mark.parametrize("dora", [False, True])
def test_the_effective_weight_is_the_papers(dora):
    torch.manual_seed(0)
    model = untied("llava")
    set_trainable(model, [], LoraConfig(groups=["head"], rank=2, alpha=6, dora=dora))
    moved(model)
    head = model.get_output_embeddings()
    weight = effective_weight(head)
    direction = torch.randn(weight.shape, dtype=torch.float64)
    (weight.double() * direction).sum().backward()
    named = {n.split(".")[0]: p for n, p in head.named_parameters()}
    w = named["base_layer"].detach().double()
    a, b = (named[n].detach().double().requires_grad_() for n in ("lora_A", "lora_B"))
    whole = w + 3 * b @ a
    leaves = {"lora_A": a, "lora_B": b}
    if dora:
        m = named["lora_magnitude_vector"].detach().double().requires_grad_()
        leaves["lora_magnitude_vector"] = m
        norm = whole.detach().square().sum(1).sqrt()  # a constant: section 4.3
        whole = m[:, None] * whole / norm[:, None]
    (whole * direction).sum().backward()
    torch.testing.assert_close(weight.double(), whole, rtol=1e-5, atol=1e-6)
    for name, leaf in leaves.items():
        torch.testing.assert_close(named[name].grad.double(), leaf.grad, rtol=1e-4, atol=1e-5)
    h = torch.randn(3, weight.shape[1])
    torch.testing.assert_close(head(h), h @ weight.T, rtol=1e-4, atol=1e-5)


def test_converted_students_have_adapters_in_mixers(tmp_path):
    model, batch = make("llava"), inputs("llava", [7, 4], side="right")
    convert(model, [MambaConfig(kind="mamba", keep_attention=[0]),
                    MoeConfig(kind="moe", experts=2, top_k=2, layers="all")])  # fmt: skip
    with torch.no_grad():  # experts that are alike give their router no gradient
        for name, parameter in model.named_parameters():
            if ".mlp.experts" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    set_trainable(model, ["moe.router"], LoraConfig(rank=2))
    assert any(".layers.1.self_attn.q_proj" in n for n in adapted_layers(model))
    moved(model)
    got = logits(model, batch)
    got[batch["attention_mask"].bool()].square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or ".router." in name), name
        assert not parameter.requires_grad or parameter.grad.any(), name


@pytest.fixture
def recipe(scenes_dir, tiny_model_dir, tmp_path):
    def made(name="tiny", **stage):
        raw = tiny_recipe(
            scenes_dir, tiny_model_dir, tmp_path, name=name,
            teacher={"model": str(tiny_model_dir)},
            stage={"objectives": [{"kind": "ce"}, {"kind": "kl"}], "steps": 4,
                   "optimizer": {"lr": 1e-2}, "checkpoint": {"interval": 2}, **stage},
        )  # fmt: skip
        return load_recipe(raw)

    return made


def losses(folder):
    lines = (folder / "01-mimic" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("dora", [False, True])
def test_a_stage_writes_a_plain_student_and_its_adapters(recipe, tiny_model_dir, scenes_dir, dora):
    lora = {"rank": 4, "keep": True, "dora": dora}
    config = recipe(train={"groups": ["connector"], "lora": lora})
    folder = pipeline.run(config)
    student = folder / "01-mimic" / "student"
    old, new = (load_file(f / "model.safetensors") for f in (tiny_model_dir, student))
    assert old.keys() == new.keys()
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    assert any("projector" in n for n in changed)
    assert any("self_attn" in n for n in changed)
    assert not any("vision" in n or "norm" in n or "embed" in n for n in changed)
    base = AutoModelForImageTextToText.from_pretrained(tiny_model_dir)
    written = AutoModelForImageTextToText.from_pretrained(student).state_dict()
    for name, tensor in base.state_dict().items():
        if "projector" in name:  # it trained whole
            tensor.copy_(written[name])
    again = PeftModel.from_pretrained(base, student / "adapter").merge_and_unload()
    for name, tensor in written.items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_student_without_adapters_is_its_own_teacher(recipe, tiny_model_dir):
    """As a copy of it would be, or the folder that it came from."""
    stage = {"train": {"lora": {"rank": 4}}, "objectives": [{"kind": "reverse_kl"}, {"kind": "ce"}]}
    want = losses(pipeline.run(recipe("folder", **stage)))

    def own(name):
        raw = recipe(name, **stage).model_dump(mode="json")
        return losses(pipeline.run(load_recipe(raw | {"teacher": {"source": "self"}})))

    assert own("self") == pytest.approx(want, rel=1e-6)
    stage["train"]["groups"] = ["connector"]  # now it has to be a copy
    more = losses(pipeline.run(recipe("more", **stage)))
    assert own("copy") == pytest.approx(more, rel=1e-6)
    assert more[1:] != pytest.approx(want[1:], rel=1e-6)


def test_adapters_go_on_where_they_stopped(recipe, monkeypatch):
    lora = {"train": {"lora": {"rank": 4}}}
    want = losses(pipeline.run(recipe("whole", **lora)))
    from mmkd.training import stage

    step = stage.Stage.step

    def broken(self, number, batches):
        if number == 4:
            raise KeyboardInterrupt
        return step(self, number, batches)

    monkeypatch.setattr(stage.Stage, "step", broken)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(recipe("cut", **lora))
    monkeypatch.setattr(stage.Stage, "step", step)
    assert losses(pipeline.run(recipe("cut", **lora))) == want


@pytest.mark.parametrize(
    ("groups", "lora", "said"),
    [
        ([], {"groups": ["head"], "dropout": 0.1}, "cannot have dropout"),
        ([], {"groups": ["embeddings"]}, "no linear layers in embeddings"),
        ([], {"groups": ["langauge_model"]}, "did you mean 'language_model'"),
        (["all"], {}, "no linear layers in language_model -- .*are not fully trained"),
    ],
)
def test_what_cannot_have_adapters_is_refused(recipe, groups, lora, said, tmp_path):
    with pytest.raises(RecipeError, match=said):
        pipeline.run(recipe(train={"groups": groups, "lora": lora}))
    assert not (tmp_path / "tiny").exists()


def test_what_trains_whole_has_no_adapter():
    model = untied("llava")
    lora = LoraConfig(groups=["connector", "language_model", "head"], rank=2)
    names = set_trainable(model, ["connector", "head"], lora)
    adapted = adapted_layers(model)
    assert adapted
    assert all("language_model" in name for name in adapted)
    assert "lm_head.weight" in names
    assert any("projector" in name for name in names)


def test_a_head_that_is_the_embeddings_too_has_no_adapter():
    model = untied("llava")
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with pytest.raises(RecipeError, match="weight is tied to the embeddings"):
        set_trainable(model, [], LoraConfig(groups=["head"]))
    set_trainable(model, [], LoraConfig(groups=["language_model"]))
    head = model.get_output_embeddings()
    assert effective_weight(head) is head.weight


@pytest.mark.parametrize("keep", [False, True])
def test_a_written_student_needs_no_peft(tmp_path, keep, recwarn):
    model = untied("llava")
    lora = LoraConfig(groups=["language_model", "head"], rank=2, keep=keep)
    set_trainable(model, [], lora)
    moved(model)

    write_student(model, llava(), tmp_path / "student", None, lora)
    kept = tmp_path / "student" / "adapter" / "adapter_model.safetensors"
    assert kept.exists() == keep
    if keep:  # the head's too, and no weight that is not an adapter's
        names = load_file(kept).keys()
        assert any("lm_head" in name for name in names)
        assert all("lora_" in name for name in names)
        assert not [w for w in recwarn if "embedding" in str(w.message)]
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "student")
    batch = inputs("llava", [7, 4])
    with torch.no_grad():
        torch.testing.assert_close(logits(plain, batch), logits(model, batch), rtol=1e-4, atol=1e-4)
