"""A dense checkpoint, upcycled to a Mixture of Experts, or one with experts that gets more of them."""

from functools import partial
from typing import cast

from aquilamoe.config.graph import Node
from aquilamoe.config.schema import ScaleOutStage
from aquilamoe.pipeline.stage import Context, Estimate, Metrics
from aquilamoe.stages import _growth, _mix, _optimizer_state

VERSION = 3
RESUMES = False


def estimate(node: Node) -> Estimate:
    return _optimizer_state.estimate(node, _growth.estimate(node, cast(ScaleOutStage, node.stage).upcycling))


def run(context: Context) -> Metrics:
    from aquilamoe.growth.scale_out import scale_out

    upcycling = cast(ScaleOutStage, context.node.stage).upcycling
    if upcycling.method == "mix":
        return _mix.run(context, upcycling)
    split = _growth.calibrate(context, upcycling) if upcycling.method == "split" else None
    metrics = _growth.run(context, upcycling, partial(scale_out, split=split), split)
    _optimizer_state.run(context, upcycling)
    return metrics
