"""A dense checkpoint, upcycled to a Mixture of Experts."""

from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ScaleOutStage
from aquilamoe.pipeline.stage import Context, Estimate, Metrics
from aquilamoe.stages import _growth

VERSION = 1
RESUMES = False


def estimate(node: Node) -> Estimate:
    return _growth.estimate(node, cast(ScaleOutStage, node.stage).upcycling)


def run(context: Context) -> Metrics:
    from aquilamoe.growth.scale_out import scale_out

    return _growth.run(context, cast(ScaleOutStage, context.node.stage).upcycling, scale_out)
