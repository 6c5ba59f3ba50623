"""A large experiment made small: its sizes divided, so that the same graph runs the same way on a laptop.

What is divided is what is typed: the values of an experiment are those of its full size, wherever they are written, and
no code behind this module depends on the original size. Ratios stay: those of a growth in width and in depth, of
queries to keys and values (the groups of grouped-query attention), of heads to each other, of budgets to each other.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, ValidationError

from aquilamoe.config.messages import UserError, first_problem
from aquilamoe.config.numbers import Config, Divisor, PositiveFloat

Values = Mapping[str, Any]
KEY = "scale"
FEWEST_GROUPS = 2  # key-value heads that are left, so that attention still has groups
_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
_HEADS = ("num_attention_heads", "num_key_value_heads")
_LENGTHS = ("max_position_embeddings", "sliding_window")
_BUDGETS = ("total_tokens", "validate_every_tokens")
_RAMPS = ("warmup_tokens", "decay_tokens")


class ScaleConfig(Config):
    """A large experiment as a small one: what its sizes are divided by."""

    width: Divisor = Field(
        default=1,
        description="Channels, neurons and heads: heads as far as they divide and 2 key-value heads are left, the "
        "channels of a head by the rest [divisor]",
    )
    layers: Divisor = Field(default=1, description="Layers [divisor]")
    sequence: Divisor = Field(default=1, description="Context, windows and sequence lengths [divisor]")
    batch: Divisor = Field(default=1, description="Tokens of a step and of a validation [divisor]")
    tokens: Divisor = Field(
        default=1, description="Budgets, intervals, warm-up and decay, rounded to whole tokens [divisor]"
    )
    learning_rate: PositiveFloat = Field(
        default=1.0, description="Learning rates, because narrow models need larger ones [factor]"
    )


def scaled(values: Values) -> dict[str, Any]:
    """The values of an experiment with its `scale` applied and taken away; UserError for what does not divide."""
    rest = {key: value for key, value in values.items() if key != KEY}
    given = values.get(KEY)
    try:
        scale = ScaleConfig.model_validate({} if given is None else given)
    except ValidationError as error:
        raise first_problem(error, ScaleConfig, given, KEY) from None
    return rest if scale == ScaleConfig() else _Scaling(rest, scale).values()


def _divisors(number: int) -> Iterator[int]:
    for divisor in range(1, math.isqrt(number) + 1):
        if number % divisor == 0:
            yield from (divisor, number // divisor)


class _Scaling:
    """One experiment and what it is divided by."""

    def __init__(self, values: dict[str, Any], scale: ScaleConfig) -> None:
        self.experiment, self.scale = values, scale
        self.heads = self._heads_divisor()

    def values(self) -> dict[str, Any]:
        stages = self.experiment.get("stages")
        found = {**self.experiment, **self._groups(self.experiment, "")}
        if isinstance(stages, Mapping):
            found["stages"] = {name: self._stage(stage, f"stages.{name}.") for name, stage in stages.items()}
        return found

    def _stage(self, stage: Any, where: str) -> Any:
        if not isinstance(stage, Mapping):
            return stage
        scale, found = self.scale, {**stage, **self._groups(stage, where)}
        for field in _BUDGETS:
            found |= self._rounded(found, field)
        found |= self._divided(found, ("sequence_length",), "sequence", scale.sequence, where)
        found |= self._divided(found, ("batch_tokens",), "batch", scale.batch, where)
        if isinstance(tokens := found.get("validation_tokens"), int):
            found["validation_tokens"] = max(1, round(tokens / scale.batch))
        if isinstance(rate := found.get("learning_rate"), float):
            found["learning_rate"] = float(f"{rate * scale.learning_rate:.12g}")  # 0.003, not 0.0030000000000000001
        return found

    def _groups(self, values: Values, where: str) -> dict[str, Any]:
        """The groups that an experiment and its stages have alike."""
        found: dict[str, Any] = {}
        if isinstance(model := values.get("model"), Mapping):
            found["model"] = self._model(model, f"{where}model.")
        if isinstance(schedule := values.get("schedule"), Mapping):
            found["schedule"] = {**schedule, **{k: v for f in _RAMPS for k, v in self._rounded(schedule, f).items()}}
        return found

    def _model(self, model: Values, where: str) -> dict[str, Any]:
        scale = self.scale
        for field in ("mlp_only_layers", "layer_types"):
            if model.get(field) and scale.layers > 1:
                raise UserError(f"{where}{field}: names layers, which scale.layers would divide; set that to 1")
        scaling, further = model.get("rope_scaling"), {}
        if isinstance(scaling, Mapping):
            trained = ("original_max_position_embeddings",)
            divided = self._divided(scaling, trained, "sequence", scale.sequence, f"{where}rope_scaling.")
            further["rope_scaling"] = {**scaling, **divided}
        return {
            **model,
            **further,
            **self._divided(model, _WIDTHS, "width", scale.width, where),
            **self._divided(model, _HEADS, "width", self.heads, where),
            **self._divided(model, ("head_dim",), "width", scale.width // self.heads, where),
            **self._divided(model, ("num_hidden_layers",), "layers", scale.layers, where),
            **self._divided(model, _LENGTHS, "sequence", scale.sequence, where),
        }

    def _heads_divisor(self) -> int:
        """The largest divisor of the width that all numbers of heads have in common, and that leaves groups."""
        models = [self.experiment.get("model"), *(stage.get("model") for stage in self._stages())]
        numbers = [model.get(field) for model in models if isinstance(model, Mapping) for field in _HEADS]
        counts = [number for number in numbers if isinstance(number, int) and number > 0]
        common = math.gcd(self.scale.width, *counts)
        largest = min(counts, default=common) // FEWEST_GROUPS
        return max((divisor for divisor in _divisors(common) if divisor <= largest), default=1)

    def _stages(self) -> Iterator[Values]:
        stages = self.experiment.get("stages")
        if isinstance(stages, Mapping):
            yield from (stage for stage in stages.values() if isinstance(stage, Mapping))

    def _divided(self, values: Values, fields: tuple[str, ...], key: str, by: int, where: str) -> dict[str, Any]:
        """These fields, where present, divided; values that are not numbers are left for the schema to refuse."""
        found = {}
        for field in fields:
            value = values.get(field)
            if type(value) is not int:
                continue
            if value % by:
                of = "" if getattr(self.scale, key) == by else f", of which {by} falls on it"
                raise UserError(
                    f"{where}{field}: {value} is not divided by scale.{key} {getattr(self.scale, key)}{of}; choose a "
                    f"divisor of {value}"
                )
            found[field] = value // by
        return found

    def _rounded(self, values: Values, field: str) -> dict[str, Any]:
        value = values.get(field)
        if type(value) is not int or value == 0:
            return {}
        return {field: max(1, round(value / self.scale.tokens))}
