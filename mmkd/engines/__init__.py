"""Engines: what runs forward, backward and step of a student."""

from mmkd.engines.base import Engine, StepResult
from mmkd.engines.build import build_engine
from mmkd.engines.precision import choose_precision
from mmkd.engines.torch_engine import TorchEngine

__all__ = ["Engine", "StepResult", "TorchEngine", "build_engine", "choose_precision"]
