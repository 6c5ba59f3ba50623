"""All variants as one graph: what several of them need is computed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aquilamoe.ablation.controls import ControlStage, controls
from aquilamoe.ablation.variants import Compose, Variant, baseline, check_differences, variants
from aquilamoe.ancestors import ancestors
from aquilamoe.config import graph
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError, nearest
from aquilamoe.config.schema import ExperimentConfig, GrowthStage, PretrainStage, ReportConfig, Stage
from aquilamoe.pipeline import fingerprint as identity
from aquilamoe.pipeline.plan import recipes


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A stage whose loss is compared, with one seed.

    variant: what it belongs to. control: None for the variant itself, or what of it is a control.
    nodes: its line and all that this reads, by stage name, inputs first. stage: its own name among them.
    """

    variant: Variant
    control: ControlStage | None
    seed: int
    stage: str
    fingerprint: str
    nodes: Mapping[str, Node]

    @property
    def flops(self) -> int:
        """Model FLOPs of its line, ancestors included."""
        return self.nodes[self.stage].lineage_flops


@dataclass(frozen=True)
class StudyGraph:
    """leaves: in the order of variants, seeds, and each one's controls; equal fingerprints are one computation.
    nodes: every stage that any leaf needs, by fingerprint, inputs first.
    """

    leaves: Sequence[Leaf]
    nodes: Mapping[str, Node] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Model FLOPs of everything, each stage once."""
        return sum(node.flops for node in self.nodes.values())

    @property
    def naive_flops(self) -> int:
        """Model FLOPs if every variant, with every seed, were an experiment of its own, its controls included."""
        return sum(leaf.flops for leaf in self.leaves)


def build(config: AblationConfig, compose: Compose) -> StudyGraph:
    """Expand every variant and its controls; UserError before anything runs for a mistake in any of them."""
    leaves: list[Leaf] = []
    nodes: dict[str, Node] = {}
    fingerprints: dict[str, tuple[str, ...]] = {}
    reference = baseline(config)
    for variant in variants(config):
        scratch_of = config.controls.scratch_of
        from_scratch = scratch_of == "all" or (scratch_of == "baseline" and variant == reference)
        own: list[str] = []
        for seed, values in zip(config.seeds, compose(variant.overrides, config.seeds), strict=True):
            experiment, target = _experiment(config, values)
            found = list(controls(graph.build(experiment), target, config.controls, from_scratch))
            stages = {**experiment.stages, **{control.name: control.stage for control in found}}
            built = graph.build(experiment.model_copy(update={"stages": stages}))
            digests = {name: identity.fingerprint(recipe) for name, recipe in recipes(built).items()}
            for name, control in [(target, None), *((control.name, control) for control in found)]:
                needed = {stage: built[stage] for stage in built if stage in with_ancestors(built, name)}
                leaves.append(
                    Leaf(
                        variant=variant, control=control, seed=seed, stage=name, fingerprint=digests[name], nodes=needed
                    )
                )
                nodes |= {digests[stage]: node for stage, node in needed.items() if digests[stage] not in nodes}
            own.append(digests[target])
        fingerprints[variant.name] = tuple(own)
    check_differences(config, fingerprints)
    return StudyGraph(leaves, nodes)


def _experiment(config: AblationConfig, values: Mapping[str, Any]) -> tuple[ExperimentConfig, str]:
    """A variant's experiment, with the ablation's budget; and the name of the stage that is compared."""
    experiment, target = graph.parse(values), config.objective.stage
    stage = experiment.stages.get(target)
    if stage is None:
        raise UserError(f"ablation.objective.stage: there is no stage '{target}'; {nearest(target, experiment.stages)}")
    experiment = _narrowed(experiment, target)
    if not isinstance(stage, PretrainStage):
        trained = [name for name, other in experiment.stages.items() if isinstance(other, PretrainStage)]
        raise UserError(
            f"ablation.objective.stage: '{target}' is a {stage.kind} stage and trains nothing; "
            f"{nearest(target, trained)}"
        )
    if config.objective.is_recovery and not isinstance(_source(experiment, stage), GrowthStage):
        raise UserError(
            f"ablation.objective.metric: '{target}' reports no {config.objective.metric}, it does not continue a "
            "growth; use loss_end, or a stage whose source is a scale_up or scale_out stage"
        )
    tokens = _budget_tokens(config, experiment, target)
    if tokens is None:
        return experiment, target
    try:
        stage.check_tokens(tokens)
    except ValueError as error:
        raise UserError(f"ablation.budget: stage {target}: {error}") from None
    stages = {**experiment.stages, target: stage.model_copy(update={"total_tokens": tokens, "equal_flops": None})}
    return experiment.model_copy(update={"stages": stages}), target


def _source(experiment: ExperimentConfig, stage: PretrainStage) -> Stage | None:
    return experiment.stages.get(stage.inputs.get("source", ""))


def _narrowed(experiment: ExperimentConfig, target: str) -> ExperimentConfig:
    """Only what leads to one stage: what else the experiment has is not run, and need not fit."""

    def read(name: str) -> list[str]:
        stage = experiment.stages[name]
        equal = getattr(stage, "equal_flops", None)
        return [each for each in (*stage.inputs.values(), equal) if each in experiment.stages]

    needed = {target, *ancestors(target, read)}
    stages = {name: stage for name, stage in experiment.stages.items() if name in needed}
    return experiment.model_copy(update={"stages": stages, "report": ReportConfig(chain=[], control=None)})


def _budget_tokens(config: AblationConfig, experiment: ExperimentConfig, target: str) -> int | None:
    if config.budget.flops is None:
        return config.budget.tokens
    node = graph.build(experiment)[target]
    assert node.model is not None and isinstance(node.stage, PretrainStage)
    per_token = node.model.flops_per_token(node.stage.sequence_length)
    batches = int(config.budget.flops // (per_token * node.stage.batch_tokens))
    return batches * node.stage.batch_tokens


def with_ancestors(nodes: Mapping[str, Node], name: str) -> set[str]:
    """A stage and all that it reads, directly or not."""
    return {name, *ancestors(name, lambda each: nodes[each].stage.inputs.values())}
