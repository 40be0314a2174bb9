"""What the doctor finds of the machine: kernels, processors, GPUs, folders and the Hub."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmkd.commands.doctor import (
    machine,
    places,
)
from mmkd.commands.doctor.checks import all_checks
from mmkd.commands.doctor.isolated import Check, Finding, run_isolated
from mmkd_models import kernels
from tests.support.packages import write_package


def test_kernels_are_those_that_students_call(monkeypatch):
    names = {owner for owner, _ in kernels.PACKAGES.values()}
    assert names <= {check.name for check in all_checks(Path("runs"))}
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    assert machine.kernel("mamba-ssm")[0].state == "missing"
    monkeypatch.setattr(machine, "find_spec", lambda name: "there")
    monkeypatch.setattr(kernels, "load", lambda name: print)
    monkeypatch.setattr(machine, "_version", lambda package: "2.3.2")
    (found,) = machine.kernel("mamba-ssm")
    assert found == Finding("ok", "2.3.2: mamba_chunk_scan_combined, selective_state_update")
    monkeypatch.setattr(kernels, "load", lambda name: ImportError("undefined\nsymbol"))
    (found,) = machine.kernel("causal-conv1d")
    assert found.state == "broken"
    assert found.detail.startswith("causal_conv1d_fn: ImportError: undefined symbol")


def test_flash_attention_and_triton_are_imported(tmp_path, monkeypatch):
    for name, run in (("flash_attn", machine.flash_attention), ("triton", machine.triton)):
        monkeypatch.setattr(machine, "find_spec", lambda name: None)
        assert run()[0].state == "missing"
        monkeypatch.setattr(machine, "find_spec", lambda name: "there")
        monkeypatch.syspath_prepend(tmp_path)
        write_package(tmp_path, name, "raise ImportError('built for another torch')")
        (row,) = run_isolated([Check("s", name, run)])
        assert (row.state, row.detail) == ("broken", "ImportError: built for another torch")


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_as_the_engine_sees_it(able, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    _, half = machine.cpu()
    assert half.state == ("ok" if able else "missing")
    assert ("precision" in half.hint) is not able


def test_gpus(monkeypatch):
    card = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "mem_get_info": lambda device: (60 * 2**30, 80 * 2**30),
        "get_device_capability": lambda device: (9, 0),
        "get_device_name": lambda device: "H100",
        "is_bf16_supported": lambda including_emulation: True,
    }
    for name, value in card.items():
        monkeypatch.setattr(torch.cuda, name, value)
    found = machine.gpus()
    assert [f.name for f in found] == ["GPU 0", "GPU 1"]
    assert found[0].detail == ("H100, 80 GiB, 60 GiB free, compute capability 9.0, bfloat16")


def test_a_driver_without_a_torch_for_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert machine.gpus()[0].state == "missing"
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    (found,) = machine.gpus()
    assert (found.state, found.hint) == ("broken", "pip install --force-reinstall torch")
    monkeypatch.setattr(torch.version, "cuda", "12.8")

    def init():
        raise RuntimeError("the driver is too old")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpus() == [
        Finding("broken", "RuntimeError: the driver is too old", "nvidia-smi")
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpus()[0].hint == "unset CUDA_VISIBLE_DEVICES"


def test_a_torch_without_a_grouped_product(monkeypatch):
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert machine.grouped_product()[0].state == "missing"


def test_the_output_folder(tmp_path, monkeypatch):
    (found,) = places.folder(tmp_path / "runs" / "deep")
    assert found.state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    (found,) = places.folder(tmp_path / "file")
    assert (found.state, found.detail) == ("broken", f"{tmp_path / 'file'}: Not a directory")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    (found,) = places.folder(tmp_path)
    assert found.state == "broken"
    assert found.hint == f"free space on the disk of {tmp_path}"


def test_the_hub(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    (found,) = places.hub()
    assert (found.state, found.hint) == ("missing", "unset HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (found,) = places.hub()
    assert found.state == "broken"
    assert found.detail.startswith("http://127.0.0.1:9 cannot be reached (")
    monkeypatch.setattr("mmkd.runtime.hub.ask", lambda endpoint: None)
    assert places.hub() == [Finding("ok", "http://127.0.0.1:9 answers")]


def test_a_token_is_not_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (found,) = places.login()
    assert found == Finding("ok", "a token is set by the environment")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert places.login()[0].state == "missing"
