"""Where one stage runs: the experiment's cluster, but for the keys that the stage has otherwise."""

from collections.abc import Mapping
from typing import Any, Protocol

from pydantic import ValidationError

from aquilamoe.config.cluster import RUN_KEYS, ClusterConfig
from aquilamoe.config.messages import UserError, first_problem
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.stages import PretrainStage, Stage


class StageNode(Protocol):
    """What is read of a node of the graph."""

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> Stage: ...

    @property
    def model(self) -> ModelConfig | None: ...


def of(node: StageNode, cluster: ClusterConfig) -> ClusterConfig:
    """The cluster as a stage uses it: with its own keys, and experts divided only where the model has some.

    UserError with one line for keys that the stage cannot have, and for experts that do not divide.
    """
    stage = node.stage
    if not isinstance(stage, PretrainStage):
        return cluster
    where = f"stages.{node.name}.cluster"
    found = changed(cluster, stage.cluster, where)
    if node.model is None:
        return found
    if not node.model.is_moe and "expert_parallel" not in stage.cluster:
        return found.model_copy(update={"expert_parallel": 1})  # of the cluster, for those stages that have experts
    _check_experts(where if "expert_parallel" in stage.cluster else "cluster", node.model, found)
    return found


def changed(cluster: ClusterConfig, changes: Mapping[str, Any], where: str) -> ClusterConfig:
    """The cluster with these keys. A `parallel` other than hsdp has no shard_size unless it is stated, too."""
    if not changes:
        return cluster
    for key in RUN_KEYS:
        if key in changes:
            raise UserError(
                f"{where}.{key}: '{changes[key]}' for one stage; all stages of a run have one, set cluster.{key}"
            )
    values = {**cluster.model_dump(), **changes}
    if changes.get("parallel", "hsdp") != "hsdp" and "shard_size" not in changes:
        values["shard_size"] = None
    try:
        return ClusterConfig.model_validate(values)
    except ValidationError as error:
        raise first_problem(error, ClusterConfig, values, where) from None


def _check_experts(where: str, model: ModelConfig, cluster: ClusterConfig) -> None:
    """UserError if the experts of a model cannot be divided so: what a worker would find when it builds the model."""
    size, place = cluster.expert_parallel, f"{where}.expert_parallel"
    if size == 1:
        return
    if not model.is_moe:
        raise UserError(f"{place}: {size} workers are to share experts, and the model is dense; set it to 1")
    if model.num_experts % size:
        fits = [number for number in range(1, model.num_experts + 1) if model.num_experts % number == 0]
        raise UserError(f"{place}: {model.num_experts} experts are no multiple of {size} workers; choose from {fits}")
    sharers = (cluster.shard_size or cluster.workers) // size
    rows, columns = model.moe_intermediate_size, model.hidden_size
    if rows % sharers and columns % sharers:
        raise UserError(
            f"{place}: {sharers} workers are to share an expert, and divide neither of its {rows} and {columns} rows "
            "and columns; set a larger expert_parallel"
        )
