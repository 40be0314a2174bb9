"""How processes find each other."""

from unittest import mock

import pytest
import torch

from mmkd.runtime import distributed


def test_each_process_exchanges_on_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL takes the current GPU for objects; two processes on one GPU are an error of NCCL."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    chosen: list[object] = []
    with (
        mock.patch.object(torch.cuda, "set_device", chosen.append),
        mock.patch.object(distributed.dist, "init_process_group") as begin,
        mock.patch.object(distributed.dist, "is_initialized", return_value=False),
    ):
        distributed.connect(torch.device("cuda", 1))
        distributed.connect(torch.device("cpu"))
    assert chosen == [torch.device("cuda", 1)]
    assert [call.args for call in begin.call_args_list] == [("nccl",), ("gloo",)]
