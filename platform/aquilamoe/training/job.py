"""What a training stage is told: the job, which can be sent to a worker, and the worker's place among the others."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from aquilamoe.config.schema import ClusterConfig, ModelConfig, PretrainStage


@dataclass(frozen=True)
class Job:
    """Everything that a training stage needs, as plain data that can be sent to a worker.

    name: the stage's name, for messages.
    source: directory of a stage whose `model/` is continued, None to start from scratch.
    out: directory for metrics, checkpoints and the result.
    ancestor_tokens, ancestor_flops: what the checkpoint has behind it; the data go on where the ancestors stopped.
    """

    name: str
    stage: PretrainStage
    model: ModelConfig
    tokens: Path
    source: Path | None
    out: Path
    ancestor_tokens: int
    ancestor_flops: int
    cluster: ClusterConfig


@dataclass(frozen=True)
class Rank:
    """This process among those that train together.

    is_save_due: asked at every step; True once after somebody has told this process that it will end soon.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    is_save_due: Callable[[], bool] = bool


FIRST = Rank()


def micro_batch_rows(cluster: ClusterConfig, sequence_length: int) -> int:
    """Sequences of one forward pass of a worker."""
    return max(1, cluster.micro_batch_tokens // sequence_length)
