"""How fast training is, as the cluster states it or by what the processors of this machine can do."""

import os
from dataclasses import dataclass
from typing import Self

from aquilamoe.config import stage_cluster
from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ClusterConfig, PretrainStage
from aquilamoe.estimates import processor_speed, step_time


@dataclass(frozen=True)
class Speed:
    """Of training on all devices, where no record has it: `flops_per_s`, or what `cores` of this machine can do."""

    flops_per_s: float | None
    cores: int = 0

    @classmethod
    def of(cls, cluster: ClusterConfig) -> Self:
        """As the cluster states it."""
        if cluster.flops_per_s is not None:
            return cls(cluster.flops_per_s)
        if cluster.device_flops_per_s is not None and cluster.mfu is not None:
            devices = cluster.workers * max(1, cluster.gpus_per_worker)
            return cls(devices * cluster.device_flops_per_s * cluster.mfu)
        if cluster.address is None and not cluster.gpus_per_worker:
            return cls(None, min(cluster.workers * cluster.cpus_per_worker, os.cpu_count() or 1))
        return cls(None)

    def seconds(self, node: Node, work: float | None) -> float | None:
        """For a stage that trains; None where it is unknown."""
        if self.flops_per_s is not None:
            return node.flops / self.flops_per_s
        return (work or node.flops) / processor_speed.work_per_s(self.cores) if self.cores else None


@dataclass(frozen=True)
class StageSpeed:
    """Of training on a cluster whose stages may each have a part of it, or another layout."""

    cluster: ClusterConfig

    def seconds(self, node: Node, work: float | None) -> float | None:
        """For a stage that trains; None where it is unknown."""
        own = stage_cluster.of(node, self.cluster)
        if own.flops_per_s is None and own.mfu is None and isinstance(node.stage, PretrainStage):
            assert node.model is not None
            step = step_time.predict(node.model, node.stage, own)
            if step is not None:
                return step.seconds * node.stage.num_steps
        return Speed.of(own).seconds(node, work)
