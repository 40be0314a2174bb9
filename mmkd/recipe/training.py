"""How a stage of a recipe trains: optimizer, schedule, batches, checkpoints and engine."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mmkd.errors import RecipeError
from mmkd.recipe.base import LocalPath, Strict
from mmkd.runtime.fields import MOST, NAME

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Strict):
    """The optimizer; weight decay applies to matrices, not to norms and biases."""

    kind: Literal["adamw", "adam", "sgd", "adafactor"] = Field("adamw", description="algorithm")
    lr: float = Field(
        2e-5, ge=1e-12, le=100, description="learning rate, the highest of the schedule"
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.95), description="of adamw and adam")
    eps: float = Field(1e-8, ge=1e-20, le=1, description="of adamw and adam")
    weight_decay: float = Field(0.0, ge=0, le=100, description="of matrices")
    momentum: float = Field(0.0, ge=0, lt=1, description="of sgd")
    max_grad_norm: float = Field(
        1.0, ge=0, le=1e9, description="gradients are clipped to this norm; 0: no clipping"
    )


class ScheduleConfig(Strict):
    """Learning rate over the steps of a stage."""

    kind: Literal["cosine", "wsd", "linear", "constant"] = Field("cosine", description="shape")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    decay: float = Field(0.2, ge=0, lt=1, description="share of the steps at the end, for wsd")
    min_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate, divided by lr")


SIZE = 8


MOST_RECORDS = 10**7  # of an optimizer step, because each step makes a list of its records


class BatchConfig(Strict):
    """A step has size x accumulate x processes records, or `total` on any number of processes."""

    size: int = Field(SIZE, ge=1, le=10**6, description="records of a micro-batch on one process")
    accumulate: int = Field(
        1, ge=1, le=10**6, description="micro-batches per optimizer step and process"
    )
    group_by_length: bool = Field(
        True, description="put records of similar length into the same micro-batch of a step"
    )
    pack: int | None = Field(
        None,
        ge=1,
        le=10**7,
        description="concatenate the records of a micro-batch into rows of at most this "
        "many tokens; records do not see each other",
    )
    total: int | None = Field(
        None, ge=1, le=MOST, description="records per optimizer step; instead of accumulate"
    )
    tokens: int | None = Field(
        None,
        ge=1,
        le=MOST,
        description="largest number of tokens of a micro-batch, padding included; with "
        "total, instead of size",
    )

    @model_validator(mode="after")
    def _one_count(self) -> "BatchConfig":
        if self.total is not None and self.accumulate != 1:
            raise ValueError("both are given -- give either 'accumulate' or 'total'")
        if self.tokens is not None and self.size != SIZE:
            raise ValueError("both are given -- give either 'size' or 'tokens'")
        if self.tokens is not None and self.total is None:
            raise ValueError("'tokens' needs 'total' -- add it: records per optimizer step")
        records = self.total or self.size * self.accumulate
        if records > MOST_RECORDS:
            raise ValueError(
                f"{records:,} records per optimizer step -- give at most {MOST_RECORDS:,}"
            )
        return self

    def records_per_step(self, processes: int) -> int:
        """Records per optimizer step.

        Raises:
            RecipeError: `total` is not divisible.
        """
        if self.total is None:
            return self.size * self.accumulate * processes
        least = processes * (self.size if self.tokens is None else 1)
        if self.total % least:
            size = "" if self.tokens is not None else f"size {self.size} x "
            raise RecipeError(
                f"total {self.total} is not a multiple of {size}{processes} processes",
                where="stages.batch",
                hint="change one of them",
            )
        return self.total

    def micro_steps(self, processes: int) -> int | None:
        """Micro-batches per optimizer step and process; None with `tokens`, which decides it for
        each step."""
        if self.tokens is not None:
            return None
        return self.records_per_step(processes) // (self.size * processes)

    def micro_batch(self, length: float) -> float:
        """Number of records of `length` tokens in a micro-batch."""
        return self.size if self.tokens is None else max(1.0, self.tokens / length)


class CheckpointConfig(Strict):
    """Checkpoints, from which an unfinished stage resumes."""

    interval: int = Field(200, ge=1, le=MOST, description="steps between checkpoints")
    keep_last: int = Field(1, ge=1, le=MOST, description="number of newest checkpoints to keep")


class EngineConfig(Strict):
    """The library that runs forward, backward and step, and its settings."""

    kind: Literal["torch", "deepspeed"] = Field("torch", description="library")
    device: str = Field("auto", max_length=NAME, description="auto, cpu, cuda, cuda:1, ...")
    zero: int | None = Field(
        None, ge=0, le=3, description="ZeRO stage of deepspeed; by default that of its file, else 2"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="keep optimizer states (zero >= 1), or also weights (zero 3), on the CPU",
    )
    config: LocalPath | None = Field(
        None, description="a DeepSpeed file; missing values come from the recipe"
    )
    head_memory: int = Field(
        112,
        ge=1,
        le=10**6,
        description="MiB for the logits of a chunk of rows and the tensors computed from them",
    )
    head_backend: Literal["auto", "torch"] = Field(
        "auto",
        description="implementation of cross-entropy and divergences on the head's output; "
        "auto: a Triton kernel on CUDA",
    )
    timeout_s: float = Field(
        1800.0,
        gt=0,
        le=1e7,
        description="seconds that a process waits for the others before it stops; the "
        "largest value of all stages is used",
    )

    @model_validator(mode="after")
    def _of_deepspeed(self) -> "EngineConfig":
        given = [n for n in ("zero", "config") if getattr(self, n) is not None]
        given += ["offload"] * (self.offload != "none")
        if self.kind == "torch" and given:
            raise ValueError(
                f"{given[0]!r} is for kind deepspeed, and the engine's kind is torch -- set 'kind: "
                "deepspeed', or leave it out"
            )
        return self
