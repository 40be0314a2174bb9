"""`image_size` sets the size settings of each family; unsupported keys are refused."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaNextConfig

from mmkd.cache import processor_hash
from mmkd.data.processing import Processing
from mmkd.errors import RecipeError
from mmkd.evaluation.adapter import MmkdModel
from mmkd.modeling.image_sizes import limit_config, limit_processor
from mmkd.modeling.loading import load_model, load_pretrained_processor, load_processor
from mmkd.recipe import ImageSizeConfig, ModelConfig, load_recipe
from tests.support import processors
from tests.support.layouts import drawn

SIZE = (200, 190)
SETTINGS = {
    "qwen": {"max_pixels": 1024, "min_pixels": 64},
    "smolvlm": {"longest_edge": 32},
    "idefics_whole": {"split": False},
    "internvl": {"max_patches": 2},
    "llava_next": {"max_patches": 2},
    "llava_onevision": {"max_patches": 2},
    "pixtral": {"longest_edge": 16},
}


def family_of(name):
    return {"idefics_whole": "smolvlm"}.get(name, name)


def fresh(name):
    """A processor of its own to change; skips where its class needs torchvision."""
    try:
        return copy.deepcopy(getattr(processors, family_of(name))())
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])


def tokens(processor):
    """Image tokens of one image."""
    picture = drawn(1, SIZE)
    processing = Processing(processor)
    encoded = processing([processor.image_token], [[picture]])
    count = int((encoded["input_ids"] == processing.image_token_id).sum())
    assert processing.length(processor.image_token, [SIZE]) == encoded["input_ids"].shape[1]
    return count


@pytest.mark.parametrize("name", SETTINGS)
def test_pictures_become_smaller_and_stay_so_in_what_is_saved(name, tmp_path):
    processor = fresh(name)
    before, hashed = tokens(processor), processor_hash(processor)
    wanted = ImageSizeConfig(**SETTINGS[name])
    limit_processor(processor, wanted, "m")
    after = tokens(processor)
    assert 0 < after < before
    assert processor_hash(processor) != hashed, "a teacher's cache of another size is refused"
    again = processor_hash(processor)
    limit_processor(processor, wanted, "m")
    assert processor_hash(processor) == again
    processor.image_processor.save_pretrained(tmp_path)
    saved = type(processor.image_processor).from_pretrained(tmp_path)
    assert saved.to_dict() == processor.image_processor.to_dict()


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_a_processor_lacks_are_refused_by_name(name):
    own = {*SETTINGS[name], "longest_edge" if name == "idefics_whole" else ""}
    for key, value in {
        "max_pixels": 900,
        "longest_edge": 64,
        "max_patches": 3,
        "split": True,
    }.items():
        processor = fresh(name)
        hashed = processor_hash(processor)
        if key in own or (key == "split" and family_of(name) == "smolvlm"):
            continue
        kind = type(processor.image_processor).__name__
        with pytest.raises(RecipeError, match=f"image_size of m: {kind} has no setting for {key}"):
            limit_processor(processor, ImageSizeConfig(**{key: value}), "m")
        assert processor_hash(processor) == hashed


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_families_of_one_size_say_so(name):
    with pytest.raises(RecipeError, match="has no setting for max_pixels -- leave image_size out"):
        limit_processor(fresh(name), ImageSizeConfig(max_pixels=900), "m")


def test_values_that_cannot_be():
    with pytest.raises(RecipeError, match="max_patches is 1, but the smallest grid has 2"):
        limit_processor(fresh("llava_next"), ImageSizeConfig(max_patches=1), "m")
    with pytest.raises(RecipeError, match="at least 64 and at most 16 pixels -- set min_pixels"):
        limit_processor(fresh("qwen"), ImageSizeConfig(max_pixels=16), "m")
    for said, message in (
        ({}, "it sets nothing"),
        ({"max_pixels": 4, "min_pixels": 9}, "min_pixels is larger than max_pixels"),
        ({"max_pixel": 4}, "Extra inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageSizeConfig(**said)


def test_a_models_grids_go_with_its_processors():
    """LLaVA-NeXT counts tiles by its config: with other grids it would refuse the images."""
    tiles = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2}  # fmt: skip
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**tiles, image_size=processors.SIDE, patch_size=8),
        text_config=LlamaConfig(**tiles, vocab_size=400),
        image_grid_pinpoints=processors.PINPOINTS,
        image_token_index=3,
        vision_feature_layer=-1,
    )
    processor = fresh("llava_next")
    for wanted in (None, ImageSizeConfig(max_patches=2)):
        limit_processor(processor, wanted, "m")
        limit_config(config, wanted, "m")
        assert config.image_grid_pinpoints == processor.image_processor.image_grid_pinpoints
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(config).eval()
    inputs = Processing(processor)([processor.image_token], [[drawn(1, SIZE)]])
    inputs = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and "offset" not in k}
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


@pytest.fixture
def smolvlm_folder(tmp_path, tiny_model_dir, monkeypatch):
    """A folder whose processor has a setting for its size; the model is another one's."""
    found = fresh("smolvlm")

    def from_pretrained(name, **settings):
        assert "image_size" not in settings
        return copy.deepcopy(found)

    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    return str(tiny_model_dir)


def test_it_reaches_everything_that_loads_a_processor(smolvlm_folder):
    size = {"longest_edge": 32}
    source = ModelConfig(model=smolvlm_folder, image_size=size)
    plain = load_processor(ModelConfig(model=smolvlm_folder))
    found = load_processor(source)
    direct = load_pretrained_processor(smolvlm_folder, image_size=ImageSizeConfig(**size))
    assert processor_hash(found) == processor_hash(direct) != processor_hash(plain)
    assert load_model(source) is not None
    adapter = MmkdModel(smolvlm_folder, device="cpu", image_size=ImageSizeConfig(**size))
    assert processor_hash(adapter.processor) == processor_hash(found)


def test_old_recipes_stay_the_same_and_a_student_of_a_run_has_its_size():
    from mmkd.students import written_config

    raw = {
        "name": "a",
        "teacher": {"model": "t", "image_size": {"max_patches": 3}},
        "student": {"model": "s", "image_size": {"max_pixels": 900}},
        "data": {"train": "d.json"},
        "stages": [{"name": "x", "objectives": [{"kind": "kl"}], "steps": 1}],
    }
    recipe = load_recipe(json.loads(json.dumps(raw)))
    assert (recipe.teacher.image_size.max_patches, recipe.student.image_size.max_pixels) == (3, 900)
    assert written_config(recipe.student, SimpleNamespace()).image_size is None
    del raw["teacher"]["image_size"], raw["student"]["image_size"]
    assert load_recipe(raw).student.image_size is None
