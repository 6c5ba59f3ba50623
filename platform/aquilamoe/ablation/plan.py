"""What an ablation would run, what of it is there, and what that costs."""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache

from aquilamoe.ablation.study_graph import Leaf, StudyGraph, with_ancestors
from aquilamoe.ablation.variants import Variant
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline.plan import Planned, TrainingSpeed
from aquilamoe.pipeline.store import Store

DATA_KINDS = ("corpus", "tokenizer", "tokenize")


class Glance(Store):
    """A store as it is now: every query is computed once, for the many lines that repeat it."""

    def __init__(self, store: Store) -> None:
        super().__init__(store.root, copy(store.remote))
        if self.remote:
            self.remote.find = cache(self.remote.find)  # type: ignore[method-assign]
        self.find = cache(super().find)  # type: ignore[method-assign]
        self.history = cache(super().history)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Task:
    """A distinct line to compute.

    leaf: the first that needs it. stages: its line and what this reads, as planned, inputs first.
    shared: fingerprints of those of its stages that other tasks need too.
    """

    leaf: Leaf
    stages: Sequence[Planned]
    shared: frozenset[str]

    @property
    def name(self) -> str:
        return f"{self.leaf.stage}-{self.leaf.fingerprint}"

    @property
    def is_done(self) -> bool:
        return self.stages[-1].state == "cached"


def tasks(union: StudyGraph, store: Store, speed: TrainingSpeed) -> list[Task]:
    """Every distinct leaf once, seed by seed: an ablation that is cut has whole comparisons of its first seeds."""
    plans: dict[str, tuple[Leaf, list[Planned]]] = {}
    store = Glance(store)
    places = {seed: place for place, seed in enumerate(dict.fromkeys(leaf.seed for leaf in union.leaves))}
    for leaf in sorted(union.leaves, key=lambda leaf: places[leaf.seed]):
        if leaf.fingerprint not in plans:
            planned = planning.make(leaf.nodes, store, speed)
            plans[leaf.fingerprint] = leaf, sorted(planned, key=lambda stage: stage.fingerprint == leaf.fingerprint)
    needs = [{stage.fingerprint for stage in stages} for _, stages in plans.values()]
    counts = {fingerprint: sum(fingerprint in need for need in needs) for need in needs for fingerprint in need}
    return [
        Task(leaf, stages, frozenset(s.fingerprint for s in stages if counts[s.fingerprint] > 1))
        for leaf, stages in plans.values()
    ]


def data_stages(tasks: Sequence[Task]) -> list[Planned]:
    """What is made of the corpus, for all tasks: no trial's work."""
    everything = (stage for task in tasks for stage in task.stages)
    return list({stage.fingerprint: stage for stage in everything if stage.node.stage.kind in DATA_KINDS}.values())


def sources(tasks: Sequence[Task]) -> list[Task]:
    """The last training stage that each task shares with another, as a task of its own: these are computed first."""
    first: dict[str, Task] = {}
    for task in tasks:
        shared = [s for s in task.stages if s.fingerprint in task.shared and s.node.stage.kind == "pretrain"]
        if not shared:
            continue
        last = shared[-1]
        leaf = replace(task.leaf, control=None, stage=last.name, fingerprint=last.fingerprint)
        needed = with_ancestors(task.leaf.nodes, last.name)
        stages = [stage for stage in task.stages if stage.name in needed]
        first.setdefault(last.fingerprint, Task(leaf, stages, task.shared))
    return list(first.values())


@dataclass(frozen=True)
class Totals:
    """flops, disk_bytes, seconds: of all stages that are not computed yet, each once, one after the other."""

    stages: int
    cached: int
    flops: int
    disk_bytes: int
    seconds: float


def totals(tasks: Sequence[Task]) -> Totals:
    stages = {stage.fingerprint: stage for task in tasks for stage in task.stages}
    pending = [stage for stage in stages.values() if stage.is_computed]
    return Totals(
        stages=len(stages),
        cached=len(stages) - len(pending),
        flops=sum(stage.node.flops for stage in pending),
        disk_bytes=sum(stage.estimate.disk_bytes for stage in pending),
        seconds=sum(stage.seconds or 0.0 for stage in pending),
    )


def by_variant(union: StudyGraph) -> list[tuple[Variant, list[Leaf]]]:
    """Every variant with its leaves by seed, controls left out."""
    found: dict[str, tuple[Variant, list[Leaf]]] = {}
    for leaf in union.leaves:
        if leaf.control is None:
            found.setdefault(leaf.variant.name, (leaf.variant, []))[1].append(leaf)
    return list(found.values())
