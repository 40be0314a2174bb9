"""Models without weights are as their configs say, and their copies are independent."""

import copy

import pytest
import torch

from mmkd.modeling.loading import load_config, model_class, skeleton
from mmkd.modeling.skeletons import without_weights
from mmkd.recipe import ModelConfig, load_recipe
from mmkd.students import student_at
from mmkd.students.convert import convert
from mmkd.students.rebuilt import skeleton_of
from tests.support.recipes import tiny_recipe
from tests.support.zoo import ZOO

CONVERSIONS = [{"kind": "depth_pruning", "decoder": [1]}, {"kind": "mamba", "keep_attention": []}]


def described(model):
    weights = model.named_parameters(remove_duplicate=False)
    return (
        type(model),
        model.config.to_dict(),
        {n: (p.shape, p.dtype, p.device.type, p.requires_grad) for n, p in weights},
        {n: (b.shape, b.dtype, b.device.type) for n, b in model.named_buffers()},
        sum(p.numel() for p in model.parameters()),
        [type(m) for m in model.modules()],
    )


def test_it_is_the_model_that_transformers_builds(tiny_model_dir):
    source = ModelConfig(model=str(tiny_model_dir))
    config = load_config(source)
    with torch.device("meta"):
        expected = model_class(config).from_config(config, dtype=torch.float32)
    assert described(skeleton(source)) == described(expected)
    assert described(skeleton(source)) == described(expected)


def test_the_random_numbers_of_the_caller_stay():
    before = torch.get_rng_state()
    with without_weights():
        layer, table = torch.nn.Linear(3, 4), torch.nn.Embedding(5, 6)
    assert layer.weight.is_meta
    assert table.weight.is_meta
    assert torch.equal(before, torch.get_rng_state())


def test_values_are_drawn_outside():
    with without_weights():
        torch.nn.Linear(3, 4)
    assert torch.nn.Linear(3, 4).weight.std() > 0


def test_copies_are_independent(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path)
    raw["student"]["convert"] = CONVERSIONS
    recipe = load_recipe(raw)
    expected = skeleton(recipe.student)
    convert(expected, recipe.student.convert)
    first = student_at(recipe, 0, meta=True)
    assert described(first) == described(expected)
    first.requires_grad_(False)
    first.config.text_config.hidden_size = 1
    del first.model.language_model.layers[:]
    assert described(student_at(recipe, 0, meta=True)) == described(expected)


def test_a_changed_config_is_another_model(scenes_dir, tiny_model_dir, tmp_path):
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path)
    whole = student_at(load_recipe(raw), 0, meta=True)
    raw["student"]["convert"] = CONVERSIONS[:1]
    cut = student_at(load_recipe(raw), 0, meta=True)
    assert len(cut.model.language_model.layers) == 1 < len(whole.model.language_model.layers)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_is_another_model(tiny_model_dir, dtype):
    model = skeleton(ModelConfig(model=str(tiny_model_dir), dtype=dtype))
    assert next(model.parameters()).dtype is getattr(torch, dtype)


@pytest.mark.parametrize("name", ["gemma3", "llava"])
def test_tied_weights_stay_tied(name):
    model = ZOO[name].make(1)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        expected = type(model)(copy.deepcopy(model.config))
    made = skeleton_of(model)
    assert described(made) == described(expected)

    def tied(of):
        return of.get_output_embeddings().weight is of.get_input_embeddings().weight

    assert tied(made) == tied(expected)
