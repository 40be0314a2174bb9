"""A student that ends at an exit has the exit's output."""

import re
import shlex
import sys

import pytest
import torch
from safetensors.torch import save_file

from mmkd.cli import main
from mmkd.errors import MmkdError, RecipeError
from mmkd.modeling.capture import capture
from mmkd.modeling.capture_request import CaptureRequest
from mmkd.modeling.loading import load_model
from mmkd.objectives import build_objective
from mmkd.objectives.exit_settings import ExitsConfig
from mmkd.recipe import EarlyExitConfig, ModelConfig, load_recipe
from mmkd.runs import pipeline
from mmkd.runs.reads import reads_of
from mmkd.runtime.files import read_json
from mmkd.students import convert
from mmkd.training.objective_modules import build_own, write_own
from tests.support import families
from tests.support.places import DOCS
from tests.support.recipes import tiny_recipe


def trained(model, path, **settings):
    """The exit of an objective whose own parameters differ from the model's, and its file."""
    objective = build_objective(ExitsConfig(kind="exits", layers=[1], **settings))
    own = build_own([objective], model, None)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.mul_(1.5)
    write_own(path, own.state_dict())
    return objective.exits[0]


@pytest.mark.parametrize(
    "settings", [{}, {"norm": "own"}, {"block": True}, {"norm": "own", "block": True}]
)
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_its_output_is_that_of_the_exit(name, settings, tmp_path):
    model, inputs = families.make(name), families.inputs(name, [5, 9])
    file = tmp_path / "objectives.safetensors"
    place = trained(model, file, **settings)
    with torch.no_grad():
        want = capture(model, inputs, CaptureRequest(exits=(place,))).exits[place].hidden
    objectives = str(file) if settings else None
    report = convert(model, EarlyExitConfig(kind="early_exit", layer=1, objectives=objectives))
    with torch.no_grad():
        signals = capture(model, inputs)
    assert torch.equal(signals.hidden, want)
    assert len(report.lines) == 1 + len(settings)


def test_runs_and_commands_make_it_from_a_finished_stage(
    scenes_dir, tiny_model_dir, tmp_path, monkeypatch
):
    """The exit's loss falls, and the second run begins with what the first one has trained."""
    exits = {"kind": "exits", "layers": [0], "loss": "ce", "norm": "own", "weighting": "equal"}
    stage = {"objectives": [exits], "steps": 12, "optimizer": {"lr": 1e-2}}
    first = pipeline.run(load_recipe(tiny_recipe(scenes_dir, tiny_model_dir, tmp_path,
                                                 name="whole", stage=stage)))  # fmt: skip
    done = first / "01-mimic"
    end = {"kind": "early_exit", "layer": 0, "objectives": str(done / "objectives.safetensors")}
    raw = tiny_recipe(scenes_dir, tiny_model_dir, tmp_path, name="early", stage={"steps": 1})
    page = (DOCS / "methods" / "exits.md").read_text()
    words = re.search(r"^mmkd (convert .*?)^```", page, re.M | re.S)
    typed = words[1].replace("runs/NAME", str(first)).replace("layer: 11", "layer: 0")
    typed = typed.replace("--out small", f"--out {tmp_path / 'small'}")
    monkeypatch.setattr(sys, "argv", ["mmkd", *shlex.split(typed.replace("\\\n", ""))])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    raw["student"] = {"model": str(done / "student"), "convert": [end]}
    folder = pipeline.run(load_recipe(raw))
    noted = read_json(folder / "00-start" / "inputs.json")["files"]
    assert {end["objectives"], str(done / "student" / "config.json")} <= noted.keys()
    in_a_stage = {**raw, "student": {"model": str(tiny_model_dir)}}
    in_a_stage["stages"] = [{**raw["stages"][0], "convert": [end]}]
    recipe = load_recipe(in_a_stage)
    assert end["objectives"] in reads_of(recipe, 0, recipe.student).files
    started = load_model(ModelConfig(model=str(folder / "00-start" / "student")))
    assert started.config.text_config.num_hidden_layers == 1
    whole = load_model(ModelConfig(model=str(done / "student")))
    convert(whole, EarlyExitConfig(**end))
    written = load_model(ModelConfig(model=str(tmp_path / "small")))
    for same in (whole, written):
        pairs = zip(started.parameters(), same.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)


@pytest.mark.parametrize(
    ("settings", "content", "message"),
    [
        ({"layer": 9}, None, "no decoder layer 9, the model has 4"),
        ({"layer": 1, "objectives": "missing"}, None, "cannot be read"),
        ({"layer": 1, "objectives": "file"}, b"not tensors", "cannot be read"),
        ({"layer": 2, "objectives": "file"}, {"exits.1.norm.weight": 1}, "no exit exits after"),
        ({"layer": 1, "objectives": "file"}, {"kl.1.norm.weight": 1}, "no exit exits after"),
        ({"layer": 1, "objectives": "file"}, {"exits.1.other.weight": 1}, "no exit exits after"),
        ({"layer": 3, "objectives": "file"}, {"exits.3.block.w": 1}, "weights of no next layer"),
        ({"layer": 1, "objectives": "file"}, {"exits.1.norm.weight": 3}, "exit of another model"),
        ({"layer": 1, "objectives": "file"}, {"exits.1.norm.bias": 32}, "exit of another model"),
    ],
)
def test_what_is_no_exit_is_refused(settings, content, message, tmp_path):
    file = tmp_path / "file"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        save_file({k: torch.ones(v) for k, v in content.items()}, file)
    if "objectives" in settings:
        settings = {**settings, "objectives": str(tmp_path / settings["objectives"])}
    with pytest.raises(MmkdError, match=message):
        convert(families.make("llava"), EarlyExitConfig(kind="early_exit", **settings))


def test_a_hybrid_is_not_cut():
    from mmkd.recipe import MambaConfig

    model = families.make("llava")
    convert(model, MambaConfig(kind="mamba", layers=[1], init="mimic"))
    with pytest.raises(RecipeError, match="cannot be cut"):
        convert(model, EarlyExitConfig(kind="early_exit", layer=1))


def test_a_block_before_further_image_features_is_refused(tmp_path):
    """Qwen3-VL adds image features after its first decoder layers."""
    model, file = families.make("qwen3_vl"), tmp_path / "objectives.safetensors"
    trained(model, file, block=True)
    model.config.vision_config.deepstack_visual_indexes = [0, 1, 2]
    end = EarlyExitConfig(kind="early_exit", layer=1, objectives=str(file))
    with pytest.raises(RecipeError, match="adds image features after layer 2"):
        convert(model, end)
