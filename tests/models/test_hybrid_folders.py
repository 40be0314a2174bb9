"""Folders of hybrid students: who may load them, and what is refused."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import PreTrainedConfig

from mmkd.errors import CheckpointError
from mmkd.modeling.loading import load_model, load_pretrained, skeleton
from mmkd.recipe import ModelConfig
from mmkd_models.configuration_mmkd import MmkdConfig
from mmkd_models.modeling_mmkd import MmkdForImageTextToText
from tests.support import families
from tests.support.hybrids import generate, student


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
        (lambda c: c.update(base_model_type="llama9"), "has no 'base_model_type' 'llama9'"),
        (lambda c: c.pop("layout"), "'layout' is missing"),
    ],
)
def test_a_layout_that_does_not_fit_its_weights_is_one_line(saved, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        load_pretrained(broken_config(saved, tmp_path, change))
    assert "\n" not in str(caught.value)


def test_half_precision_keeps_decay_and_step_size(saved):
    model = load_model(ModelConfig(model=str(saved), dtype="bfloat16"))
    mixer = model.model.language_model.layers[0].self_attn
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == mixer.D.dtype == torch.float32
    assert mixer.q_proj.weight.dtype == torch.bfloat16
    batch = families.inputs("llava", [5, 9])
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    assert model(**batch).logits.dtype == torch.bfloat16
    assert generate(model, batch, do_sample=False).sequences.shape == (2, 19)
