"""Settings of the objectives on output distributions, as a recipe writes them."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mmkd.objectives.base_settings import HeadObjectiveConfig, Need, ObjectiveConfig, Region
from mmkd.runtime.fields import LEAST_TEMPERATURE


class CrossEntropyConfig(HeadObjectiveConfig):
    """Cross-entropy on the text of the data set."""

    needs: ClassVar[frozenset[Need]] = frozenset({"distribution"})

    kind: Literal["ce"] = "ce"
    region: Literal["response", "prompt"] = Field("response", description="tokens to predict")

    @property
    def learns_answers(self) -> bool:
        return True


class DivergenceConfig(HeadObjectiveConfig):
    """Divergence between the teacher's and the student's next-token distributions."""

    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "distribution"})

    kind: Literal[
        "kl",
        "reverse_kl",
        "jeffreys",
        "soft_reverse_kl",
        "hellinger",
        "pearson",
        "neyman",
        "tvd",
    ]
    region: Region = Field("response", description="tokens that it covers")
    temperature: float = Field(
        1.0, ge=LEAST_TEMPERATURE, le=1e6, description="divides both logits; no T^2 factor"
    )
    teacher_temperature: float | None = Field(
        None,
        ge=LEAST_TEMPERATURE,
        le=1e6,
        description="divides the teacher's logits in place of `temperature`",
    )
    top_k: int | None = Field(
        None, ge=1, le=10**6, description="compare only the teacher's k most likely tokens"
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="compare only the teacher's most likely tokens, up to this probability",
    )
    rest: Literal["cell", "drop"] = Field(
        "cell",
        description="cell: compare the total probability of the other tokens too; "
        "drop: compare only the distributions over the chosen tokens",
    )

    acceptance: bool = Field(
        False,
        description="report the share of the student's tokens that its teacher would accept in "
        "speculative decoding, 1 - tvd at temperature 1",
    )

    @property
    def temperature_of_teacher(self) -> float:
        """What divides the teacher's logits."""
        own = self.teacher_temperature
        return self.temperature if own is None else own

    @model_validator(mode="after")
    def _drops(self) -> "DivergenceConfig":
        if self.rest == "drop" and self.top_k == 1:
            raise ValueError("'rest: drop' with 'top_k: 1' compares nothing -- raise 'top_k'")
        return self


class JsdConfig(DivergenceConfig):
    """Generalised Jensen-Shannon divergence."""

    kind: Literal["jsd"]  # type: ignore[assignment]
    beta: float = Field(0.5, ge=0, le=1, description="weight of the teacher in the mixture")


class SkewConfig(DivergenceConfig):
    """KL against a mixture of teacher and student."""

    kind: Literal["skew_kl", "skew_reverse_kl"]  # type: ignore[assignment]
    alpha: float = Field(0.1, ge=0, lt=1, description="skew")


class AlphaConfig(DivergenceConfig):
    """Amari's alpha divergence, between `reverse_kl` (0) and `kl` (1) and beyond."""

    kind: Literal["alpha"]  # type: ignore[assignment]
    alpha: float = Field(0.5, ge=-5, le=5, description="order of the divergence")


class BalancedKlConfig(DivergenceConfig):
    """Sum of both KL divergences, weighted by the difference of entropies of each token."""

    kind: Literal["balanced_kl"]  # type: ignore[assignment]
    kappa: float = Field(
        1.0,
        ge=1e-3,
        le=1e6,
        description="difference of entropies, in nats, that shifts the weights from 1 and 1 to "
        "0.54 and 1.46; large values give `jeffreys`",
    )
    sign: Literal[1, -1] = Field(
        1,
        description="1: more weight of the reverse KL where the student has the larger entropy; "
        "-1: more weight of the forward KL",
    )


class EnhancedConfig(DivergenceConfig):
    """KL against a teacher whose probability of the next token of the text is increased."""

    kind: Literal["enhanced"]  # type: ignore[assignment]
    region: Literal["response", "prompt"] = Field("response", description="tokens that it covers")
    gamma: float = Field(
        1.0, ge=0.1, le=10, description="exponent of the probabilities; 1 has the gradient of `kl`"
    )

    @property
    def learns_answers(self) -> bool:
        return self.gamma != 1


class SinkhornConfig(ObjectiveConfig):
    """Optimal transport between groups of distributions."""

    needs: ClassVar[frozenset[Need]] = frozenset({"teacher", "distribution"})

    kind: Literal["sinkhorn"]
    region: Region = Field("response", description="tokens that it covers")
    group: int = Field(
        16,
        ge=1,
        le=32,
        description="tokens of a record that are transported together; the last group of a record "
        "may be smaller",
    )
    temperature: float = Field(
        1.0, ge=LEAST_TEMPERATURE, le=1e6, description="divides both logits; no T^2 factor"
    )
    epsilon: float = Field(
        0.1, ge=1e-3, le=1e3, description="weight of the entropic term; costs are between 0 and 2"
    )
    iterations: int = Field(20, ge=1, le=1000, description="updates of the potentials")

    @property
    def compares_outputs(self) -> bool:
        return True
