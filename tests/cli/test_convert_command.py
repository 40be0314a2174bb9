"""`mmkd convert` writes a student's folder, or prints a one-line error."""

import json
import shutil
import sys

import pytest
import torch

from mmkd.cli import main
from mmkd.modeling.loading import load_pretrained, load_pretrained_processor
from mmkd_models.layout import mamba_layers


@pytest.fixture
def command(tiny_model_dir, tmp_path, monkeypatch):
    """Run `mmkd convert` on a copy of a tiny model (two decoder layers)."""
    shutil.copytree(tiny_model_dir, tmp_path / "model")

    def call(*words, model=tmp_path / "model", out=tmp_path / "student"):
        monkeypatch.setattr(sys, "argv", ["mmkd", "convert", str(model), "--out", str(out), *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code

    return call


def test_a_folder_is_converted(command, tmp_path, capsys):
    words = ("--keep-attention", "every:2", "--init", "exact", "rope=false", "d_conv=3")
    assert command(*words) == 0
    said = capsys.readouterr().out
    assert "Mamba-2 mixers (exact) in layers [1], attention in [0]" in said
    assert "inherited: q_proj.weight" in said
    assert "new: conv_weight" in said
    student = load_pretrained(str(tmp_path / "student"))
    assert mamba_layers(student.config) == (1,)
    layout = json.loads((tmp_path / "student" / "config.json").read_text())["layout"]["mamba"]
    assert (layout["rope"], layout["d_conv"]) == (False, 3)
    assert load_pretrained_processor(str(tmp_path / "student")).chat_template


@pytest.mark.parametrize("mamba", [[], ["--layers", "0"]], ids=["sparse", "sparse hybrid"])
def test_experts(command, tmp_path, capsys, mamba):
    assert command("--experts", "3", "--top-k", "1", "--sparse-layers", "odd", *mamba) == 0
    assert "3 experts, top 1, in layers [1]" in capsys.readouterr().out
    layout = load_pretrained(str(tmp_path / "student")).config.layout
    assert layout["moe"] == {"layers": [1], "experts": 3, "top_k": 1}
    assert ("mamba" in layout) == bool(mamba)


def test_the_seed_decides_what_is_new(command, tmp_path):
    def weights(name, seed):
        out = tmp_path / name
        command("--layers", "0", "--init", "default", "--seed", seed, out=out)
        return load_pretrained(str(out)).state_dict()

    first, again, other = weights("a", "1"), weights("b", "1"), weights("c", "2")
    assert all(torch.equal(first[n], again[n]) for n in first)
    changed = {n for n in first if not torch.equal(first[n], other[n])}
    assert changed
    assert all(".layers.0.self_attn." in n for n in changed)


BAD = [
    ([], ["give either 'keep_attention' or 'layers'"]),
    (["--keep-attention", "none", "--layers", "0"], ["either 'keep_attention' or 'layers'"]),
    (["--keep-attention", "half"], ["cannot read 'half'", "every:4"]),
    (["--keep-attention", "every:1"], ["all 2 layers keep their attention"]),
    (["--layers", "2"], ["cannot select layers [2] of 2"]),
    (["--keep-attention", "none", "--init", "mimik"], ["'mimic'", "got 'mimik'"]),
    (["--keep-attention", "none", "--dtype", "int8"], ["dtype", "'float16'", "got 'int8'"]),
    (["--keep-attention", "none", "ropee=false"], ["ropee: unknown key", "'rope'"]),
    (["--keep-attention", "none", "rope"], ["key.path=value"]),
    (["--keep-attention", "none", "d_state=1"], ["d_state 1 is less than the head size"]),
    (
        ["keep_attention={every: 0}"],
        ["keep_attention.every", "equal to 1", "got 0"],
    ),
    (["--experts", "1"], ["experts", "equal to 2", "got 1"]),
    (["--experts", "2", "--top-k", "3"], ["top_k 3 is more than the 2 experts"]),
    (["--experts", "2", "--sparse-layers", "7"], ["cannot select layers [7] of 2"]),
    (["keep_attention={evry: 2}"], ["keep_attention.every: this key is missing"]),
]


@pytest.mark.parametrize(("words", "parts"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_a_bad_command_is_one_line_and_leaves_nothing(command, tmp_path, capsys, words, parts):
    assert command(*words) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("mmkd: ")
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_there_stays(command, tmp_path, capsys):
    taken = tmp_path / "student"
    taken.mkdir()
    (taken / "mine.txt").write_text("kept")
    assert command("--keep-attention", "none") == 2
    assert "it is there already" in capsys.readouterr().err
    assert (taken / "mine.txt").read_text() == "kept"


def test_a_model_that_is_not_there(command, tmp_path, capsys):
    assert command("--keep-attention", "none", model=tmp_path / "nowhere") == 2
    assert "nowhere: no such model folder" in capsys.readouterr().err
