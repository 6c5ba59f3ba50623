"""How fast the pairs of a head turn: rotary embeddings and their scalings, as transformers computes them. Torch-free.

Scalings stretch a context: `linear` (kaiokendev), `dynamic` (NTK, bloc97), `yarn` (arXiv 2309.00071), `longrope` (arXiv
2402.13753), and Llama 3.1's own.
"""

import math
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from aquilamoe.config.messages import UserError, first_problem
from aquilamoe.config.network import Length, RopeTheta

TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
# What each cannot do without; the length that a model was trained at is that of config.json where it is missing.
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
STRETCHED = ("yarn", "longrope", "llama3")  # those that know the length that a model was trained at


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number; give it one")
    return value


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0.0, le=1e9)]
Factors = Annotated[list[Positive], Field(fail_fast=True, min_length=1, max_length=2**12)]


class Rope(BaseModel):
    """Parameters of a rotary embedding, by transformers' names; the fields of other types are left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    rope_type: str
    rope_theta: RopeTheta
    factor: Positive | None = None
    original_max_position_embeddings: Length | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool = True
    short_factor: Factors | None = None
    long_factor: Factors | None = None

    @model_validator(mode="after")
    def _check_needed(self) -> Self:
        if self.rope_type not in TYPES:
            raise ValueError(
                f"rope_type '{self.rope_type}' is none of {', '.join(TYPES)}; choose a checkpoint with one of them"
            )
        missing = [name for name in NEEDED.get(self.rope_type, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"rope_type '{self.rope_type}' without '{missing[0]}'; use the checkpoint's own config.json"
            )
        if self.rope_type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ValueError("low_freq_factor and high_freq_factor are equal; use the checkpoint's own config.json")
        if self.rope_type == "yarn" and self.rope_theta == 1.0:
            raise ValueError("rope_theta 1 leaves yarn no distinct frequencies; use the checkpoint's config.json")
        return self

    def frequencies(self, head_dim: int, max_positions: int, length: int) -> tuple[list[float], float]:
        """Radians per position of every pair of a head, and what cos and sin are multiplied by.

        max_positions: max_position_embeddings of the model. length: of the sequences; two types look at it.
        """
        theta, trained = self.rope_theta, self.original_max_position_embeddings or max_positions
        factor = self.factor or max_positions / trained
        if self.rope_type == "dynamic" and length > max_positions and head_dim > 2:
            stretch = factor * length / max_positions - (factor - 1)
            theta *= stretch ** (head_dim / (head_dim - 2))
        plain = [theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
        if self.rope_type == "linear":
            return [frequency / factor for frequency in plain], 1.0
        if self.rope_type == "llama3":
            return [self._llama3(frequency, factor, trained) for frequency in plain], 1.0
        if self.rope_type == "yarn":
            return self._yarn(plain, factor, trained), self.attention_factor or self._yarn_attention(factor)
        if self.rope_type == "longrope":
            factors = self.long_factor if length > trained else self.short_factor
            assert factors is not None, "checked when it was read"
            stretched = [frequency / each for frequency, each in zip(plain, factors, strict=True)]
            return stretched, self.attention_factor or _longrope_attention(factor, trained)
        return plain, 1.0

    def _llama3(self, frequency: float, factor: float, trained: int) -> float:
        """Slow pairs by the factor, fast ones not at all, between them in between."""
        assert self.low_freq_factor is not None
        assert self.high_freq_factor is not None
        wavelength = 2 * math.pi / frequency
        if wavelength < trained / self.high_freq_factor:
            return frequency
        if wavelength > trained / self.low_freq_factor:
            return frequency / factor
        smooth = (trained / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return (1 - smooth) * frequency / factor + smooth * frequency

    def _yarn(self, plain: list[float], factor: float, trained: int) -> list[float]:
        head_dim = 2 * len(plain)

        def pair_of(turns: float) -> float:
            return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))

        low, high = pair_of(self.beta_fast or 32), pair_of(self.beta_slow or 1)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        if low == high:
            high += 0.001
        ramp = [min(max((pair - low) / (high - low), 0.0), 1.0) for pair in range(len(plain))]
        return [
            frequency / factor * share + frequency * (1 - share) for frequency, share in zip(plain, ramp, strict=True)
        ]

    def _yarn_attention(self, factor: float) -> float:
        if factor <= 1:
            return 1.0
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * math.log(factor) + 1) / (0.1 * self.mscale_all_dim * math.log(factor) + 1)
        return 0.1 * math.log(factor) + 1


def _longrope_attention(factor: float, trained: int) -> float:
    return 1.0 if factor <= 1 or trained <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))


def parse(parameters: dict[str, Any], head_dim: int, where: str) -> Rope:
    """Validate the rotary embeddings of config.json; UserError with one line for what cannot be computed."""
    try:
        rope = Rope.model_validate(parameters)
    except ValidationError as error:
        raise first_problem(error, Rope, parameters, where) from None
    for name in ("short_factor", "long_factor") if rope.rope_type == "longrope" else ():
        count = len(getattr(rope, name))
        if count != head_dim // 2:
            raise UserError(
                f"{where}: {name} has {count} numbers, head_dim {head_dim} has {head_dim // 2} pairs; use the "
                "checkpoint's own config.json"
            )
    return rope
