"""Divergences of other libraries, called as their trainers call them.

    pip install -e '.[bench]' && pip install --no-deps torchtune==0.6.1 nvidia-modelopt

A method takes (kind, student hidden, student weight, teacher hidden, teacher weight, mask), all
[N, H], [V, H] and [N], and returns the mean over the mask; None where it has no such kind.
torchtune's and ModelOpt's modules are read from their files: importing the packages asks for
libraries that these functions do not use.
"""

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files, version
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
Method = Callable[..., Tensor | None]
BETA = {"kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # TRL's and Liger's convention
LIGER_CHUNK = 256
TUNE_CHUNKS = 8


def peers() -> tuple[dict[str, Method], dict[str, str]]:
    """The methods of the libraries that are installed, and the libraries' versions."""
    methods: dict[str, Method] = {}
    versions: dict[str, str] = {}
    for package, make in MAKERS.items():
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
        methods |= make()
    return methods, versions


def _labels(mask: Tensor) -> Tensor:
    return torch.where(mask, 0, -100)


def _trl() -> dict[str, Method]:
    from trl.experimental.gkd import GKDTrainer
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def dense(
        kind: str, hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor
    ) -> Tensor | None:
        if kind not in BETA:
            return None
        with torch.no_grad():
            theirs = (ht @ wt.t())[None]
        return GKDTrainer.generalized_jsd_loss(
            (hs @ ws.t())[None], theirs, labels=_labels(mask)[None], beta=BETA[kind]
        )

    def tiles(
        kind: str, hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor
    ) -> Tensor | None:
        if kind not in BETA:
            return None
        # Its trainer drops masked rows first on devices with Triton, as done here.
        found, _ = ChunkedDivergenceFunction.apply(
            hs[mask], ws, None, ht[mask], wt, None, BETA[kind]
        )
        return found.mean()

    return {"TRL dense": dense, "TRL tiles": tiles}


def _liger() -> dict[str, Method]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def chunked(
        kind: str, hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor
    ) -> Tensor | None:
        if kind not in BETA:
            return None
        loss = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=BETA[kind],
            compiled=False,
            chunk_size=LIGER_CHUNK,
        )
        return loss(hs, ws, ht, wt, _labels(mask))

    return {"Liger": chunked}


def _torchtune() -> dict[str, Method]:
    losses = _module("torchtune", "kd_losses.py")
    classes = {
        "kl": losses.ForwardKLWithChunkedOutputLoss,
        "reverse_kl": losses.ReverseKLWithChunkedOutputLoss,
    }

    def chunked(
        kind: str, hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor
    ) -> Tensor | None:
        """Its forward KL leaves the teacher's entropy out: a cross-entropy of the same gradient."""
        if kind not in classes:
            return None
        with torch.no_grad():
            theirs = [c @ wt.t() for c in ht[None].chunk(TUNE_CHUNKS, 1)]
        mine = [c @ ws.t() for c in hs[None].chunk(TUNE_CHUNKS, 1)]
        return classes[kind](TUNE_CHUNKS)(mine, theirs, _labels(mask)[None])

    return {"torchtune": chunked}


def _modelopt() -> dict[str, Method]:
    losses = _module("nvidia-modelopt", "distill/losses.py")

    def dense(
        kind: str, hs: Tensor, ws: Tensor, ht: Tensor, wt: Tensor, mask: Tensor
    ) -> Tensor | None:
        if kind != "kl":
            return None
        with torch.no_grad():
            theirs = ht @ wt.t()
        rows = losses.LogitsDistillationLoss(reduction="none")(hs @ ws.t(), theirs)
        return (rows * mask).sum() / mask.sum()

    return {"ModelOpt": dense}


def _module(package: str, end: str) -> Any:
    path = next(f for f in files(package) or [] if str(f).endswith(end)).locate()
    spec = spec_from_file_location(end.removesuffix(".py").replace("/", "_"), str(path))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKERS: dict[str, Callable[[], dict[str, Method]]] = {
    "trl": _trl,
    "liger-kernel": _liger,
    "torchtune": _torchtune,
    "nvidia-modelopt": _modelopt,
}
