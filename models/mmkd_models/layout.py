"""The layout of a student: how its structure differs from its family's; stored in its config."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Activation = Literal["silu", "none"]
Norm = Literal["head_rms", "none"]
Gate = Literal["silu", "none"]
State = Literal["query", "kv"]


@dataclass(frozen=True)
class MambaLayout:
    """Which decoder layers have a Mamba-2 mixer instead of attention, and the mixer's settings.

    Attributes:
        layers: indices of the converted layers, ascending.
        d_conv: taps of the short causal convolution over q, k and v.
        d_state: state size N per head; the attention's head size if None.
        activation: after the convolution.
        norm: RMSNorm per head before the output projection.
        gate: silu(z) with z a projection of the input.
        norm_before_gate: norm(y) * silu(z) (mmMamba) instead of norm(y * silu(z)) (Mamba-2).
        rope: rotate keys and queries as the attention did.
        state: one state per query head, or one per key-value head that its query heads share.
    """

    layers: tuple[int, ...]
    d_conv: int = 4
    d_state: int | None = None
    activation: Activation = "silu"
    norm: Norm = "head_rms"
    gate: Gate = "silu"
    norm_before_gate: bool = False
    rope: bool = True
    state: State = "query"

    def __post_init__(self) -> None:
        for name, known in (
            ("activation", Activation),
            ("norm", Norm),
            ("gate", Gate),
            ("state", State),
        ):
            if getattr(self, name) not in get_args(known):
                value, choices = getattr(self, name), ", ".join(get_args(known))
                raise ValueError(f"layout: {name} {value!r} is none of {choices}")
        _check_ascending(self.layers)
        if self.d_conv < 1:
            raise ValueError(f"layout: d_conv {self.d_conv} is less than 1")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "MambaLayout":
        """Inverse of `to_dict`.

        Raises:
            ValueError: an unknown key or value.
        """
        return cls(**_known(cls, settings))

    def differences(self, other: "MambaLayout") -> list[str]:
        """Names of the settings in which two layouts differ, except `layers`."""
        names = [n for n in self.__dataclass_fields__ if n != "layers"]
        return [n for n in names if getattr(self, n) != getattr(other, n)]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


@dataclass(frozen=True)
class MoeLayout:
    """Which decoder layers have experts instead of a feed-forward network.

    Attributes:
        layers: indices of the sparse layers, ascending.
        experts: number of experts per layer.
        top_k: number of experts per token.
    """

    layers: tuple[int, ...]
    experts: int = 4
    top_k: int = 2

    def __post_init__(self) -> None:
        _check_ascending(self.layers)
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"layout: top_k {self.top_k} of {self.experts} experts")

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "MoeLayout":
        """Read what `to_dict` wrote.

        Raises:
            ValueError: a key is unknown, or a value is.
        """
        return cls(**_known(cls, settings))

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "layers": list(self.layers)}


def mamba_layers(config: Any) -> tuple[int, ...]:
    """Indices of the decoder layers with Mamba mixers; empty for a model without a layout."""
    return _layers_of(config, "mamba")


def moe_layers(config: Any) -> tuple[int, ...]:
    """Indices of the decoder layers with experts; empty for a model without a layout."""
    return _layers_of(config, "moe")


def _layers_of(config: Any, kind: str) -> tuple[int, ...]:
    layout = getattr(config, "layout", None) or {}
    return tuple(layout[kind]["layers"]) if kind in layout else ()


def _check_ascending(layers: tuple[int, ...]) -> None:
    if list(layers) != sorted(set(layers)) or any(i < 0 for i in layers):
        raise ValueError(f"layout: layers {list(layers)} are not ascending layer indices")


def _known(form: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Check the keys of settings, and make their layers a tuple."""
    unknown = sorted(set(settings) - set(form.__dataclass_fields__))
    if unknown or "layers" not in settings:
        raise ValueError(
            f"layout: unknown key {unknown[0]!r}" if unknown else "layout: 'layers' is missing"
        )
    return {**settings, "layers": tuple(settings["layers"])}
