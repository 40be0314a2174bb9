"""The causal convolution of every backend against its definition in float64."""

import pytest
import torch

from mmkd.ops import causal_conv, causal_conv_step
from mmkd_models import conv as conv_module
from tests.support.recurrences import (
    TOLERANCE,
    agree,
    backends,
    close,
    conv_problem,
    conv_twin,
    device_of,
)

conv_backends = backends("causal_conv1d_fn")


@conv_backends
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 50])
@pytest.mark.parametrize("packed", [False, True])
def test_convolution_equals_its_definition(backend, activation, width, length, packed, monkeypatch):
    monkeypatch.setitem(conv_module.BLOCK_ELEMENTS, "cpu", 256)
    if backend == "triton" and width == 1:
        pytest.skip("the kernel takes no width 1")
    ids = torch.tensor([4] * 1 + [0] * 2 + [4] * 47)[:length].expand(3, -1) if packed else None

    def run(t):
        documents = None if ids is None else ids.to(t[0].device)
        x, weight, bias, *state = t
        return causal_conv(
            x,
            weight,
            bias,
            activation=activation,
            initial_state=state[0] if state else None,
            documents=documents,
            backend=backend,
        )

    def reference(t):
        x, weight, bias, *state = t
        return conv_twin(x, weight, bias, activation, state[0] if state else None, ids)

    tensors = conv_problem(width, length)
    if width == 1:  # a state of width 0 has no gradient to compare
        state = tensors.pop()
        got, empty = causal_conv(*tensors, activation=activation, initial_state=state)
        close(got, conv_twin(*tensors, activation)[0], 1e-12)
        assert empty.shape == state.shape
        agree(lambda t: run(t)[:1], lambda t: reference(t)[:1], tensors, backend)
    else:
        agree(run, reference, tensors, backend)


@conv_backends
@pytest.mark.parametrize("width", [1, 2, 4])
def test_convolution_in_pieces_and_steps_equals_one_call(backend, width):
    if backend == "triton" and width == 1:
        pytest.skip("the kernel takes no width 1")
    x, weight, bias, state = (
        t.to(device_of(backend), torch.float32) for t in conv_problem(width, 20)
    )
    kwargs = {"activation": "silu", "backend": backend}
    want, final = causal_conv(x, weight, bias, initial_state=state, **kwargs)
    rows = []
    for piece in (x[:, :2], x[:, 2:3], x[:, 3:15]):
        y, state = causal_conv(piece, weight, bias, initial_state=state, **kwargs)
        rows.append(y)
    for t in range(15, 20):
        y, state = causal_conv_step(x[:, t], state, weight, bias, **kwargs)
        rows.append(y[:, None])
    close(torch.cat(rows, 1), want.double().cpu(), TOLERANCE[backend][0])
    close(state, final.double().cpu(), 1e-6)


def test_convolution_keeps_the_dtype_of_its_input():
    x, weight, bias, state = (t.float() for t in conv_problem(4, 9))
    with torch.autocast("cpu", torch.bfloat16):
        y, final = causal_conv(x.bfloat16(), weight, bias, initial_state=state)
        z, new = causal_conv_step(x[:, 0].bfloat16(), state, weight, bias)
    assert {t.dtype for t in (y, final, z, new)} == {torch.bfloat16}
    close(y, conv_twin(*(t.double() for t in (x, weight, bias)), state=state.double())[0], 2e-2)


def test_wrong_convolutions_get_one_line():
    x, weight, bias, state = conv_problem(4, 9)
    with pytest.raises(ValueError, match="activation is 'gelu'"):
        causal_conv(x, weight, activation="gelu")
    with pytest.raises(ValueError, match="weight must be"):
        causal_conv(x, weight[1:])
    with pytest.raises(ValueError, match="the state must be"):
        causal_conv_step(x[:, 0], state[..., 1:], weight, bias)
    with pytest.raises(ValueError, match=r"x must be \[B, C\]"):
        causal_conv_step(x, state, weight)
