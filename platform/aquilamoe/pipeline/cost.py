"""What stages cost: model FLOPs, device time, an estimate of the energy, money; their own, and with all ancestors.

A device is a worker's GPU, or a worker that has none. A stage that trains holds all devices of its cluster, every other
stage one. Whatever was spent counts, that of attempts which were interrupted too. A lineage counts each ancestor once,
and two lineages count a shared ancestor each; a pipeline counts every output once.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from aquilamoe.ancestors import ancestors
from aquilamoe.config import stage_cluster
from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.pipeline.store import Record

HOUR_S = 3600.0
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Cost:
    """flops: model FLOPs of training. energy_kwh: at `cluster.device_watts`. money: at the cluster's price."""

    flops: float = 0.0
    device_seconds: float = 0.0
    energy_kwh: float = 0.0
    money: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.device_seconds + other.device_seconds,
            self.energy_kwh + other.energy_kwh,
            self.money + other.money,
        )


@dataclass(frozen=True)
class Rates:
    """What a stage holds while it runs, and what an hour and a second of one device take."""

    devices: int
    price_per_device_hour: float
    device_watts: float

    def cost(self, seconds: float, flops: float = 0.0) -> Cost:
        """Of so many seconds on all devices, in which so many FLOPs were computed."""
        device_s = seconds * self.devices
        energy_kwh = device_s * self.device_watts / JOULES_PER_KWH
        return Cost(flops, device_s, energy_kwh, device_s / HOUR_S * self.price_per_device_hour)


def training_devices(cluster: ClusterConfig) -> int:
    """How many devices a stage that trains holds."""
    return cluster.workers * max(1, cluster.gpus_per_worker)


def rates(node: Node, cluster: ClusterConfig) -> Rates:
    """Of a stage on a cluster."""
    own = stage_cluster.of(node, cluster)
    devices = training_devices(own) if node.tokens else 1
    return Rates(devices, own.price_per_device_hour, own.device_watts)


def own(record: Record) -> Cost:
    """What a finished stage itself cost. A record without a ledger has only the duration: one device is assumed."""
    noted = record.get("cost")
    if noted:
        return Cost(**noted["own"])
    flops = (record.get("metrics") or {}).get("flops")
    return Cost(_finite(flops), _finite(record.get("seconds")))


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def lineage(record: Record, known: Iterable[Record]) -> Cost:
    """What a finished stage cost with everything that it was made from, as far as it is `known`; each output once."""
    by_print = {str(other["fingerprint"]): other for other in known}
    own = str(record["fingerprint"])
    by_print[own] = record

    def parents(fingerprint: str) -> list[str]:
        inputs = (by_print[fingerprint].get("inputs") or {}).values()
        return [name for source in inputs if (name := str(source.get("fingerprint"))) in by_print]

    return total(by_print[each] for each in [own, *ancestors(own, parents)])


def total(records: Iterable[Record]) -> Cost:
    """What these outputs cost together; one that has two names was paid once."""
    return sum((own(record) for record in {str(each["fingerprint"]): each for each in records}.values()), Cost())


def entry(spent: Cost, record: Record, known: Iterable[Record], attempts: int, devices: int) -> dict[str, Any]:
    """What a record carries: its own cost and that of its lineage, how often it was started, on how many devices."""
    itself = {"own": asdict(spent)}
    inherited = lineage({**record, "cost": itself}, known)
    return {**itself, "lineage": asdict(inherited), "attempts": attempts, "devices": devices}


def figures(record: Record) -> dict[str, float]:
    """The cost in a record as flat figures, `cost.own.money`, those that are not 0; none of a record without one."""
    parts = record.get("cost") or {}
    return {
        f"cost.{part}.{name}": float(value)
        for part in ("own", "lineage")
        for name, value in parts.get(part, {}).items()
        if value
    }
