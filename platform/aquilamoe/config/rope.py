"""How fast the pairs of a head turn: scalings of the rotary embedding, as transformers computes them.

Scalings stretch a context: `linear` (kaiokendev), `dynamic` (NTK, bloc97), `yarn` (arXiv 2309.00071), `longrope` (arXiv
2402.13753), and Llama 3.1's own.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from aquilamoe.config.numbers import Config, Float, Length

RopeType = Literal["linear", "dynamic", "yarn", "longrope", "llama3"]
# What each requires; the length that a model was trained at is that of config.json where it is missing.
NEEDED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
STRETCHED = ("yarn", "longrope", "llama3")  # those that know the length that a model was trained at
FIELDS: Mapping[str, frozenset[str]] = {
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "truncate"}
        | {"beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    ),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
}
TRAINED = ("linear", "yarn", "llama3")  # the same at every length: computed by training, evaluation and generation


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Positive = Annotated[Float, Field(gt=0.0, le=1e9)]
Factors = Annotated[tuple[Positive, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=2**12)]


class RopeScaling(Config):
    """A scaling of the rotary embedding, by transformers' names; each type has some of the fields."""

    model_config = ConfigDict(strict=True)

    rope_type: RopeType = Field(description="Type of the scaling; training computes linear, yarn and llama3")
    factor: Positive | None = Field(default=None, description="How many times longer the context becomes [ratio]")
    original_max_position_embeddings: Length | None = Field(
        default=None, description="Context before it was stretched; null: max_position_embeddings [tokens]"
    )
    low_freq_factor: Positive | None = Field(
        default=None, description="llama3: turns in the original context below which a pair is stretched [turns]"
    )
    high_freq_factor: Positive | None = Field(
        default=None, description="llama3: turns in the original context above which a pair is kept [turns]"
    )
    attention_factor: Positive | None = Field(
        default=None, description="Factor of cos and sin (yarn, longrope); null: follows from factor [dimensionless]"
    )
    beta_fast: Positive | None = Field(
        default=None, description="yarn: turns in the original context above which a pair is kept; null: 32 [turns]"
    )
    beta_slow: Positive | None = Field(
        default=None, description="yarn: turns in the original context below which a pair is stretched; null: 1 [turns]"
    )
    mscale: Positive | None = Field(
        default=None, description="yarn: weight of factor in the attention factor [dimensionless]"
    )
    mscale_all_dim: Positive | None = Field(
        default=None, description="yarn: weight of factor in what the attention factor is divided by [dimensionless]"
    )
    truncate: bool = Field(
        default=True, description="yarn: whether the range of stretched pairs is rounded to whole ones"
    )
    short_factor: Factors | None = Field(
        default=None, description="longrope: divisor of the frequency of each pair, up to the original context [ratios]"
    )
    long_factor: Factors | None = Field(
        default=None, description="longrope: the same beyond the original context [ratios]"
    )

    @model_validator(mode="after")
    def _check_fields(self) -> Self:
        missing = [name for name in NEEDED.get(self.rope_type, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(
                f"rope_type '{self.rope_type}' without '{missing[0]}'; take it from the model's config.json"
            )
        further = self.model_fields_set - FIELDS[self.rope_type] - {"rope_type"}
        useless = sorted(name for name in further if getattr(self, name) != type(self).model_fields[name].default)
        if useless:
            raise ValueError(f"{useless[0]} has no effect on rope_type '{self.rope_type}'; remove it")
        if self.rope_type == "llama3" and self.low_freq_factor == self.high_freq_factor:
            raise ValueError("low_freq_factor and high_freq_factor are equal; take them from the model's config.json")
        return self

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what is set: what a type does not have is in no recipe."""
        if not isinstance(self, RopeScaling):  # pydantic calls this for whatever is in its place, unchecked
            return dump(self)
        fields = type(self).model_fields
        return {key: value for key, value in dump(self).items() if getattr(self, key) != fields[key].default}

    def check(self, theta: float, head_dim: int) -> None:
        """Raise ValueError where a model has no frequencies; head_dim: channels of a head that rotate."""
        if self.rope_type == "yarn" and theta == 1.0:
            raise ValueError("rope_theta 1 leaves yarn no distinct frequencies; choose a larger rope_theta")
        for name in ("short_factor", "long_factor") if self.rope_type == "longrope" else ():
            count = len(getattr(self, name))
            if count != head_dim // 2:
                raise ValueError(
                    f"{name} has {count} numbers, {head_dim} rotating channels of a head are {head_dim // 2} pairs; "
                    "give a number for each pair"
                )

    def for_larger_heads(self, ratio: int) -> Self:
        """The scaling of heads `ratio` times as large: pair i becomes pair i * ratio, and turns as before."""
        longer = {
            name: tuple(each for each in getattr(self, name) for _ in range(ratio))
            for name in ("short_factor", "long_factor")
            if getattr(self, name) is not None
        }
        return self.model_copy(update=longer)

    def frequencies(self, theta: float, head_dim: int, max_positions: int, length: int) -> tuple[list[float], float]:
        """Compute how fast the pairs of a head turn.

        Args:
            theta: rope_theta of the model.
            head_dim: channels of a head.
            max_positions: max_position_embeddings of the model.
            length: tokens of the sequences; `dynamic` and `longrope` depend on it.

        Returns:
            Radians per position of every pair, and what cos and sin are multiplied by.
        """
        trained = self.original_max_position_embeddings or max_positions
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
            return self._yarn(theta, plain, factor, trained), self.attention_factor or self._yarn_attention(factor)
        if self.rope_type == "longrope":
            factors = self.long_factor if length > trained else self.short_factor
            assert factors is not None
            stretched = [frequency / each for frequency, each in zip(plain, factors, strict=True)]
            return stretched, self.attention_factor or _longrope_attention(factor, trained)
        return plain, 1.0  # dynamic

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

    def _yarn(self, theta: float, plain: list[float], factor: float, trained: int) -> list[float]:
        head_dim = 2 * len(plain)

        def pair_of(turns: float) -> float:
            return head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

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
