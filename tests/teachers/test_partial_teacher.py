"""A teacher of which only layers are read stops after the last of them."""

import json
from dataclasses import replace

import pytest
import torch

from mmkd.data.batch import Batch
from mmkd.errors import RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import CaptureRequest, LayerPlan
from mmkd.objectives import Targets, build_objective
from mmkd.objectives.layer_settings import HiddenMseConfig, MiniLmConfig
from mmkd.objectives.settings import DivergenceConfig
from mmkd.recipe import load_recipe
from mmkd.runs import pipeline
from mmkd.teachers import LiveTeacher, TeacherSet, reference_name
from mmkd_models.parts import find_parts
from tests.support import families
from tests.support.recipes import tiny_recipe

CPU = torch.device("cpu")
KL, LAYERS = DivergenceConfig(kind="kl"), HiddenMseConfig(kind="hidden_mse", layers=[0])
REQUEST = CaptureRequest(frozenset({0, 1}), projections=True, outputs=False)


def counted(model):
    """How often each decoder layer, and the modules of the decoder after them, have run."""
    ran: dict[str, int] = {}
    parts = find_parts(model)

    def count(name):
        return lambda *_: ran.update({name: ran.get(name, 0) + 1})

    for index, layer in enumerate(parts.decoder_layers):
        layer.register_forward_hook(count(str(index)))
    parts.decoder.register_forward_hook(count("decoder"))
    parts.head.register_forward_hook(count("head"))
    return ran


def batch_of(name):
    inputs = families.inputs(name, [5, 9], side="right")
    real = inputs["attention_mask"].bool()
    targets = Targets(inputs["input_ids"], real, real, torch.zeros_like(real))
    return Batch(inputs, targets, ["a", "b"])


@pytest.mark.parametrize("name", sorted(families.FAMILIES))
def test_layers_are_bit_equal_and_nothing_after_them_runs(name):
    model = families.make(name)
    inputs = families.inputs(name, [5, 9])
    layers = [i for i, x in enumerate(find_parts(model).decoder_layers) if hasattr(x, "self_attn")]
    request = CaptureRequest(frozenset(layers[:2]), outputs=False)
    with torch.no_grad():
        whole = capture(model, inputs, replace(request, outputs=True))
        ran = counted(model)
        part = capture(model, inputs, request)
    assert ran == {str(i): 1 for i in range(layers[1] + 1)}
    assert part.hidden.shape == (*whole.hidden.shape[:2], 0)
    assert part.layers.keys() == whole.layers.keys() == set(layers[:2])
    assert torch.equal(part.embeddings, whole.embeddings)
    for index in layers[:2]:
        for key, want in vars(whole.layers[index]).items():
            got = getattr(part.layers[index], key)
            assert (got is None) == (want is None)
            assert want is None or torch.equal(got, want), key
    with torch.no_grad():  # the next forward pass of the model is whole again
        assert torch.equal(capture(model, inputs).hidden, whole.hidden)


def test_a_request_without_layers_runs_the_whole_model():
    model = families.make("llava")
    hidden = capture(model, families.inputs("llava", [5]), CaptureRequest(outputs=False)).hidden
    assert hidden.shape[-1] == 32


def test_the_first_forward_pass_is_whole_and_finds_a_layer_that_runs_twice():
    model = families.make("llava")
    teacher, ran, batch = LiveTeacher(model, CPU), counted(model), batch_of("llava")
    first, second = (teacher.signals(batch, REQUEST) for _ in range(2))
    assert (ran["0"], ran["1"], ran["3"], ran["decoder"]) == (2, 2, 1, 1)
    assert torch.equal(first.layers[1].keys, second.layers[1].keys)
    layers = find_parts(model).decoder_layers
    layers[3].register_forward_hook(lambda module, args, output: layers[0](output) and None)
    with pytest.raises(RecipeError, match="decoder layer 0 more than once"):
        LiveTeacher(model, CPU).signals(batch, REQUEST)


def test_outputs_are_requested_where_something_reads_them():
    teachers = TeacherSet({n: LiveTeacher(families.make("llava"), CPU) for n in "ab"}, "a")
    kl, layers = build_objective(KL), build_objective(LAYERS)
    minilm = build_objective(MiniLmConfig(kind="minilm", layers=[1], heads=2))

    def outputs(name, objectives, reference=None):
        request = LayerPlan.of(objectives).teacher_request()
        return teachers.request_for(name, objectives, request, reference).outputs

    assert not outputs("a", [layers])
    assert not outputs("a", [layers, minilm])
    assert outputs("a", [layers, kl])
    assert outputs("a", [layers], reference="a")
    # each teacher by itself: only b is asked about its output
    routed = kl.for_teacher("b", 1.0, None)
    assert not outputs("a", [layers, routed])
    assert outputs("b", [layers, routed])
    found = teachers.ask(batch_of("llava"), [layers, routed], CaptureRequest(frozenset({0})))
    assert found["b"].hidden.shape[-1] == 32
    assert reference_name(None) is None


@pytest.fixture
def trained(scenes_dir, tiny_model_dir, tmp_path):
    def run(name, teacher=None, **stage):
        raw = tiny_recipe(
            scenes_dir, tiny_model_dir, tmp_path, name=name,
            teacher={"model": str(tiny_model_dir), **(teacher or {})},
            stage={"objectives": [{"kind": "layer_l2", "layers": [0]}], "steps": 3, **stage},
        )  # fmt: skip
        raw["student"]["convert"] = [{"kind": "mamba", "layers": [0]}]
        if "validation" in stage:
            raw["data"]["validation"] = 0.1
        folder = pipeline.run(load_recipe(raw)) / "01-mimic"
        return [
            [{k: v for k, v in json.loads(x).items() if k != "seconds"} for x in f.open()]
            for f in sorted(folder.glob("*.jsonl"))
            if f.name in ("metrics.jsonl", "validation.jsonl")
        ]

    return run


def test_training_is_bit_equal_and_stops_early(trained, monkeypatch):
    """Validation reads the teacher's output, so its forward passes are whole."""
    behind: list[int] = []
    placed = LiveTeacher.__init__

    def watched(self, model, device):
        placed(self, model, device)
        layer = find_parts(self.model).decoder_layers[1]
        layer.register_forward_hook(lambda *_: behind.append(1))

    monkeypatch.setattr(LiveTeacher, "__init__", watched)
    (part,) = trained("part")
    assert len(behind) == 1  # the first forward pass only
    stage = {"validation": {"interval": 3}}
    part, part_held_out = trained("part-validated", **stage)
    once = len(behind)
    monkeypatch.setattr(CaptureRequest, "stops_early", False)
    whole, held_out = trained("whole-validated", **stage)
    assert part == whole
    assert part_held_out == held_out
    assert held_out[-1]["teacher_kl"] > 0
    assert len(behind) - once == once - 1 + 2


@pytest.mark.parametrize("source", ["self", "adapters"])
def test_the_student_as_its_teacher_stops_early_too(trained, source, monkeypatch):
    """As a copy, and as the student itself without its adapters."""
    stage = {"objectives": [{"kind": "hidden_mse", "layers": [0]}, {"kind": "ce"}]}
    if source == "adapters":
        stage["train"] = {"lora": {"rank": 2}}
    part = trained("part", {"model": None, "source": "self"}, **stage)
    monkeypatch.setattr(CaptureRequest, "stops_early", False)
    assert part == trained("whole", {"model": None, "source": "self"}, **stage)


def test_a_sharded_teacher_runs_whole(trained):
    pytest.importorskip("deepspeed")
    (part,), (sharded,) = trained("part"), trained("sharded", {"placement": "sharded"})
    for mine, theirs in zip(part, sharded, strict=True):
        assert mine["layer_l2"] == pytest.approx(theirs["layer_l2"], rel=1e-5)
