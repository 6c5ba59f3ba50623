"""The configuration of an ablation: what is varied, how often, and what it is compared with."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from aquilamoe.config.messages import nearest
from aquilamoe.config.network import Config, Int, PositiveFloat, PositiveInt, Seed
from aquilamoe.config.schema import Name

RECOVERY = ("recovery_tokens", "recovery_flops")  # of a stage that continues what was grown
MAX_SEEDS, MAX_TRIALS = 1000, 10_000
Overrides = tuple[str, ...]  # as on the command line: KEY=VALUE


class AxisConfig(Config):
    """One thing that is varied: what each of its values changes, by the name that tables and figures show."""

    values: Annotated[dict[Name, Overrides], Field(min_length=1)]
    baseline: str

    @model_validator(mode="after")
    def _check_baseline(self) -> Self:
        if self.baseline not in self.values:
            raise ValueError(f"baseline '{self.baseline}' is none of its values ({', '.join(self.values)}); name one")
        return self


class ControlsConfig(Config):
    """What every ablation is compared with. Learning rates are ratios of the first training stage's; the best counts.

    scratch: the target's size, trained from scratch at equal FLOPs and at equal tokens.
    continued: every source of a growth, trained on without it, at equal FLOPs and at equal tokens.
    scratch_of: which variants have those from scratch (variants of one size and cost share them): all, the baseline
        alone, or none, where they would cost more than all variants.
    """

    scratch_of: Literal["all", "baseline", "none"] = "all"
    scratch_learning_rate_ratios: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5, 1.0)
    continued_learning_rate_ratios: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (1.0,)


class BudgetConfig(Config):
    """What the objective's stage may cost in every variant: tokens or model FLOPs; the other is null."""

    tokens: PositiveInt | None = None
    flops: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if self.tokens is not None and self.flops is not None:
            raise ValueError(f"both tokens ({self.tokens}) and flops ({self.flops:g}); set one, and the other to null")
        return self


class ObjectiveConfig(Config):
    """What variants are ranked by: a metric of a stage's record; less is better."""

    stage: Name
    metric: str

    @property
    def is_recovery(self) -> bool:
        """Whether it is how soon a grown model is back at its source's loss."""
        return self.metric in RECOVERY


class AblationConfig(Config):
    """Variants are combinations of the axes' values but the excluded ones, each with every seed.

    combinations: all, or one_at_a_time: the baseline, and what differs from it in one axis.
    exclude: combinations to leave out, e.g. {method: random, depth: stack}; an axis that is not named means all.
    """

    axes: Annotated[dict[Name, AxisConfig], Field(min_length=1)]
    combinations: Literal["all", "one_at_a_time"] = "all"
    exclude: tuple[dict[Name, str], ...] = ()
    objective: ObjectiveConfig
    budget: BudgetConfig = BudgetConfig()
    controls: ControlsConfig = ControlsConfig()
    seeds: tuple[Seed, ...]
    scheduler: Literal["none", "asha"]
    trial_cpus: PositiveInt

    @model_validator(mode="after")
    def _check_excluded(self) -> Self:
        for combination in self.exclude:
            for axis, value in combination.items():
                if axis not in self.axes:
                    raise ValueError(f"exclude: there is no axis '{axis}'; {nearest(axis, self.axes)}")
                if value not in self.axes[axis].values:
                    raise ValueError(
                        f"exclude: axis '{axis}' has no value '{value}'; {nearest(value, self.axes[axis].values)}"
                    )
        if self.leaves_out({axis: spec.baseline for axis, spec in self.axes.items()}):
            raise ValueError("exclude leaves out the baseline, which all are compared with; take it out of the list")
        return self

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        """Every variant is composed and planned before anything runs, with every seed."""
        values = [len(spec.values) for spec in self.axes.values()]
        alone = self.combinations == "one_at_a_time"
        number = 1 + sum(count - 1 for count in values) if alone else math.prod(values)
        if number * len(self.seeds) > MAX_TRIALS:
            fewer = "" if alone else ", or combinations: one_at_a_time"
            raise ValueError(
                f"axes: {len(values)} axes make {number:,} combinations, with {len(self.seeds):,} seeds "
                f"{number * len(self.seeds):,} trials, at most {MAX_TRIALS:,} are planned; name fewer values or "
                f"seeds{fewer}"
            )
        return self

    def leaves_out(self, values: Mapping[str, str]) -> bool:
        """Whether a combination of the axes' values is no variant."""
        changed = sum(values[axis] != spec.baseline for axis, spec in self.axes.items())
        if self.combinations == "one_at_a_time" and changed > 1:
            return True
        return any(combination.items() <= values.items() for combination in self.exclude)

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, seeds: Any) -> Any:
        """A number of seeds means the first so many."""
        if isinstance(seeds, float) and seeds.is_integer():
            seeds = int(seeds)  # 1e2 on a command line
        number = len(seeds) if isinstance(seeds, (list, tuple)) else seeds
        if isinstance(number, int) and not isinstance(number, bool) and number > MAX_SEEDS:
            raise ValueError(f"{number:,} seeds, at most {MAX_SEEDS:,} are run; 3 to 10 give an interval")
        if isinstance(seeds, int) and not isinstance(seeds, bool):
            if seeds < 1:
                raise ValueError(f"{seeds} seeds compare nothing; give at least 1, and 3 for an interval")
            return tuple(range(1, seeds + 1))
        return seeds

    @field_validator("seeds")
    @classmethod
    def _refuse_repeats(cls, seeds: tuple[Int, ...]) -> tuple[Int, ...]:
        repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1})
        if repeated:
            raise ValueError(
                f"seed {repeated[0]} is named {seeds.count(repeated[0])} times; a repeat is no new evidence"
            )
        if not seeds:
            raise ValueError("no seeds; give at least one, and 3 for an interval")
        return seeds
