"""Code of users that runs at moments of a stage."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkd.training.stage import Stage


class Callback:
    """Base of callbacks: each method is called at one moment of a stage, and does nothing here.

    With several processes, each process calls its own callbacks. An exception that a method raises
    ends the stage, after its newest checkpoint if it has one. Metrics are those of
    `metrics.jsonl`; do not change them.
    """

    def on_stage_begin(self, stage: "Stage") -> None:
        """Before the first step. `stage.config.name` is its name, `stage.steps` its last step,
        `stage.engine.model` the student."""

    def on_step_end(self, step: int, metrics: dict[str, Any]) -> None:
        """After the update of each step; the first one is 1."""

    def on_validation_end(self, step: int, metrics: dict[str, Any]) -> None:
        """After the held-out records were measured behind a step."""

    def on_stage_end(self, stage: "Stage", metrics: dict[str, Any]) -> None:
        """After the last step, with its metrics; the student is not written yet."""
