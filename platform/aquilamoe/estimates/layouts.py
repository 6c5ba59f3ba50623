"""Which ways of laying a model out over the devices of a cluster fit into their memory, and the nearest that does."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from aquilamoe.config import stage_cluster
from aquilamoe.config.graph import Node
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.schema import ClusterConfig, PretrainStage
from aquilamoe.estimates import memory

Changes = dict[str, Any]
RESERVE = 0.95  # of a GPU's memory: the rest is its context's, its libraries' and what lies between allocations
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
    """A layout: what it changes of the cluster, and the memory of a device in every stage, in bytes."""

    cluster: ClusterConfig
    changes: Changes
    peaks: dict[str, int]

    @property
    def fits(self) -> bool:
        return all(peak <= self.room for peak in self.peaks.values())

    @property
    def room(self) -> float:
        """Bytes that training may take of a device."""
        return RESERVE * self.cluster.gpu_memory_bytes

    @property
    def overrides(self) -> str:
        """The changes as they are typed."""
        return " ".join(f"cluster.{key}={_typed(value)}" for key, value in self.changes.items())


def _typed(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def training(nodes: Iterable[Node], cluster: ClusterConfig) -> list[Training]:
    """The stages among these that train."""
    return [
        Training(node.name, node.model, node.stage, stage_cluster.of(node, cluster))
        for node in nodes
        if isinstance(node.stage, PretrainStage) and node.model is not None
    ]


def choice(stages: Sequence[Training], cluster: ClusterConfig, changes: Changes) -> Choice | None:
    """The cluster with these changes; None where workers, or experts, do not divide so."""
    kept = {key: value for key, value in changes.items() if getattr(cluster, key) != value}
    try:
        changed = ClusterConfig.model_validate({**cluster.model_dump(), **kept})
    except ValidationError:
        return None
    if any(changed.micro_batch_tokens < each.stage.sequence_length for each in stages):
        return None
    peaks = {}
    for each in stages:
        kept_here = {key: value for key, value in kept.items() if each.model.is_moe or key != "expert_parallel"}
        own = each.cluster.model_copy(update=kept_here)
        if own.expert_parallel > 1 and each.model.num_experts % own.expert_parallel:
            return None
        peaks[each.name] = memory.estimate(each.model, each.stage, own).peak
    return Choice(changed, kept, peaks)


def ladder(stages: Sequence[Training], cluster: ClusterConfig) -> list[Choice]:
    """Every division of the model among the workers, from a copy in each to one over all, all else as configured."""
    divisions: list[Changes] = [{"parallel": "ddp", "shard_size": None, "expert_parallel": 1}]
    divisions += [{"parallel": "hsdp", "shard_size": size} for size in _shard_sizes(cluster.workers)]
    divisions += [{"parallel": "fsdp", "shard_size": None}] if cluster.workers > 1 else []
    return [found for changes in divisions if (found := choice(stages, cluster, changes)) is not None]


def _shard_sizes(workers: int) -> list[int]:
    return [size for size in (2**power for power in range(3, 14)) if size < workers and workers % size == 0]


def nearest(stages: Sequence[Training], cluster: ClusterConfig) -> Choice | None:
    """The layout that fits with the fewest changed keys, and among those the one that costs the least; None: nothing.

    Cheapest is what leaves most of a step as it was: shorter micro-batches, then wider shard groups, whose layers come
    from further away, then computing activations again.
    """
    fitting = [found for changes in _candidates(cluster) if (found := choice(stages, cluster, changes)) and found.fits]
    return min(fitting, key=_price, default=None)


def _candidates(cluster: ClusterConfig) -> Iterator[Changes]:
    sizes = {cluster.shard_size, *_shard_sizes(cluster.workers)} - {None}
    divisions: list[tuple[str, int | None]] = [("ddp", None), ("fsdp", None), *(("hsdp", size) for size in sizes)]
    experts = [cluster.expert_parallel, *(2**power for power in range(7))]
    micro = [cluster.micro_batch_tokens // 2**power for power in range(5)]
    again = [cluster.activation_checkpointing, True]
    for (parallel, size), expert, checkpointing, tokens in product(divisions, experts, again, micro):
        yield dict(zip(KEYS, (parallel, size, expert, checkpointing, tokens), strict=True))


def _price(choice: Choice) -> tuple[float, ...]:
    shards = memory.Layout.of(choice.cluster).shards
    recomputed = "activation_checkpointing" in choice.changes
    return (len(choice.changes), recomputed, shards, -choice.cluster.micro_batch_tokens, choice.cluster.expert_parallel)
