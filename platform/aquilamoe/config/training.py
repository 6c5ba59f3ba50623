"""What a stage that trains takes over from its line of checkpoints: moments of an optimizer, and what is new."""

from collections.abc import Mapping

from aquilamoe.config.messages import UserError
from aquilamoe.config.node import Node
from aquilamoe.config.stages import GrowthStage, PretrainStage

# Adam corrects its moments by a step that a whole tensor shares: of a weight with v = 0, the first update at a late
# step is (1 - beta1) / sqrt(1 - beta2) learning rates.
LARGEST_UPDATE = 1.0  # learning rates


def check_moments(nodes: Mapping[str, Node], where: str, source: Node, stage: PretrainStage) -> None:
    """Refuse to keep moments that the source has not, or of another optimizer."""
    found, optimizer = moments_of(nodes, source, where, "keep", stage), stage.optimizer.name
    if found != optimizer:
        raise UserError(
            f"{where}: '{source.name}' has the moments of {found}, not of {optimizer} to keep; use reset, or one "
            "optimizer for both"
        )
    first, second = stage.optimizer.betas
    update = (1 - first) / max(1 - second, 1e-12) ** 0.5
    if update > LARGEST_UPDATE and (growth := _zeroing(nodes, source)):
        raise UserError(
            f"{where}: '{growth}' leaves moments of zero (grow_asymmetric), and with optimizer.betas [{first:g}, "
            f"{second:g}] the first update of such a weight is {update:.2g} learning rates, above {LARGEST_UPDATE:g}; "
            f"use e.g. [0.9, 0.95], or set stages.{growth}.optimizer_state to grow"
        )


def _zeroing(nodes: Mapping[str, Node], source: Node) -> str | None:
    """The growth, of those since the last training, that leaves moments of zero at a late step; None without one."""
    while isinstance(source.stage, GrowthStage):
        if source.stage.optimizer_state == "grow_asymmetric":
            return source.name
        source = nodes[source.stage.inputs["source"]]
    return None


def moments_of(
    nodes: Mapping[str, Node], source: Node, where: str, purpose: str, keeper: PretrainStage | None = None
) -> str:
    """Name of the optimizer whose moments a stage leaves; refuse to resume from one that leaves none.

    keeper: a stage that trains on with them; what it freezes needs none.
    """
    stage, remedy = source.stage, "use reset, or continue a pretrain stage"
    if isinstance(stage, PretrainStage):
        if stage.optimizer.groups.freezes and (keeper is None or keeper.optimizer.groups != stage.optimizer.groups):
            raise UserError(
                f"{where}: '{source.name}' has no moments to {purpose} of what its optimizer.groups froze; use reset"
            )
        return stage.optimizer.name
    if isinstance(stage, GrowthStage):
        if stage.optimizer_state != "reset":
            return moments_of(nodes, nodes[stage.inputs["source"]], where, purpose)
        remedy = f"use reset, or set stages.{source.name}.optimizer_state to grow"
    raise UserError(f"{where}: '{source.name}' is a {stage.kind} stage and has no moments to {purpose}; {remedy}")


def check_groups(where: str, stage: PretrainStage, source: Node | None) -> None:
    """Refuse rates of new parts where nothing is new, and a re-warm-up that is longer than the stage."""
    groups = stage.optimizer.groups
    if groups.are_one:
        return
    if source is None or not source.growths:
        line = f"the line of '{source.name}' has no growth" if source else "the stage trains from scratch"
        raise UserError(f"{where}: {line}, so that no part is new; leave groups out, or continue a grown model")
    if stage.total_tokens is not None and groups.new.rewarm_tokens > stage.total_tokens:
        raise UserError(
            f"{where}.new.rewarm_tokens: {groups.new.rewarm_tokens} exceed total_tokens {stage.total_tokens}; "
            "shorten the re-warm-up"
        )
