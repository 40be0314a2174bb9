"""4- and 8-bit teachers: arguments for bitsandbytes, and errors without it.

No test machine has a GPU with bitsandbytes: the call is looked at, not what it makes.
"""

import json
from types import SimpleNamespace

import pytest
import torch

from mmkd.commands.plan.costs import parameter_bytes, teacher_bytes
from mmkd.errors import RecipeError
from mmkd.evaluation import models
from mmkd.modeling import loading
from mmkd.modeling.loading import load_model, skeleton
from mmkd.recipe import EvaluateConfig, ModelConfig, StudentConfig, TeacherConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.runtime.files import write_json
from mmkd.teachers import place_teacher, stored
from mmkd_models.parts import find_parts
from tests.support.recipes import tiny_recipe

GPU = torch.device("cuda")


def recipe(scenes_dir, tiny_model_dir, tmp_path, **teacher):
    raw = tiny_recipe(
        scenes_dir, tiny_model_dir, tmp_path,
        teacher={"model": str(tiny_model_dir), "quantize": "4bit", **teacher},
        stage={"objectives": [{"kind": "kl"}]},
    )  # fmt: skip
    return load_recipe(raw)


def test_without_a_gpu_or_the_package_it_is_refused(scenes_dir, tiny_model_dir, tmp_path):
    with pytest.raises(RecipeError, match="teacher teacher: quantize: cannot load a model in 4bit"):
        pipeline.run(recipe(scenes_dir, tiny_model_dir, tmp_path))
    assert not (tmp_path / "tiny").exists()
    with pytest.raises(RecipeError, match="a quantized model needs a GPU"):
        load_model(TeacherConfig(model=str(tiny_model_dir), quantize="8bit"))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="bitsandbytes is not installed"):
        loading.check_quantization("4bit", "teacher", GPU)


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"placement": "sharded"}, "placement sharded does not work with"),
        ({"placement": "offload"}, "placement offload does not work with"),
        ({"source": "self", "model": None}, "'quantize' needs a teacher with weights"),
        ({"quantize": "2bit"}, "'4bit' or '8bit'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(teacher, says, scenes_dir, tiny_model_dir, tmp_path):
    with pytest.raises(RecipeError, match=says):
        recipe(scenes_dir, tiny_model_dir, tmp_path, **teacher)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_only_the_language_models_layers_are_asked_for(bits, tiny_model_dir, monkeypatch):
    """The head, which objectives read, stays whole, and so does all that sees the images."""
    monkeypatch.setattr(loading, "find_spec", lambda name: True)
    monkeypatch.setattr(loading.distributed, "choose_device", lambda wanted: GPU)
    asked = {}
    made = load_model(ModelConfig(model=str(tiny_model_dir)))

    def from_pretrained(name, **settings):
        asked.update(settings)
        keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
        return made, {key: [] for key in keys}

    real = loading.model_class
    fake = SimpleNamespace(
        from_pretrained=from_pretrained, from_config=lambda c: real(c).from_config(c)
    )
    monkeypatch.setattr(loading, "model_class", lambda config: fake)
    load_model(TeacherConfig(model=str(tiny_model_dir), quantize=bits, dtype="bfloat16"))
    found = asked["quantization_config"]
    assert (found.load_in_4bit, found.load_in_8bit) == (bits == "4bit", bits == "8bit")
    assert found.bnb_4bit_compute_dtype == asked["dtype"] == torch.bfloat16
    assert asked["device_map"] == {"": "cuda"}
    whole = set(found.llm_int8_skip_modules)
    decoder = find_parts(made).decoder
    linear = {n for n, m in made.named_modules() if type(m) is torch.nn.Linear}
    inside = {n for n, m in made.named_modules() if any(m is d for d in decoder.modules())}
    assert whole == linear - inside
    assert "lm_head" in whole


def test_a_packed_teacher_is_never_spread(tiny_model_dir, monkeypatch):
    model = load_model(ModelConfig(model=str(tiny_model_dir)))
    model.is_quantized = True
    monkeypatch.setattr("mmkd.runtime.distributed.memory_of", lambda device: 1)
    assert not place_teacher(model, "auto", torch.device("cpu")).spread


def test_the_plan_counts_fewer_bytes(tiny_model_dir):
    teacher = skeleton(TeacherConfig(model=str(tiny_model_dir), quantize="4bit"))
    whole = parameter_bytes(teacher)
    decoder = find_parts(teacher).decoder
    linear = sum(m.weight.numel() for m in decoder.modules() if type(m) is torch.nn.Linear)
    assert teacher_bytes(teacher, None) == whole
    assert teacher_bytes(teacher, "8bit") == whole - 3 * linear
    assert teacher_bytes(teacher, "4bit") == whole - 4 * linear + linear // 2 + linear // 16


def test_a_cache_tells_quantized_weights_apart(scenes_dir, tiny_model_dir, tmp_path, monkeypatch):
    def checked(asked, held):
        facts = {"weights": stored.weights_hash(str(tiny_model_dir)), **held}
        store = SimpleNamespace(
            folder=tmp_path, manifest={"processor": "p", "teacher": facts, "vocabulary": 1}
        )
        monkeypatch.setattr(stored, "Store", lambda folder: store)
        monkeypatch.setattr(stored, "processor_hash", lambda processor: "p")
        cached = {"source": "cache", "cache": {"folder": str(tmp_path)}, "quantize": asked}
        made = recipe(scenes_dir, tiny_model_dir, tmp_path, **cached)
        return stored.open_store(made.teacher, object())

    assert checked("4bit", {"quantize": "4bit"})
    assert checked(None, {})
    for asked, held in [("4bit", {}), (None, {"quantize": "8bit"}), ("8bit", {"quantize": "4bit"})]:
        with pytest.raises(RecipeError, match="it was built with quantize"):
            checked(asked, held)


def test_the_teacher_is_scored_as_it_taught(tmp_path, monkeypatch):
    """And scores of the whole model are not taken for its."""
    seen = []

    def score(*arguments, quantize, out, **more):
        seen.append(quantize)
        write_json(out / "results.json", {"scores": {}})

    monkeypatch.setattr("mmkd.evaluation.run.evaluate", score)
    settings = EvaluateConfig(tasks=["scenes_pope"])
    sources = {
        "teacher": TeacherConfig(model="a/b", quantize="8bit"),
        "kd": StudentConfig(model="c/d"),
    }
    models.evaluate_models(sources, settings, tmp_path, "cpu")
    assert seen == ["8bit", None]
    models.evaluate_models(sources, settings, tmp_path, "cpu")
    assert seen == ["8bit", None]
    path = tmp_path / "teacher" / "request.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in held.items() if k != "quantize"}))
    models.evaluate_models(sources, settings, tmp_path, "cpu")
    assert seen == ["8bit", None, "8bit"]
