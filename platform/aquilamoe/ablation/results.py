"""Reads what every leaf of an ablation left in the store, and makes the study of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from aquilamoe.ablation import weight_metrics
from aquilamoe.ablation.controls import ControlStage as ControlLeaf
from aquilamoe.ablation.ranking import horizon_of, judge, leaders_of
from aquilamoe.ablation.study import Ancestor, Control, Entry, Point, Seed, Study
from aquilamoe.ablation.study_graph import Leaf, StudyGraph
from aquilamoe.ablation.variants import baseline
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.growth import GROWTH_KINDS
from aquilamoe.config.messages import UserError, nearest
from aquilamoe.config.schema import ExperimentConfig, PretrainStage
from aquilamoe.pipeline import integrity
from aquilamoe.pipeline.figures import metric
from aquilamoe.pipeline.store import METRICS, RECORD, Record, Store, read_points

# What a training stage reports of itself beside its losses by language.
METRICS_OF_TRAINING = ("loss_end", "recovery_tokens", "recovery_flops")
# What the study keeps of a record, by its own name.
OF_GROWTH = {"source_loss": "loss_source", "target_loss": "loss_grown", "kl": "kl"}
OF_TRAINING = ("recovery_tokens", "recovery_flops")
OF_LAST_POINT = {"router/load_max_over_mean": "load_end", "router/entropy": "router_entropy_end"}
LOGS = "logs"  # of failed trials, by the name of their stage


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


def collect(
    union: StudyGraph, store: Store, config: AblationConfig, experiment: ExperimentConfig, command: str
) -> Study:
    """Every leaf's record and curve, and what follows from them; what is not there is missing, with its reason.

    command: what reproduces it. What records do not have is measured on the weights, as `measures` keeps it.
    """
    reader = _Reader(store=store, metric=config.objective.metric)
    reference = baseline(config).name
    entries = judge([*_variants(union, reader), *_controls(union, reader)], reference)
    variants = [entry for entry in entries if entry.control is None]
    return Study(
        name=experiment.name,
        description=experiment.description,
        command=command,
        objective={"stage": config.objective.stage, "metric": config.objective.metric},
        axes={axis: list(spec.values) for axis, spec in config.axes.items()},
        baseline=reference,
        seeds=list(config.seeds),
        horizon=horizon_of(variants, reference),
        ancestors=reader.ancestors,
        entries=entries,
        leaders=leaders_of(variants),
        versions=reader.versions,
        commits=sorted(reader.commits),
    )


def _variants(union: StudyGraph, reader: "_Reader") -> Iterable[Entry]:
    groups: dict[str, list[Leaf]] = {}
    for leaf in union.leaves:
        if leaf.control is None:
            groups.setdefault(leaf.variant.name, []).append(leaf)
    for name, leaves in groups.items():
        yield reader.entry(name, leaves, dict(leaves[0].variant.values), None)


def _controls(union: StudyGraph, reader: "_Reader") -> Iterable[Entry]:
    """Every distinct control, with the variants that it stands for: those for which the same stages are computed."""
    by_variant: dict[tuple[str, str], list[Leaf]] = {}
    for leaf in union.leaves:
        if leaf.control is not None:
            by_variant.setdefault((leaf.control.name, leaf.variant.name), []).append(leaf)
    groups: dict[tuple[str, ...], tuple[list[Leaf], list[str]]] = {}
    for (name, variant), leaves in by_variant.items():
        key = (name, *(leaf.fingerprint for leaf in leaves))
        groups.setdefault(key, (leaves, []))[1].append(variant)
    names = [key[0] for key in groups]
    for (name, *_), (leaves, variants) in groups.items():
        control = leaves[0].control
        assert control is not None
        shown = name if names.count(name) == 1 else f"{name} of {variants[0]}"
        yield reader.entry(shown, leaves, {}, _plain(control, variants))


def _plain(control: ControlLeaf, variants: list[str]) -> Control:
    return Control(
        kind=control.kind,
        of=control.of,
        equal=control.equal,
        learning_rate_ratio=control.learning_rate_ratio,
        best=False,
        stands_for=variants,
        differences={},
    )


@dataclass(kw_only=True)
class _Reader:
    """Reads records, each once; keeps what it met on the way."""

    store: Store
    metric: str
    ancestors: dict[str, Ancestor] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commits: set[str] = field(default_factory=set)
    outputs: dict[str, tuple[Path, Record] | None] = field(default_factory=dict)

    def find(self, stage: str, fingerprint: str) -> tuple[Path, Record] | None:
        if fingerprint not in self.outputs:
            self.outputs[fingerprint] = self.store.find(stage, fingerprint)
        return self.outputs[fingerprint]

    def entry(self, name: str, leaves: Sequence[Leaf], axes: dict[str, str], control: Control | None) -> Entry:
        """A variant or a control, of its leaves: one for each seed."""
        seeds: dict[int, Seed] = {}
        missing: dict[int, str] = {}
        for leaf in leaves:
            output = self.find(leaf.stage, leaf.fingerprint)
            value = metric(output[1], self.metric) if output else None
            if output is None or value is None:
                missing[leaf.seed] = self._reason(leaf, output is not None)
            else:
                seeds[leaf.seed] = self._seed(*output, value)
        node = leaves[0].nodes[leaves[0].stage]
        return Entry(
            name=name,
            axes=axes,
            control=control,
            params_total=node.model.num_params if node.model else None,
            params_active=node.model.num_active_params if node.model else None,
            learning_rate=cast(PretrainStage, node.stage).learning_rate,
            seeds=seeds,
            missing=missing,
        )

    def _reason(self, leaf: Leaf, is_there: bool) -> str:
        if is_there:
            return f"{self.metric} was not reached"
        logs = [self.store.root / LOGS / f"{leaf.stage}-{leaf.fingerprint}.{kind}" for kind in ("log", "stopped")]
        return next((log.read_text(encoding="utf-8").split("\n")[0] for log in logs if log.exists()), "no result yet")

    def _seed(self, directory: Path, record: Record, value: float) -> Seed:
        self.versions |= record.get("versions") or {}
        self.commits |= {str(record["git_commit"])} if record.get("git_commit") else set()
        points = _points(directory, record)
        return Seed(
            fingerprint=record["fingerprint"],
            value=value,
            loss=_required(record, "loss_end"),
            tokens=_required(record, "tokens"),
            flops=_required(record, "flops"),
            lineage_tokens=_required(record, "lineage_tokens"),
            lineage_flops=_required(record, "lineage_flops"),
            ancestors=self._line(record),
            figures=self._figures(directory, record, points),
            curve=_curve(points),
            load=[(p["tokens"], p["router/load_max_over_mean"]) for p in points if "router/load_max_over_mean" in p],
        )

    def _line(self, record: Record) -> list[str]:
        """Fingerprints of the trained stages before this one, first to last; each is kept among the ancestors."""
        source = record["inputs"].get("source")
        output = self.find(source["stage"], source["fingerprint"]) if source else None
        if output is None:
            return []
        directory, own = output
        before = self._line(own)
        if own["kind"] != "pretrain":
            return before
        self.ancestors[own["fingerprint"]] = Ancestor(
            stage=own["stage"],
            params=_required(own, "params_total"),
            learning_rate=own["recipe"]["config"].get("learning_rate"),
            tokens=_required(own, "lineage_tokens"),
            flops=_required(own, "lineage_flops"),
            loss=_required(own, "loss_end"),
            curve=[(flops, loss) for _, flops, loss in _curve(_points(directory, own))],
        )
        return [*before, own["fingerprint"]]

    def _figures(self, directory: Path, record: Record, points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """What `study.FIGURES` names, as far as it is there."""
        found = {name: value for name in OF_TRAINING if (value := metric(record, name)) is not None}
        for key, name in OF_LAST_POINT.items():
            values = [point[key] for point in points if key in point]
            found |= {name: values[-1]} if values else {}
        found |= {f"{name}_end": value for name, value in self._measured(directory, record).items()}
        source = record["inputs"].get("source")
        output = self.find(source["stage"], source["fingerprint"]) if source else None
        if output is not None and output[1]["kind"] in GROWTH_KINDS:
            growth = output[1]
            found |= {name: v for key, name in OF_GROWTH.items() if (v := metric(growth, key)) is not None}
            if "loss_grown" in found and "loss_source" in found:
                found["loss_jump"] = found["loss_grown"] - found["loss_source"]
            found |= {f"{name}_grown": value for name, value in self._measured(*output).items()}
        return found

    def _measured(self, directory: Path, record: Record) -> dict[str, float]:
        """Of the weights, if they are there still."""
        kept = self.store.root / "ablations" / "measures" / f"{record['fingerprint']}.json"
        if (directory / "model").is_dir() and weight_metrics.kept_figures(kept) is None:
            integrity.check(directory, record, "the comparison")
        try:
            return weight_metrics.of_checkpoint(directory / "model", kept)
        except UserError:
            return {}


def _required(record: Record, name: str) -> Any:
    """What every training measures; UserError if a record lacks it."""
    value = record["metrics"].get(name)
    if value is None:
        directory = f"{record['stage']}-{record['fingerprint']}"
        raise UserError(f"{directory}/{RECORD}: has no metrics.{name}; remove {directory} and run again to rebuild it")
    return value


def _points(directory: Path, record: Record) -> list[dict[str, Any]]:
    """The curve of a finished stage; UserError if it is not the one that was measured."""
    if METRICS in record["files"]:
        integrity.check(directory, record, "the comparison", [METRICS])
    return read_points(directory / METRICS)


def _curve(points: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Tokens of the stage, cumulative FLOPs and held-out loss; of a step that was measured twice the last counts."""
    found = {p["tokens"]: (p["tokens"], p["lineage_flops"], p["val/loss"]) for p in points if "val/loss" in p}
    return [found[tokens] for tokens in sorted(found)]
