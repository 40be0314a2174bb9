"""The backend of a call, and mamba-ssm's kernels with Triton's interpreter."""

import contextlib
import json
import os
import subprocess
import sys
import types
from importlib.util import find_spec

import pytest
import torch

from mmkd.ops import causal_conv, causal_conv_step, ssd_scan, ssd_step
from mmkd_models import kernels
from tests.support.places import ROOT
from tests.support.recurrences import agree, conv_problem, conv_twin, leaves, problem, scan, twin


def test_kernels_that_cannot_run_say_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, dt, A, B, C = (t.float() for t in problem()[:5])
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        ssd_scan(x, dt, A, B, C, backend="triton")
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        causal_conv(x.flatten(2), torch.ones(64, 4), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"does not support torch\.float64"):
        ssd_scan(x.double(), dt, A, B, C, backend="triton")
    monkeypatch.setattr(kernels, "load", lambda kernel: ImportError("no module\nat all"))
    with pytest.raises(RuntimeError, match=r"needs mamba-ssm, .*no module.*pip install") as caught:
        ssd_scan(x, dt, A, B, C, backend="triton")
    assert "\n" not in str(caught.value)


def test_auto_takes_torch_on_the_cpu_even_if_kernels_are_there(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda kernel: pytest.fail("asked for a kernel"))
    scan([t.float() for t in problem()], "auto")


def conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
    """Stands in for causal-conv1d's kernel (CUDA only): its signature and its demands."""
    assert x.stride(1) == 1
    assert not (x.stride(2) % 8)
    assert not (x.stride(0) % 8)
    assert weight.is_contiguous()
    assert bias is None or bias.dtype == weight.dtype
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    y, _ = conv_twin(x.transpose(1, 2), weight, bias, activation, documents=seq_idx)
    return y.transpose(1, 2)


def conv1d_update(x, conv_state, weight, bias=None, activation=None):
    """As above; writes into the state."""
    assert conv_state.dtype == x.dtype
    y, new = conv_twin(x[:, None], weight, bias, activation, conv_state)
    conv_state.copy_(new)
    return y[:, 0]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_convolution_kernel_gets_what_it_asks_for(packed, with_state, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fakes = {"causal_conv1d_fn": conv1d_fn, "causal_conv1d_update": conv1d_update}
    monkeypatch.setattr(kernels, "load", fakes.get)
    ids = torch.tensor([4] * 2 + [0] * 1 + [4] * 20).expand(3, -1) if packed else None
    kwargs = {"activation": "silu", "documents": ids}
    tensors = conv_problem(4, 23)[: 4 if with_state else 3]

    def run(t):
        state = t[3] if with_state else None
        return causal_conv(*t[:3], initial_state=state, backend="triton", **kwargs)

    agree(run, lambda t: conv_twin(*t[:3], state=t[3] if with_state else None, **kwargs), tensors)
    x, weight, bias, state = (t.float() for t in conv_problem(4, 1))
    got = causal_conv_step(x[:, 0], state, weight, bias, activation="silu", backend="triton")
    want = causal_conv_step(x[:, 0], state, weight, bias, activation="silu")
    torch.testing.assert_close(got, want)


def test_ops_import_torch_only():
    code = "import sys, mmkd.ops; print({'transformers', 'mamba_ssm', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("triton") is None or find_spec("mamba_ssm") is None,
    reason="needs triton and mamba-ssm",
)
def test_kernels_of_mamba_ssm_under_the_interpreter():
    """The real kernels on the CPU, in a process of their own: they choose at import how to run."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "models")])
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    errors = json.loads(done.stdout.splitlines()[-1])
    print(errors)
    assert all(e < 1e-5 for case in errors for e in case["forward"])
    assert all(e < 1e-4 for case in errors for e in case["gradients"])


def interpreted() -> list[dict]:
    """Errors of the kernels against the float64 twins, relative to each tensor's largest entry."""
    import triton

    autotune = triton.autotune
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    torch.cuda.device = lambda *_: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=1)
    triton.autotune = lambda configs, **kwargs: autotune(configs[:1], **kwargs)
    kernels.CHUNK_SIZE = 16

    def errors(got, want):
        return [
            ((a.double() - b).abs().max() / b.abs().max()).item()
            for a, b in zip(got, want, strict=True)
        ]

    results = []
    ids = torch.tensor([[5] * 7 + [2] * 14])
    for form, documents in (((2, 1, 2), None), ((2, 2, 2), ids), ((2, 1, 4), None)):
        tensors = problem(form, length=21, batch=1, size=16)
        exact, single = leaves(tensors), leaves(tensors, torch.float32)
        want = twin(*exact, documents=documents)
        got = scan(single, "triton", documents=documents)
        grads = [
            torch.autograd.grad(sum(o.sin().sum() for o in out), ins)
            for out, ins in ((got, single), (want, exact))
        ]
        results.append({"forward": errors(got, want), "gradients": errors(*grads)})
        if form[2] > form[0]:
            continue
        for skip in (True, False):
            with torch.no_grad():
                x, dt, A, B, C, D, state = single
                first = [x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], state]
                got = ssd_step(*first, D=D if skip else None, backend="triton")
                x, dt, A, B, C, D, state = exact
                first = [t[:, :1] for t in (x, dt)] + [A] + [t[:, :1] for t in (B, C)]
                y, state = twin(*first, D if skip else None, state)
            results.append({"forward": errors(got, (y[:, 0], state)), "gradients": []})
    return results


if __name__ == "__main__":
    print(json.dumps(interpreted()))
