"""What mmkd works with where it is installed: processors' packages, trackers, lmms-eval,
DeepSpeed."""

import importlib
import importlib.metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mmkd.commands.doctor.isolated import Finding
from mmkd.commands.doctor.packages import unmet
from mmkd.evaluation.install import LMMS_EVAL

if TYPE_CHECKING:
    from mmkd.recipe import TrackerName

TRACKERS: "tuple[TrackerName, ...]" = ("tensorboard", "wandb", "trackio")


def num2words() -> list[Finding]:
    if find_spec("num2words") is None:
        return [Finding("missing", "for SmolVLM2's processor")]
    return [Finding("ok", importlib.metadata.version("num2words"))]


def tracker(name: "TrackerName") -> list[Finding]:
    if find_spec(name) is None:
        return [Finding("missing", f"for report_to: {name}")]
    from mmkd.training.trackers import MODULES

    importlib.import_module(MODULES[name])
    return [Finding("ok", importlib.metadata.version(name))]


def lmms_eval() -> list[Finding]:
    """The version that mmkd's adapter is written for, with what it imports."""
    if find_spec("lmms_eval") is None:
        return [Finding("missing", "for mmkd eval and a recipe's evaluate")]
    version = importlib.metadata.version("lmms-eval")
    if version != LMMS_EVAL:
        return [Finding("broken", f"{version}, and mmkd's adapter is for {LMMS_EVAL}")]
    lost = unmet("eval")
    if lost:
        return [Finding("broken", ", ".join(lost))]
    importlib.import_module("lmms_eval.evaluator")
    return [Finding("ok", version)]


def registered() -> list[Finding]:
    """lmms-eval finds mmkd's model by name, and its class can be imported."""
    if find_spec("lmms_eval") is None:
        return []
    points = importlib.metadata.entry_points(group="lmms_eval.models")
    if "mmkd" not in points.names:
        return [Finding("missing", "mmkd's entry point is not installed")]
    from lmms_eval.models import get_model

    found = get_model("mmkd")
    return [Finding("ok", f"{found.__module__}.{found.__qualname__}")]


def deepspeed() -> list[Finding]:
    """One step of ZeRO 2 on one process, through what a stage's engine is built with."""
    if find_spec("deepspeed") is None:
        return [Finding("missing", "for engine.kind: deepspeed")]
    import torch

    from mmkd.engines.deepspeed_config import resolve
    from mmkd.engines.zero import start
    from mmkd.recipe import StageConfig
    from mmkd.runtime.distributed import choose_device

    device = choose_device("auto")
    settings = {"name": "doctor", "steps": 1, "objectives": [{"kind": "ce"}]}
    stage = StageConfig.model_validate({**settings, "engine": {"kind": "deepspeed", "zero": 2}})
    model = torch.nn.Linear(4, 4).to(device)
    before = model.weight.detach().clone()
    engine, *_ = start(device).initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters()), config=resolve(stage)
    )
    engine.backward(engine(torch.ones(2, 4, device=device)).square().mean())
    engine.step()
    if model.weight.equal(before):
        return [Finding("broken", "a step of ZeRO 2 changed nothing")]
    version = importlib.metadata.version("deepspeed")
    return [Finding("ok", f"{version}, a step of ZeRO 2 ran on {device.type}")]
