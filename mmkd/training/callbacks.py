"""Callbacks: code of users that is called during a stage."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkd.training.stage import Stage


class Callback:
    """Base class of callbacks. The methods do nothing; override those that you need.

    With several processes, each process calls its own callbacks. An exception in a method ends the
    stage, which can resume from its newest checkpoint. Metrics are those of `metrics.jsonl`; do not
    change them.
    """

    def on_stage_begin(self, stage: "Stage") -> None:
        """Called before the first step. `stage.config.name` is the stage's name, `stage.steps` its
        last step, `stage.engine.model` the student."""

    def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
        """Called after the update of each step. Steps are counted from 1."""

    def on_validation_end(self, step: int, metrics: dict[str, Any]) -> None:
        """Called after the validation at a step."""

    def on_stage_end(self, stage: "Stage", metrics: dict[str, Any]) -> None:
        """Called after the last step, with its metrics, before the student is written."""
