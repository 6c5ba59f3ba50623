"""The configuration of an ablation: what is varied, how often, and what it is compared with."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from aquilamoe.config.messages import nearest
from aquilamoe.config.numbers import Config, Int, PositiveFloat, PositiveInt, Seed
from aquilamoe.config.schema import Name

RECOVERY = ("recovery_tokens", "recovery_flops")  # of a stage that continues what was grown
MAX_SEEDS, MAX_TRIALS = 1000, 10_000
Overrides = tuple[str, ...]  # as on the command line: KEY=VALUE


class AxisConfig(Config):
    """One thing that is varied: what each of its values changes, by the name that tables and figures show."""

    values: dict[Name, Overrides] = Field(
        min_length=1, description="Overrides (KEY=VALUE) of each value, by the name that tables and figures show"
    )
    baseline: str = Field(description="Name of the value that the others are compared with")

    @model_validator(mode="after")
    def _check_baseline(self) -> Self:
        if self.baseline not in self.values:
            raise ValueError(f"baseline '{self.baseline}' is none of its values ({', '.join(self.values)}); name one")
        return self


class ControlsConfig(Config):
    """What every ablation is compared with, at equal FLOPs and at equal tokens.

    From scratch: the target's size without a growth. Continued: every source of a growth, trained on without it.
    """

    scratch_of: Literal["all", "baseline", "none"] = Field(
        default="all",
        description="Variants with controls from scratch (those of one size and cost share them). all | baseline | "
        "none: where they would cost more than all variants",
    )
    scratch_learning_rate_ratios: tuple[PositiveFloat, ...] = Field(
        default=(0.5, 1.0),
        min_length=1,
        description="Learning rates of controls from scratch, of which the best counts [ratios to the first training "
        "stage's]",
    )
    continued_learning_rate_ratios: tuple[PositiveFloat, ...] = Field(
        default=(1.0,),
        min_length=1,
        description="Learning rates of continued controls, of which the best counts [ratios to the first training "
        "stage's]",
    )


class BudgetConfig(Config):
    """What the objective's stage may cost in every variant: tokens or model FLOPs; the other is null."""

    tokens: PositiveInt | None = Field(
        default=None, description="Tokens of the objective's stage; null: as configured, or as flops gives [tokens]"
    )
    flops: PositiveFloat | None = Field(
        default=None,
        description="Model FLOPs of that stage; null: as configured, or as tokens gives [FLOPs]",
    )

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if self.tokens is not None and self.flops is not None:
            raise ValueError(f"both tokens ({self.tokens}) and flops ({self.flops:g}); set one, and the other to null")
        return self


class ObjectiveConfig(Config):
    """What variants are ranked by: a metric of a stage's record; less is better."""

    stage: Name = Field(description="Stage whose metric ranks the variants")
    metric: str = Field(
        description="Metric of the stage's record, e.g. loss_end [nats/token] or recovery_tokens; less is better"
    )

    @property
    def is_recovery(self) -> bool:
        """Whether it is how soon a grown model is back at its source's loss."""
        return self.metric in RECOVERY


class AblationConfig(Config):
    """Variants are combinations of the axes' values but the excluded ones, each with every seed."""

    axes: dict[Name, AxisConfig] = Field(min_length=1, description="What is varied, by name")
    combinations: Literal["all", "one_at_a_time"] = Field(
        default="all",
        description="Variants. all: every combination | one_at_a_time: those that differ from the baseline in one axis",
    )
    exclude: tuple[dict[Name, str], ...] = Field(
        default=(),
        description="Combinations that are no variant, e.g. {method: random, depth: stack}; an axis that is not named "
        "means all of its values",
    )
    objective: ObjectiveConfig = Field(description="What variants are ranked by")
    budget: BudgetConfig = Field(
        default=BudgetConfig(), description="What the objective's stage costs in every variant"
    )
    controls: ControlsConfig = Field(default=ControlsConfig(), description="What the variants are compared with")
    seeds: tuple[Seed, ...] = Field(description="Seeds of every variant: a list, or a number of them, counted from 1")
    scheduler: Literal["none", "asha"] = Field(
        description="Early stopping. none | asha: variants that fall behind are stopped"
    )
    trial_cpus: PositiveInt = Field(
        description="Cores of a trial; as many trials run at once as the cluster has room for [cores]"
    )

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
