"""How a growth is done: from a dense model to a larger one, and to a Mixture of Experts."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from aquilamoe.config import plugins
from aquilamoe.config.corpus import Extended
from aquilamoe.config.depth import RULES
from aquilamoe.config.messages import nearest
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.numbers import Config, Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat

DepthRule = Literal["interpolate", "stack", "stack_top"]


class GrowthConfig(Config):
    """How a dense model becomes a larger dense model."""

    method: str = Field(description="Growth method: the name of a file in growth/methods")
    scope: Literal["all", "inner", "transplant"] = Field(
        description="What AKI takes from the layer above. all: every new row | inner: new heads and neurons, not the "
        "rows that write to the residual stream | transplant: new heads and neurons with the weights that read them"
    )
    norm: Literal["exact", "zero_pad", "copy"] = Field(
        description="How channels are copied. exact: mean squares are kept at any ratio of hidden sizes | zero_pad: "
        "whole copies, the rest zeros; changes rms_norm_eps | copy: the paper's plain copies, exact at integer ratios"
    )
    maps: Literal["circular", "sampled"] = Field(
        description="Which units get further copies. circular: in order | sampled: random ones, equally many of each"
    )
    noise: NonNegativeFloat = Field(
        description="Noise on copied inputs, which cancels over the copies of a unit; 0: none [ratio to their RMS]"
    )
    depth: DepthRule | tuple[NonNegativeInt, ...] = Field(
        description="Which source layer each layer copies. interpolate: a copy beside its original | stack: the whole "
        "stack on top of itself | stack_top: as stack, a remainder repeats the top | a list of source layers, e.g. "
        "[0, 0, 1, 2], counted from 0"
    )
    new_layers: Literal["copy", "zero", "scaled"] = Field(
        description="Further copies of a layer. copy: unchanged | zero: their output starts at zero, which keeps the "
        "function | scaled: the copies share the layer's output"
    )

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

    def layer_sources(self, num_sources: int, num_targets: int) -> tuple[int, ...]:
        """Return the source's layer of every layer of a target with `num_targets`, by rule or as listed."""
        return RULES[self.depth](num_sources, num_targets) if isinstance(self.depth, str) else self.depth

    def grown_eps(self, source: ModelConfig, hidden_size: int) -> float:
        """`rms_norm_eps` of the target: a norm over padded channels divides by a smaller mean square (METHODS 2)."""
        if self.norm != "zero_pad":
            return source.rms_norm_eps
        copied = hidden_size // source.hidden_size * source.hidden_size
        return source.rms_norm_eps * copied / hidden_size


_OF_SPLIT = ("direction", "shift", "common_row")
_OF_MIX = ("texts", "shared", "weights", "ridge")
_FEWEST_TOKENS = 256
# What a method leaves out is as in its file in conf/upcycling.
_COMPLETE: dict[str, dict[str, Any]] = {
    "split": {"direction": "learned", "shift": 3.0, "calibration_tokens": 8192, "common_row": True},
    "mix": {"shared": "average", "ridge": 1e-3, "calibration_tokens": 8192},
}


class UpcyclingConfig(Extended):
    """How a dense model becomes a Mixture of Experts, several become one, or a mixture gets more experts."""

    method: Literal["copy", "noise", "drop", "permute", "split", "mix"] = Field(
        description="How experts differ at the start. copy: not at all | noise: each has its own noise | drop: each "
        "has some neurons initialised randomly | permute: each has its neurons in another order | split: not at all, "
        "and router rows of copies of an expert are shifted in opposite directions | mix: each is the feed-forward of "
        "another source"
    )
    noise: NonNegativeFloat = Field(
        description="Standard deviation of method noise; 0 for the others [ratio to the weights' standard deviation]"
    )
    drop_ratio: Fraction = Field(
        description="Neurons of each expert that method drop initialises randomly; 0 for the others [fraction]"
    )
    router_init: Literal["normal", "variance", "orthogonal", "zero", "hidden", "ridge"] = Field(
        description="Initial router weights. normal | variance: normal, router_std read as a variance | orthogonal: "
        "orthogonal rows of the same length | zero: the first experts get all tokens | ridge, of a mix: ridge "
        "regression of router inputs on which source's text they are of | hidden, of a mix: the mean router input of "
        "each source's text, less that of all"
    )
    router_std: NonNegativeFloat = Field(description="Standard deviation of the initial router weights [dimensionless]")
    direction: Literal["learned", "random"] | None = Field(
        default=None,
        description="Direction u of a split. learned: few tokens have small u.x, and each expert's tokens are halved | "
        "random; null for other methods",
    )
    shift: PositiveFloat | Literal["auto"] | None = Field(
        default=None,
        description="Shift M of a split: router rows are the original's plus and minus M u. auto: what 98 % of the "
        "calibration tokens need, at most 5 for 16-bit weights [standard deviations of u.x]",
    )
    calibration_tokens: Annotated[NonNegativeInt, Field(le=2**20)] | None = Field(
        default=None,
        description="Training tokens on which the direction of a split is found, balanced and scaled, 0: none; of each "
        "source's text, on which the router of a mix is found [tokens]",
    )
    common_row: bool | None = Field(
        default=None,
        description="Whether a split subtracts from all router rows the row that minimises the z-loss; choices and "
        "gates do not change",
    )
    texts: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None,
        description="Text of each source of a mix, in the order of the sources: parts of the corpus; of grow.py, "
        "languages of the embedded corpus or UTF-8 files, of which the last tenth is held out",
    )
    shared: Literal["average", "base"] | None = Field(
        default=None,
        description="What the experts of a mix share: attention, norms, embeddings. average: of the sources | base: "
        "that of the first source",
    )
    weights: tuple[PositiveFloat, ...] | None = Field(
        default=None, description="Weight of each source of a mix in that average; null: equal ones [weights]"
    )
    ridge: PositiveFloat | None = Field(
        default=None,
        description="Penalty of the ridge regression of a mix's router [ratio to the mean square of its inputs]",
    )
    added = (*_OF_SPLIT, "calibration_tokens", *_OF_MIX)

    @field_validator("shift", mode="before")
    @classmethod
    def _check_shift(cls, shift: Any) -> Any:
        """One line instead of a problem for each member of the union."""
        is_number = isinstance(shift, (int, float)) and not isinstance(shift, bool)
        if shift in ("auto", None) or (is_number and shift > 0):
            return shift
        raise ValueError(f"{shift!r} is neither a number above 0 nor auto; use e.g. 3")

    @model_validator(mode="before")
    @classmethod
    def _complete_method(cls, values: Any) -> Any:
        """What a split or a mix leaves out is as in conf/upcycling."""
        defaults = _COMPLETE.get(str(values.get("method")), {}) if isinstance(values, dict) else {}
        return (
            {**values, **{key: default for key, default in defaults.items() if values.get(key) is None}}
            if defaults
            else values
        )

    @model_validator(mode="after")
    def _check_amounts(self) -> Self:
        for method, field in (("noise", "noise"), ("drop", "drop_ratio")):
            amount = getattr(self, field)
            if (self.method == method) != (amount > 0):
                raise ValueError(
                    f"method {self.method} with {field} {amount}; {field} is > 0 for '{method}' and 0 for the others"
                )
        return self

    @model_validator(mode="after")
    def _check_method_of_keys(self) -> Self:
        for method, fields in (("split", _OF_SPLIT), ("mix", _OF_MIX)):
            for field in fields:
                if self.method != method and getattr(self, field) is not None:
                    raise ValueError(
                        f"method {self.method} with {field} {getattr(self, field)}; {field} is of '{method}', leave it "
                        "out"
                    )
        if self.method not in _COMPLETE and self.calibration_tokens is not None:
            raise ValueError(
                f"method {self.method} with calibration_tokens {self.calibration_tokens}; calibration_tokens is of "
                "'split' and 'mix', leave it out"
            )
        if self.method != "mix" and self.router_init in ("hidden", "ridge"):
            raise ValueError(
                f"method {self.method} with router_init {self.router_init}; it is of 'mix', use normal or orthogonal"
            )
        return self

    @model_validator(mode="after")
    def _check_calibration(self) -> Self:
        tokens = self.calibration_tokens
        if tokens is not None and (self.method == "mix" or tokens) and tokens < _FEWEST_TOKENS:
            none = "" if self.method == "mix" else ", or on 0"
            found = "routers are" if self.method == "mix" else "directions are"
            raise ValueError(f"calibration_tokens {tokens}; {found} found on {_FEWEST_TOKENS} tokens or more{none}")
        if tokens != 0:
            return self
        for field, value in (("direction", "learned"), ("shift", "auto"), ("common_row", True)):
            if getattr(self, field) == value:
                remedy = {"direction": "random", "shift": "a number", "common_row": "false"}[field]
                raise ValueError(
                    f"{field} {str(value).lower()} with calibration_tokens 0; it is found from what routers read, set "
                    f"calibration_tokens to e.g. 8192, or {field} to {remedy}"
                )
        return self

    @model_validator(mode="after")
    def _check_mix(self) -> Self:
        """What there is one of for each source."""
        if self.method != "mix" or self.texts is None:
            return self
        if len(self.texts) < 2:
            raise ValueError(
                f"texts: {len(self.texts)} named; a mix reads a text of each of 2 or more sources, e.g. [zh,en]"
            )
        if self.weights is not None and (self.shared != "average" or len(self.weights) != len(self.texts)):
            expected = f"{len(self.texts)}, one for each text" if self.shared == "average" else "none, shared is base"
            raise ValueError(f"weights: {len(self.weights)} named, expected {expected}; leave them out for equal ones")
        return self


class ShrinkConfig(Config):
    """How a model becomes a smaller one."""

    method: Literal["exact"] = Field(
        description="What goes. exact: layers that do nothing, and copies of units, found in the weights; the function "
        "is kept"
    )
    layers: tuple[NonNegativeInt, ...] | None = Field(
        description="Layers of the source that stay, counted from 0; null: by the method [list of layers]"
    )

    @model_validator(mode="after")
    def _check_layers(self) -> Self:
        if self.layers is not None and (not self.layers or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"layers {list(self.layers)} is not a rising list; name each layer that stays once")
        return self


@dataclass(frozen=True)
class Growth:
    """A growth that was done on a line of checkpoints.

    source, target: the models before and after. how, seed: what it was done by.
    num_trainings: stages of the line that trained before it.
    """

    source: ModelConfig
    target: ModelConfig
    how: GrowthConfig | UpcyclingConfig
    seed: int
    num_trainings: int = 0


GROWTH_KINDS = ("scale_up", "scale_out")
