"""A stage in the graph of its experiment, with what is known of it before anything runs."""

from dataclasses import dataclass

from aquilamoe.config.external import Before
from aquilamoe.config.growth import Growth
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.stages import ScaleOutStage, ScaleUpStage, Stage


@dataclass(frozen=True, kw_only=True)
class Node:
    """A stage in its graph.

    name: the stage's name in the experiment.
    stage: its configuration; budgets are tokens, and a growth's `model` holds every size, not only those that change.
    model: what its checkpoint is, None for stages that make none.
    source_model: what its source checkpoint is, None without one.
    tokens, flops: trained in this stage (model FLOPs, see `ModelConfig.flops_per_token`).
    ancestor_tokens, ancestor_flops: of everything before it on its line of checkpoints, as far as it was trained here.
    before: of a line that begins with a checkpoint from elsewhere, what that had cost before; None for other lines.
    growths: of its line of checkpoints, itself included. num_trainings: stages of the line that train, likewise.
    other_models: of a mix, what its sources behind the first are.
    """

    name: str
    stage: Stage
    model: ModelConfig | None = None
    source_model: ModelConfig | None = None
    tokens: int = 0
    flops: int = 0
    ancestor_tokens: int = 0
    ancestor_flops: int = 0
    before: Before | None = None
    growths: tuple[Growth, ...] = ()
    num_trainings: int = 0
    other_models: tuple[ModelConfig, ...] = ()

    @property
    def is_external(self) -> bool:
        """Whether it is a checkpoint from elsewhere itself."""
        return self.before is not None and self.source_model is None

    @property
    def lineage_tokens(self) -> int:
        return self.ancestor_tokens + self.tokens

    @property
    def lineage_flops(self) -> int:
        return self.ancestor_flops + self.flops


def grown(source: Node, stage: Stage, model: ModelConfig) -> tuple[Growth, ...]:
    """The growths of a line that goes on with this stage."""
    assert source.model is not None
    if isinstance(stage, ScaleUpStage | ScaleOutStage):
        how = stage.growth if isinstance(stage, ScaleUpStage) else stage.upcycling
        return (*source.growths, Growth(source.model, model, how, stage.seed, source.num_trainings))
    return source.growths
