"""What an ablation found: the objective of every variant and control by seed, and what may be said of it."""

import statistics as stdlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aquilamoe.ablation.statistics import Curve, Interval, Ranked, crossings, mean_curve, paired_difference, ranking
from aquilamoe.ablation.union import Leaf, Union
from aquilamoe.ablation.variants import baseline
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.messages import UserError, nearest
from aquilamoe.config.schema import ExperimentConfig, PretrainStage
from aquilamoe.pipeline.store import METRICS, Record, Store, read_points


@dataclass
class Result:
    """Of a variant or a control: what each seed gave.

    values: the objective. records: of the compared stage. curves: held-out loss against tokens of the stage.
    """

    values: dict[int, float] = field(default_factory=dict)
    records: dict[int, Record] = field(default_factory=dict)
    curves: dict[int, Curve] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return stdlib.fmean(self.values.values())


@dataclass(frozen=True)
class Compared:
    """A control, of the learning rate that served it best, against the baseline (control minus baseline)."""

    kind: str
    learning_rate_ratio: float
    mean: float
    to_baseline: Interval


@dataclass(frozen=True)
class Results:
    """variants: by name. controls: of the baseline's variant, by name. missing: leaves without an output, by name."""

    variants: Mapping[str, Result]
    controls: Mapping[str, Result]
    missing: Mapping[str, list[int]]
    baseline: str

    def ranked(self) -> list[Ranked]:
        """The variants that have results of seeds in common with the baseline, best first."""
        reference = self.variants[self.baseline].values
        paired = {name: found.values for name, found in self.variants.items() if found.values.keys() & reference.keys()}
        return ranking(paired, self.baseline) if paired else []

    def crossings(self) -> dict[str, list[float]]:
        """Where the mean curves of variants cross the baseline's (tokens of the stage), for those that do."""
        reference = mean_curve(list(self.variants[self.baseline].curves.values()))
        found = {
            name: crossings(mean_curve(list(result.curves.values())), reference)
            for name, result in self.variants.items()
            if result.curves and name != self.baseline
        }
        return {name: places for name, places in found.items() if places}

    def compared(self) -> list[Compared]:
        """Every kind of control at its best."""
        best: dict[str, Compared] = {}
        reference = self.variants[self.baseline].values
        for name, result in self.controls.items():
            kind, _, ratio = name.rpartition("_x")
            if not result.values.keys() & reference.keys():
                continue
            found = Compared(kind, float(ratio), result.mean, paired_difference(result.values, reference))
            if kind not in best or found.mean < best[kind].mean:
                best[kind] = found
        return list(best.values())


# What a training stage reports of itself beside its losses by language.
METRICS_OF_TRAINING = ("loss_end", "recovery_tokens", "recovery_flops")


def check_objective(config: AblationConfig, experiment: ExperimentConfig) -> None:
    """Refuse a metric that the compared stage does not report. UserError with the nearest that it does."""
    stage = experiment.stages[config.objective.stage]
    assert isinstance(stage, PretrainStage), "checked when the graph was built"
    known = [*METRICS_OF_TRAINING, *(f"loss_end/{language}" for language in stage.mixture)]
    if config.objective.metric not in known:
        raise UserError(
            f"ablation.objective.metric: stage '{config.objective.stage}' reports no '{config.objective.metric}'; "
            f"{nearest(config.objective.metric, known)}"
        )


def collect(union: Union, store: Store, config: AblationConfig) -> Results:
    """Read every leaf's record and curve; what is not there, or does not report the objective, is missing."""
    reference = baseline(config).name
    variants: dict[str, Result] = {}
    controls: dict[str, Result] = {}
    missing: dict[str, list[int]] = {}
    for leaf in union.leaves:
        if leaf.control is None:
            _add(leaf, leaf.variant.name, variants, missing, store, config)
        elif leaf.variant.name == reference:
            _add(leaf, leaf.control.name, controls, missing, store, config)
    return Results(variants, controls, missing, reference)


def _add(
    leaf: Leaf,
    name: str,
    results: dict[str, Result],
    missing: dict[str, list[int]],
    store: Store,
    config: AblationConfig,
) -> None:
    result = results.setdefault(name, Result())
    found = store.find(leaf.stage, leaf.fingerprint)
    value = found[1]["metrics"].get(config.objective.metric) if found else None
    if found is None or value is None:
        missing.setdefault(name, []).append(leaf.seed)
        return
    directory, record = found
    points = [point for point in read_points(directory / METRICS) if "val/loss" in point]
    result.values[leaf.seed] = float(value)
    result.records[leaf.seed] = record
    result.curves[leaf.seed] = [(point["tokens"], point["val/loss"]) for point in points]


def summary(results: Results, config: AblationConfig) -> dict[str, Any]:
    """The results as plain data, for a file."""
    return {
        "objective": config.objective.model_dump(),
        "seeds": list(config.seeds),
        "baseline": results.baseline,
        "variants": {name: _plain(result) for name, result in results.variants.items()},
        "controls": {name: _plain(result) for name, result in results.controls.items()},
        "missing": dict(results.missing),
    }


def _plain(result: Result) -> dict[str, Any]:
    flops = {seed: record["metrics"]["lineage_flops"] for seed, record in result.records.items()}
    return {"values": result.values, "lineage_flops": flops, "curves": result.curves}
