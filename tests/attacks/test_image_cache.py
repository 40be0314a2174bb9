"""The image cache returns exactly what was stored; a full disk is a one-line error."""

import errno
import json

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mmkd.data import image_cache
from mmkd.data.encoder import Encoder
from mmkd.data.records import Records
from mmkd.errors import CheckpointError
from mmkd.recipe import DataConfig
from tests.support.layouts import turns
from tests.support.processors import FAMILIES

FAMILY = ["llava", "qwen"]


def zeroed(path):
    content = bytearray(path.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[begin:] = bytes(len(content) - begin)
    path.write_bytes(content)


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


def rewritten(change):
    def damage(path):
        with safe_open(path, "np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = dict(file.metadata())
        save_file(arrays, path, change(said))

    return damage


DAMAGE = {
    "zeroed": zeroed,
    "one bit": one_bit,
    "cut": cut,
    "zeros": zeros,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("hello"),
    "another hash": rewritten(lambda said: {**said, "mmkd_hash": "00", image_cache.HASH: "00"}),
    "another list": rewritten(lambda said: {**said, "lists": '{"x": [1]}'}),
    "no checksum": rewritten(lambda said: {k: v for k, v in said.items() if k != "checksum"}),
    "nothing said": rewritten(lambda said: {}),
}


@pytest.fixture
def folder(tmp_path):
    Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "a.png")
    rows = [{"id": "1", "image": "a.png", "conversations": turns("<image>?", "yes")}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    return tmp_path


def encoded(folder, family):
    config = DataConfig(train=str(folder / "a.json"), image_cache=str(folder / "kept"))
    encoder = Encoder(Records(config), FAMILIES[family](), config)
    sample = encoder.load(0)
    return encoder.batch([sample]).inputs, sample.key


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("family", FAMILY)
def test_a_damaged_file_is_made_again(folder, family, damage):
    wanted, key = encoded(folder, family)
    (path,) = (folder / "kept").rglob("*.safetensors")
    DAMAGE[damage](path)
    for _ in range(2):
        found, other = encoded(folder, family)
        assert other == key
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert image_cache._read(path) is not None


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system", "kept"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_ends_in_one_line_and_leaves_nothing(folder, monkeypatch, error):
    def full(arrays, path, said):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(image_cache, "save_file", full)
    with pytest.raises(CheckpointError, match=r"data\.image_cache") as refused:
        encoded(folder, "llava")
    assert "\n" not in str(refused.value)
    assert not [path for path in (folder / "kept").rglob("*") if path.is_file()]
