"""Whether an experiment can run here: checked before anything is started."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from aquilamoe.config import stage_cluster
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig, CorpusStage, ExperimentConfig, PretrainStage, TokenizerStage
from aquilamoe.data.corpus import source_files
from aquilamoe.data.vocabulary import find_file
from aquilamoe.files import free_bytes
from aquilamoe.format import size
from aquilamoe.pipeline.plan import Planned


def check(experiment: ExperimentConfig, plan: Sequence[Planned], root: Path) -> None:
    """UserError with what is needed, what is available and what to do."""
    clusters = training_clusters(experiment.cluster, plan)
    _check_gpus(experiment, list(clusters.values()))
    if refused := refused_layouts((planned.node for planned in plan), experiment.cluster):
        raise UserError(*refused)
    _check_disk(plan, root)
    if missing := missing_files(plan):
        raise UserError(*missing)


def training_clusters(cluster: ClusterConfig, plan: Sequence[Planned]) -> dict[str, ClusterConfig]:
    """The cluster of every stage that will train, by name, in their order."""
    return {
        planned.name: stage_cluster.of(planned.node, cluster)
        for planned in plan
        if planned.is_computed and isinstance(planned.node.stage, PretrainStage)
    }


def missing_files(plan: Sequence[Planned]) -> list[str]:
    """What stages that will run are to read of the disk and is not there, a line each."""
    found = []
    for stage in (planned.node.stage for planned in plan if planned.is_computed):
        sources = stage.sources if isinstance(stage, CorpusStage) else {}
        looks: list[Callable[[], object]] = [
            partial(source_files, name, source.model_copy(update={"sha256": None}))  # which takes reading it
            for name, source in sources.items()
            if source.hub is None
        ]
        if isinstance(stage, TokenizerStage) and stage.path is not None:
            looks.append(partial(find_file, stage.path))
        for look in looks:
            try:
                look()
            except UserError as error:
                found.append(str(error))
    return found


def warnings(plan: Sequence[Planned]) -> list[str]:
    """What stages that will run can do and will disappoint, a line each."""
    return [
        f"stages.{planned.name}.{line}" for planned in plan if planned.is_computed for line in planned.estimate.warnings
    ]


def _check_gpus(experiment: ExperimentConfig, clusters: Sequence[ClusterConfig]) -> None:
    cluster = max(clusters, key=lambda each: each.workers * each.gpus_per_worker, default=None)
    if cluster is None:
        return
    needed, found = cluster.workers * cluster.gpus_per_worker, len(local_gpus())
    if cluster.address is None and needed > found:
        memory = f" with {size(cluster.gpu_memory_bytes)} each" if cluster.gpu_memory_bytes else ""
        raise UserError(
            f"experiment {experiment.name}: needs {needed} GPUs{memory}, this machine has {found} "
            f"(and {os.cpu_count()} CPUs); set cluster.address to a Ray cluster that has them, or view its plan: "
            f"python workflows/efficientscale.py +experiment={experiment.name} action=plan"
        )


def local_gpus() -> list[Path]:
    """The NVIDIA devices of this machine."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


# As /proc/cpuinfo spells them: any of these lets a CPU of this family multiply in bfloat16 as fast as in float32.
BF16_FLAGS = {"avx512bw", "amx_bf16", "avx_ne_convert"}


def slow_precision(experiment: ExperimentConfig, plan: Sequence[Planned]) -> str | None:
    """A warning where training on the CPU of this machine would be many times slower than it has to be."""
    on_cpu = {name for name, each in training_clusters(experiment.cluster, plan).items() if not each.gpus_per_worker}
    rounded = [
        planned.name
        for planned in plan
        if planned.name in on_cpu
        and isinstance(planned.node.stage, PretrainStage)
        and planned.node.stage.precision != "fp32"
    ]
    if not rounded or experiment.cluster.address is not None or has_bf16_products():
        return None
    return (
        f"precision: stages {', '.join(rounded)} compute in bfloat16, about 20 times slower than float32 on this CPU, "
        "which has neither AVX-512 nor AMX; precision=fp32 is faster"
    )


def has_bf16_products() -> bool:
    """Whether the CPU of this machine multiplies in bfloat16; this is assumed where an x86 does not report it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return True
    found = next((line.split() for line in text.splitlines() if line.startswith("flags")), None)
    return found is None or not BF16_FLAGS.isdisjoint(found)


def refused_layouts(nodes: Iterable[Node], cluster: ClusterConfig) -> list[str]:
    """What workers of stages that train would refuse when they have started, a line each."""
    found = []
    for node in nodes:
        if not isinstance(stage := node.stage, PretrainStage):
            continue
        own = stage_cluster.of(node, cluster)
        workers = own.workers
        where = f"stages.{node.name}.cluster" if "workers" in stage.cluster else "cluster"
        if own.executor == "process" and workers > 1:
            found.append(
                f"{where}.workers: {workers} workers need cluster.executor=ray; use cluster=local, or 1 worker"
            )
        elif (rows := stage.batch_tokens // stage.sequence_length) % workers:
            found.append(
                f"stages.{node.name}.batch_tokens: {stage.batch_tokens} tokens are {rows} sequences, which "
                f"{workers} workers cannot share evenly; choose a multiple of {workers * stage.sequence_length}"
            )
    return list(dict.fromkeys(found))


def _check_disk(plan: Sequence[Planned], root: Path) -> None:
    needed = sum(planned.estimate.disk_bytes for planned in plan if planned.state != "cached")
    free = free_bytes(root)
    if needed > free:
        raise UserError(
            f"{root}: the run writes about {size(needed)}, {size(free)} are free; "
            "make room, or set paths.root to a larger disk"
        )
