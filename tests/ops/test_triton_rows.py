"""The backend of losses on the head's output, and tests of the Triton kernel in subprocesses."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from mmkd.ops import Head, HeadLoss, backends, head_losses
from tests.support.heads import parts
from tests.support.places import ROOT, SUPPORT

with_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


@pytest.fixture
def call(monkeypatch):
    """Asks for a KL of float32 heads, on the CPU and with Triton's interpreter off."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    student, teacher, _ = parts(0)
    mine, theirs = (Head(*(x.detach().float() for x in some)) for some in (student, teacher))

    def kl(backend):
        return head_losses(mine, [HeadLoss("kl")], theirs, backend=backend)

    return kl


def test_auto_takes_torch_on_the_cpu(call, monkeypatch):
    monkeypatch.setattr(backends, "load", lambda device: pytest.fail("asked for the kernel"))
    assert call("auto")[0].item() == call("torch")[0].item() > 0


def test_a_kernel_that_cannot_run_says_so(call, monkeypatch):
    with pytest.raises(ValueError, match="one of auto, torch, triton"):
        call("cuda")
    with pytest.raises(ValueError, match="needs CUDA tensors, these are on cpu"):
        call("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends, "load", lambda device: ImportError("no module\nat all"))
    with pytest.raises(RuntimeError, match=r"does not run here \(no module\): ") as caught:
        call("triton")
    assert "\n" not in str(caught.value)


def test_a_kernel_that_fails_is_known_by_its_first_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "mmkd.ops.triton_rows", raising=False)
    assert isinstance(backends.load.__wrapped__(torch.device("cpu")), ImportError)


def run(chosen, folder, **environment):
    """This folder's cases in a process of their own; none may be skipped."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "models"), os.environ.get("PYTHONPATH", "")])
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(SUPPORT / "rows_on_triton.py")],
        env={**plain, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@with_triton
def test_kernel_under_the_interpreter(tmp_path):
    run("not compiles", tmp_path, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@with_triton
def test_kernel_compiles(tmp_path):
    run("compiles", tmp_path, CUDA_VISIBLE_DEVICES="")


@with_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernel_on_a_gpu(tmp_path):
    run("not compiles", tmp_path)
