"""The optimizer's state in both growth stages: grown beside the weights, for the stage that keeps it."""

from dataclasses import replace
from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import GrowthConfig, GrowthStage, UpcyclingConfig
from aquilamoe.estimates.work import DISK_BYTES_PER_S
from aquilamoe.pipeline.stage import Context, Estimate

BYTES_PER_PARAMETER = 8  # two moments in float32


def estimate(node: Node, weights: Estimate) -> Estimate:
    """Add what the state weighs to what the weights do, if it is grown."""
    assert node.model is not None
    if cast(GrowthStage, node.stage).optimizer_state == "reset":
        return weights
    assert node.source_model is not None and weights.seconds is not None
    moved = BYTES_PER_PARAMETER * (node.source_model.num_params + node.model.num_params)
    seconds = weights.seconds + moved / DISK_BYTES_PER_S
    disk_bytes = weights.disk_bytes + BYTES_PER_PARAMETER * node.model.num_params
    return replace(weights, disk_bytes=disk_bytes, seconds=seconds, work=seconds)


def run(context: Context, growth: GrowthConfig | UpcyclingConfig) -> None:
    """Grow the state of the source into this stage's directory, if the stage is configured to."""
    from aquilamoe.growth.optimizer_state import grow_moments
    from aquilamoe.training.checkpoint import MOMENTS, TRAINING

    node, stage = context.node, cast(GrowthStage, context.node.stage)
    if stage.optimizer_state == "reset":
        return
    assert node.model is not None and node.source_model is not None
    source, target = (directory / TRAINING / MOMENTS for directory in (context.inputs["source"].directory, context.out))
    target.parent.mkdir(exist_ok=True)
    configs = (node.source_model, node.model)
    grow_moments(
        source,
        target,
        configs,
        growth,
        stage.seed,
        progress=lambda done, total: context.progress(done, total, "moments"),
        asymmetric=stage.optimizer_state == "grow_asymmetric",
    )
