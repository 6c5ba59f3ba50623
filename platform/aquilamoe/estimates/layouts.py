"""Ways of laying a stage's model out over the devices of its cluster: which fit, and which is the fastest of them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from aquilamoe.config import stage_cluster
from aquilamoe.config.graph import Node
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.schema import ClusterConfig, PretrainStage
from aquilamoe.estimates import memory, step_time
from aquilamoe.estimates.step_time import StepTime

Changes = dict[str, Any]
RESERVE = 0.95  # of a GPU's memory: the rest is its context's, its libraries' and what lies between allocations
ALIKE = 0.01  # by how much of a step a layout must be faster to be worth a changed key: predictions know no better
KEYS = ("parallel", "shard_size", "expert_parallel", "activation_checkpointing", "micro_batch_tokens")


@dataclass(frozen=True)
class Training:
    """A stage that trains, and where."""

    name: str
    model: ModelConfig
    stage: PretrainStage
    cluster: ClusterConfig


@dataclass(frozen=True)
class Choice:
    """A layout of a stage: what it changes of the cluster, memory of a device in bytes, and time where it is known."""

    cluster: ClusterConfig
    changes: Changes
    peak: int
    time: StepTime | None

    @property
    def fits(self) -> bool:
        return self.peak <= RESERVE * self.cluster.gpu_memory_bytes

    def overrides(self, name: str) -> str:
        """The changes for a stage of this name, as they are typed."""
        return " ".join(f"stages.{name}.cluster.{key}={_typed(value)}" for key, value in self.changes.items())


def _typed(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def training(nodes: Iterable[Node], cluster: ClusterConfig) -> list[Training]:
    """The stages among these that train."""
    return [
        Training(node.name, node.model, node.stage, stage_cluster.of(node, cluster))
        for node in nodes
        if isinstance(node.stage, PretrainStage) and node.model is not None
    ]


def choice(training: Training, changes: Changes) -> Choice | None:
    """The layout with these changes; None where workers, experts or sequences do not divide so."""
    model, stage = training.model, training.stage
    cluster = training.cluster
    kept = {key: value for key, value in changes.items() if getattr(cluster, key) != value}
    try:
        changed = ClusterConfig.model_validate({**cluster.model_dump(), **kept}) if kept else cluster
    except ValidationError:
        return None
    apart = changed.expert_parallel
    if apart > 1 and (not model.is_moe or model.num_experts % apart):
        return None
    if "micro_batch_tokens" in kept and changed.micro_batch_tokens < stage.sequence_length:
        return None
    peak = memory.estimate(model, stage, changed).peak
    return Choice(changed, kept, peak, step_time.predict(model, stage, changed))


@dataclass(frozen=True)
class Ranking:
    """The layouts of a stage: its own, and all, those that fit and are fast first."""

    training: Training
    now: Choice
    ranked: list[Choice]

    @property
    def best(self) -> Choice | None:
        """The one to take; None where none fits."""
        return first(self.ranked)

    @property
    def beyond(self) -> list[Choice]:
        """The fastest of those that do not fit, if it is faster than all that do."""
        missed = next((each for each in self.ranked if not each.fits), None)
        if missed is None or missed.time is None or self.ranked[0] is missed:
            return []
        fastest = self.ranked[0].time
        return [missed] if fastest is None or missed.time.seconds < fastest.seconds else []


def rank(training: Training) -> Ranking:
    """The layouts of a stage in their order."""
    found = ranked(training)
    now = next(each for each in found if not each.changes)
    return Ranking(training, now, found)


def ranked(training: Training) -> list[Choice]:
    """Every layout: first those that fit, the fastest first; where times are unknown, those that change least first."""
    found = [each for changes in _candidates(training) if (each := choice(training, changes)) is not None]
    return sorted(found, key=lambda each: (not each.fits, each.time.seconds if each.time else 0.0, *_price(each)))


def first(layouts: Iterable[Choice]) -> Choice | None:
    """The one of ranked layouts to take: of those that fit and are as fast as the fastest, the nearest to now."""
    fitting = [each for each in layouts if each.fits]
    if not fitting or fitting[0].time is None:
        return fitting[0] if fitting else None
    limit = fitting[0].time.seconds * (1 + ALIKE)
    return min((each for each in fitting if each.time and each.time.seconds <= limit), key=_price)


def _candidates(training: Training) -> Iterator[Changes]:
    cluster = training.cluster
    own_rows = max(1, training.stage.batch_tokens // training.stage.sequence_length // cluster.workers)
    sizes = {cluster.shard_size, *_shard_sizes(cluster.workers)} - {None}
    divisions: list[tuple[str, int | None]] = [("ddp", None), ("fsdp", None), *(("hsdp", size) for size in sizes)]
    apart = [1, *(2**power for power in range(1, 7))] if training.model.is_moe else [1]
    tokens = {int(cluster.micro_batch_tokens * 2.0**power) for power in range(-4, 3)}
    micro = {min(each, own_rows * training.stage.sequence_length) for each in tokens} | {cluster.micro_batch_tokens}
    for values in product(divisions, {cluster.expert_parallel, *apart}, (False, True), micro):
        (parallel, size), expert_parallel, again, micro_batch = values
        yield dict(zip(KEYS, (parallel, size, expert_parallel, again, micro_batch), strict=True))


def _shard_sizes(workers: int) -> list[int]:
    return [size for size in (2**power for power in range(3, 14)) if size < workers and workers % size == 0]


def _price(choice: Choice) -> tuple[float, ...]:
    """How much a layout changes: keys; then recomputation, wider shard groups, shorter micro-batches."""
    shards = memory.Layout.of(choice.cluster).shards
    recomputed = choice.cluster.activation_checkpointing
    return (len(choice.changes), recomputed, shards, -choice.cluster.micro_batch_tokens, choice.cluster.expert_parallel)
