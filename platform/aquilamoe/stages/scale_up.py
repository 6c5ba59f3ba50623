"""A dense checkpoint, grown to a larger dense one."""

from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ScaleUpStage
from aquilamoe.pipeline.stage import Context, Estimate, Metrics
from aquilamoe.stages import _growth, _optimizer_state

VERSION = 3
RESUMES = False


def estimate(node: Node) -> Estimate:
    return _optimizer_state.estimate(node, _growth.estimate(node, cast(ScaleUpStage, node.stage).growth))


def run(context: Context) -> Metrics:
    from aquilamoe.growth.scale_up import scale_up

    growth = cast(ScaleUpStage, context.node.stage).growth
    metrics = _growth.run(context, growth, scale_up)
    _optimizer_state.run(context, growth)
    return metrics
