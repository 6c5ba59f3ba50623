"""Arguments of a training stage: the job, which can be sent to a worker, and the worker's place among the others."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from aquilamoe.config.schema import ClusterConfig, ModelConfig, PretrainStage

if TYPE_CHECKING:
    import torch

    from aquilamoe.model.marks import Marks


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that a training stage needs, as plain data that can be sent to a worker.

    name: the stage's name, for messages.
    source: directory of a stage whose `model/` is continued, None to start from scratch.
    out: directory for metrics, checkpoints and the result.
    ancestor_tokens, ancestor_flops: what the checkpoint has behind it; the data continue where the ancestors stopped.
    beginning: the model that its line of checkpoints began with; None if nothing was grown.
    marks: returns what of each parameter of the model is new, by name; None if nothing was grown.
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
    beginning: ModelConfig | None = None
    marks: "Callable[[], Mapping[str, Marks]] | None" = None


class MetricsExporter(Protocol):
    """Receives a training's metrics on every rank: at every step, therefore it has to be fast."""

    def begins(self, job: Job, rank: "Rank", device: "torch.device", step: int) -> None: ...

    def spent(self, part: str, seconds: float) -> None: ...

    def stepped(self, step: int, values: Mapping[str, float]) -> None: ...

    def measured(self, step: int, values: Mapping[str, float], router: Mapping[str, Any] | None) -> None: ...


@dataclass(frozen=True)
class Rank:
    """This process among those that train together.

    is_save_due: called at every step; True once after this process got a preemption notice.
    meter: receives the training's metrics, besides its journal.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    is_save_due: Callable[[], bool] = bool
    meter: MetricsExporter | None = None


FIRST = Rank()


def micro_batch_rows(cluster: ClusterConfig, sequence_length: int) -> int:
    """Sequences of one forward pass of a worker."""
    return max(1, cluster.micro_batch_tokens // sequence_length)
