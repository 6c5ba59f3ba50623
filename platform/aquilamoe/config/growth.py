"""How a growth is done: from a dense model to a larger one, and to a Mixture of Experts."""

from typing import Any, Literal, Self, get_args

from pydantic import field_validator, model_validator

from aquilamoe.config import plugins
from aquilamoe.config.messages import nearest
from aquilamoe.config.network import Config, Fraction, ModelConfig, NonNegativeFloat, NonNegativeInt

DepthRule = Literal["interpolate", "stack", "stack_top"]


class GrowthConfig(Config):
    """How a dense model becomes a larger dense model (METHODS: width, depth)."""

    method: str  # a file in growth/methods
    scope: Literal["all", "inner", "transplant"]
    norm: Literal["exact", "zero_pad", "copy"]
    maps: Literal["circular", "sampled"]
    noise: NonNegativeFloat
    depth: DepthRule | tuple[NonNegativeInt, ...]  # a list is the source's layer of every target layer
    new_layers: Literal["copy", "zero", "scaled"]

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: str) -> str:
        return plugins.check("growth/methods", method)

    @field_validator("depth", mode="before")
    @classmethod
    def _check_depth(cls, depth: Any) -> Any:
        """One line instead of a problem for each member of the union."""
        if isinstance(depth, str) and depth not in get_args(DepthRule):
            raise ValueError(f"'{depth}' is not a choice; {nearest(depth, get_args(DepthRule))}, or a list of layers")
        if not isinstance(depth, str) and not (
            isinstance(depth, (list, tuple)) and all(type(layer) is int and layer >= 0 for layer in depth)
        ):
            raise ValueError(f"{depth!r} is not a list of layers counted from 0; write e.g. [0, 0, 1, 2]")
        return depth

    def grown_eps(self, source: ModelConfig, hidden_size: int) -> float:
        """`rms_norm_eps` of the target: a norm over padded channels divides by a smaller mean square (METHODS 2)."""
        if self.norm != "zero_pad":
            return source.rms_norm_eps
        copied = hidden_size // source.hidden_size * source.hidden_size
        return source.rms_norm_eps * copied / hidden_size


class UpcyclingConfig(Config):
    """How a dense model becomes a Mixture of Experts (METHODS: Scale-Out)."""

    method: Literal["copy", "noise", "drop", "permute"]
    noise: NonNegativeFloat
    drop_ratio: Fraction
    router_init: Literal["normal", "variance", "orthogonal", "zero"]
    router_std: NonNegativeFloat

    @model_validator(mode="after")
    def _check_amounts(self) -> Self:
        for method, field in (("noise", "noise"), ("drop", "drop_ratio")):
            amount = getattr(self, field)
            if (self.method == method) != (amount > 0):
                raise ValueError(
                    f"method {self.method} with {field} {amount}; {field} is > 0 for '{method}' and 0 for the others"
                )
        return self


GROWTH_KINDS = ("scale_up", "scale_out")
