"""An ablation's results, as its file `summary.json` holds it: pages, figures and advice are made of this alone.

Losses are held-out nats/token, differences of them too; less is better. `flops` are model FLOPs.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, field_validator

from aquilamoe.config.messages import UserError, first_problem
from aquilamoe.config.numbers import Config

SUMMARY = "summary.json"

Point = tuple[float, float, float]  # tokens of the stage, cumulative FLOPs of its line, held-out loss


class Interval(Config):
    """A mean over seeds with its 95 % confidence interval; half_width is null for a single seed."""

    mean: float
    half_width: float | None
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width


class Ratio(Config):
    """A geometric mean over seeds with its 95 % interval, which is that of the logarithms; null for a single seed."""

    mean: float
    low: float | None
    high: float | None
    pairs: int

    @property
    def excludes_one(self) -> bool:
        return self.low is not None and self.high is not None and not self.low <= 1.0 <= self.high


class Ancestor(Config):
    """A stage that trained a checkpoint of the line before the compared stage.

    flops, tokens: with all of its own ancestors. curve: cumulative FLOPs and held-out loss.
    """

    stage: str
    params: int
    learning_rate: float | None
    tokens: int
    flops: float
    loss: float
    curve: list[tuple[float, float]]

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.params


class Seed(Config):
    """What one seed of a variant or control gave.

    fingerprint: of the compared stage. value: the objective; loss: at the end.
    tokens, flops: of the compared stage; lineage_*: with all ancestors.
    ancestors: keys of the study's, first to last. figures: what else was measured, see `FIGURES`.
    curve: of the compared stage. load: tokens of the stage, and the fullest expert's load over the mean.
    """

    fingerprint: str
    value: float
    loss: float
    tokens: int
    flops: float
    lineage_tokens: int
    lineage_flops: float
    ancestors: list[str]
    figures: dict[str, float]
    curve: list[Point]
    load: list[tuple[float, float]] = Field(default_factory=list)

    def by_tokens(self) -> list[tuple[float, float]]:
        return [(tokens, loss) for tokens, _, loss in self.curve]

    def by_flops(self) -> list[tuple[float, float]]:
        return [(flops, loss) for _, flops, loss in self.curve]


# What else a seed may have, and how a reader calls it.
FIGURES = {
    "loss_source": "loss of the source, on the certificate's tokens",
    "loss_grown": "loss of the grown model before training, on the certificate's tokens",
    "loss_jump": "loss_grown - loss_source: what the growth lost at once",
    "kl": "KL divergence of the grown model's distribution from the source's",
    "recovery_tokens": "tokens until the source's final loss is reached again, within 0.001 nats/token",
    "recovery_flops": "FLOPs until then",
    "rank_grown": "effective rank of the matrices after growth, as a fraction of full rank",
    "rank_end": "the same after training",
    "similarity_grown": "mean cosine similarity of a layer's experts after growth",
    "similarity_end": "the same after training",
    "load_end": "load of the fullest expert over the mean, at the end",
    "router_entropy_end": "entropy of the router in nats, at the end",
    "saving": "scratch's FLOPs to its final loss over the line's FLOPs to the same; absent where the source had it",
}


class Control(Config):
    """What makes an entry a control.

    of: the checkpoint that is continued without growing it, null for training from scratch.
    equal: what it has in common with the line that it is compared with. best: its learning rate serves it best.
    stands_for: the variants that it is compared with. differences: control minus variant, of the objective.
    """

    kind: str
    of: str | None
    equal: Literal["flops", "tokens"]
    learning_rate_ratio: float
    best: bool
    stands_for: list[str]
    differences: dict[str, Interval]


class Crossing(Config):
    """Where the mean loss of a variant crosses the baseline's. shown: it exceeds the seeds' noise on both sides."""

    tokens: float
    shown: bool


class Entry(Config):
    """A variant, or a control of some.

    axes: of a variant, its value on each. missing: seeds without a result, and why.
    rank: among variants, equal for ties. to_baseline: entry minus baseline.
    equal_flops: the loss where all variants have cost the same; minus_baseline: of these losses.
    """

    name: str
    axes: dict[str, str]
    control: Control | None
    params_total: int | None
    params_active: int | None
    learning_rate: float | None
    seeds: dict[int, Seed]
    missing: dict[int, str]
    rank: int | None = None
    mean: float | None = None
    to_baseline: Interval | None = None
    crossings: list[Crossing] = Field(default_factory=list)
    equal_flops: float | None = None
    equal_flops_rank: int | None = None
    equal_flops_minus_baseline: Interval | None = None
    saving: Ratio | None = None

    @field_validator("saving", mode="before")
    @classmethod
    def _without_symmetric_interval(cls, value: object) -> object:
        """Older studies had intervals of ratios that reached below zero: they are computed again, not read."""
        return None if isinstance(value, dict) and "half_width" in value else value

    def figure(self, name: str) -> list[float]:
        """A figure of every seed that has it."""
        return [seed.figures[name] for seed in self.seeds.values() if name in seed.figures]


class Horizon(Config):
    """How far the claims carry: the compared stage of the baseline, and the cumulative FLOPs at which all are equal."""

    tokens: int
    flops: float
    lineage_tokens: int
    lineage_flops: float
    equal_flops: float


class Leader(Config):
    """The variant of the lowest mean loss, from so many tokens of the compared stage on."""

    tokens: float
    name: str


class Study(Config):
    """A whole ablation. objective: stage and metric. axes: values by axis; baseline: the name of an entry."""

    format: Literal[1] = 1  # raised when what an older reader would misunderstand changes
    name: str
    description: str
    command: str
    objective: dict[Literal["stage", "metric"], str]
    axes: dict[str, list[str]]
    baseline: str
    seeds: list[int]
    horizon: Horizon | None
    ancestors: dict[str, Ancestor]
    entries: Annotated[list[Entry], Field(min_length=1)]
    leaders: list[Leader]
    versions: dict[str, str] = Field(default_factory=dict)
    commits: list[str] = Field(default_factory=list)

    @property
    def variants(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.control is None]

    @property
    def controls(self) -> list[Entry]:
        """Every kind of control at its best learning rate."""
        return [entry for entry in self.entries if entry.control is not None and entry.control.best]

    def ranked(self) -> list[Entry]:
        """Variants with a rank, best first."""
        found = [entry for entry in self.variants if entry.rank is not None and entry.mean is not None]
        return sorted(found, key=lambda entry: (entry.rank or 0, entry.mean or 0.0))

    def find(self, name: str) -> Entry:
        return next(entry for entry in self.variants if entry.name == name)

    def source_of(self, entry: Entry) -> Ancestor | None:
        """The last trained checkpoint before the compared stage, of the first seed."""
        seed = next(iter(entry.seeds.values()), None)
        return self.ancestors[seed.ancestors[-1]] if seed is not None and seed.ancestors else None


def read(path: Path) -> Study:
    """A study's file; UserError, one line, for a file that is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); it is written by workflows/ablations.py") from None
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise UserError(str(first_problem(error, Study, values, str(path))).partition("\n")[0]) from None


def text(study: Study) -> str:
    """The text of the file: a line for each point of a curve, seven significant digits."""
    written = json.dumps(_rounded(study.model_dump(mode="json")), indent=1, ensure_ascii=False)
    return re.sub(r"\[[-\d.e+,\s]+\]", lambda numbers: " ".join(numbers[0].split()), written) + "\n"


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
