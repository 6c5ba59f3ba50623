"""What every growth must beat: the same compute, or the same data, without growing (METHODS sections 6 and 7).

A control has the batch, the data and the kind of schedule of the stage that it stands for: that which trained the
line's first checkpoint for training from scratch, that which made a growth's source for continuing it (with its
optimizer's moments, without a warm-up; where the source is itself fresh from a growth, with a warm-up and fresh
moments). Its cooldown is the same share of its tokens as the objective's is. Its learning rate is that stage's times a
ratio; with several ratios all are trained and the best counts, in favour of the control.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from aquilamoe.config.ablation import ControlsConfig
from aquilamoe.config.graph import Node
from aquilamoe.config.schema import GrowthStage, PretrainStage

Equal = Literal["flops", "tokens"]
EQUAL: tuple[Equal, ...] = get_args(Equal)


@dataclass(frozen=True)
class ControlStage:
    """A stage to compare with.

    of: the checkpoint that is continued, None from scratch. equal: what it has in common with the objective's line.
    """

    of: str | None
    equal: Equal
    learning_rate_ratio: float
    stage: PretrainStage

    @property
    def kind(self) -> str:
        """Controls that differ in their learning rates alone are of one kind, and the best stands for it."""
        return f"scratch_{self.equal}" if self.of is None else f"continued_{self.of}_{self.equal}"

    @property
    def name(self) -> str:
        return f"{self.kind}_x{self.learning_rate_ratio:g}"


def line(nodes: Mapping[str, Node], objective: str) -> list[Node]:
    """The checkpoints that lead to the objective, first to last."""
    found = [nodes[objective]]
    while (source := found[0].stage.inputs.get("source")) is not None:
        found.insert(0, nodes[source])
    return found


def controls(
    nodes: Mapping[str, Node], objective: str, config: ControlsConfig, from_scratch: bool = True
) -> Iterator[ControlStage]:
    """The controls of an objective, but for those that would train no batch; without scratch if it has none.

    Nothing trained from scratch stands beside a checkpoint from elsewhere: what that had cost before is not equalled.
    """
    chain = line(nodes, objective)
    from_scratch = from_scratch and chain[0].before is None
    target = chain[-1]
    grown = [index for index, node in enumerate(chain) if isinstance(node.stage, GrowthStage)]
    for ratio in config.scratch_learning_rate_ratios if from_scratch else ():
        for equal in EQUAL:
            yield from _control(chain[0], None, target, equal, ratio)
    for source, trainer in ((chain[index - 1], _trainer(chain, index)) for index in grown):
        for ratio in config.continued_learning_rate_ratios:
            for equal in EQUAL:
                yield from _control(trainer, source, target, equal, ratio)


def _trainer(chain: list[Node], grown: int) -> Node:
    """What trained a checkpoint last before it was grown; of one from elsewhere what trains it first after."""
    before_and_after = [*reversed(chain[:grown]), *chain[grown:]]
    return next(node for node in before_and_after if isinstance(node.stage, PretrainStage))


def _control(template: Node, of: Node | None, target: Node, equal: Equal, ratio: float) -> Iterator[ControlStage]:
    stage, model = cast(PretrainStage, template.stage), of.model if of else target.model
    assert model is not None, "a line consists of checkpoints"
    spent_tokens, spent_flops = (of.lineage_tokens, of.lineage_flops) if of else (0, 0)
    left = target.lineage_tokens - spent_tokens
    tokens = left
    if equal == "flops":
        tokens = (target.lineage_flops - spent_flops) // model.flops_per_token(stage.sequence_length)
    tokens -= tokens % stage.batch_tokens
    if tokens <= 0:
        return
    last, goes_on = cast(PretrainStage, target.stage), of is template  # with that stage's moments
    schedule = last.schedule.model_copy(
        update={
            "warmup_tokens": 0 if goes_on else min(stage.schedule.warmup_tokens, tokens),
            "decay_tokens": last.schedule.decay_tokens * tokens // left,
        }
    )
    yield ControlStage(
        of.name if of else None,
        equal,
        ratio,
        stage.model_copy(
            update={
                "inputs": {"tokens": stage.inputs["tokens"], **({"source": of.name} if of else {})},
                "model": None if of else model,
                "total_tokens": tokens,
                "equal_flops": None,
                "learning_rate": stage.learning_rate * ratio,
                "optimizer_state": "keep" if goes_on else "reset",
                "schedule": schedule,
                "validate_every_tokens": last.validate_every_tokens,
                "validation_tokens": last.validation_tokens,
            }
        ),
    )
