"""Engines: what runs forward, backward and step of a student."""

from mmkd.engines.base import Engine, StepResult
from mmkd.engines.precision import choose_precision
from mmkd.engines.torch_engine import TorchEngine

__all__ = ["Engine", "StepResult", "TorchEngine", "choose_precision"]
