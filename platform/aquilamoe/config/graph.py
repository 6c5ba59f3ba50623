"""From an experiment's stages to a graph: references resolved, model sizes and FLOPs known, before anything runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from aquilamoe.config.messages import UserError, first_problem, nearest
from aquilamoe.config.schema import (
    CorpusStage,
    ExperimentConfig,
    GrowthStage,
    ModelConfig,
    PretrainStage,
    Stage,
    TokenizerStage,
)


@dataclass(frozen=True)
class Node:
    """A stage in its graph.

    name: the stage's name in the experiment.
    stage: its configuration; budgets are tokens, and a growth's `model` holds every size, not only those that change.
    model: what its checkpoint is, None for stages that make none.
    source_model: what its source checkpoint is, None without one.
    tokens, flops: trained in this stage (model FLOPs, see `ModelConfig.flops_per_token`).
    ancestor_tokens, ancestor_flops: of everything before it on its line of checkpoints.
    """

    name: str
    stage: Stage
    model: ModelConfig | None = None
    source_model: ModelConfig | None = None
    tokens: int = 0
    flops: int = 0
    ancestor_tokens: int = 0
    ancestor_flops: int = 0

    @property
    def lineage_tokens(self) -> int:
        return self.ancestor_tokens + self.tokens

    @property
    def lineage_flops(self) -> int:
        return self.ancestor_flops + self.flops


def parse(values: Mapping[str, Any]) -> ExperimentConfig:
    """Validate a composed configuration; UserError with one line for the first problem."""
    try:
        return ExperimentConfig.model_validate(values)
    except ValidationError as error:
        raise first_problem(error, ExperimentConfig, values) from None


def build(experiment: ExperimentConfig) -> dict[str, Node]:
    """Return the nodes in an order in which every stage comes after what it reads."""
    builder = _Builder(experiment.stages)
    for name in experiment.stages:
        builder.resolve(name)
    for name in [*experiment.report.chain, *([experiment.report.control] if experiment.report.control else [])]:
        if name not in experiment.stages:
            raise UserError(f"report: there is no stage '{name}'; {nearest(name, experiment.stages)}")
    return builder.nodes


class _Builder:
    """Depth-first over inputs and `equal_flops`, so that a stage's facts are known before they are needed."""

    def __init__(self, stages: Mapping[str, Stage]) -> None:
        self.stages = stages
        self.nodes: dict[str, Node] = {}
        self.path: list[str] = []

    def resolve(self, name: str, asked_by: str = "") -> Node:
        if name in self.nodes:
            return self.nodes[name]
        if name not in self.stages:
            raise UserError(f"{asked_by}: there is no stage '{name}'; {nearest(name, self.stages)}")
        if name in self.path:
            raise UserError(
                f"stages: {' -> '.join([*self.path, name])} is a cycle; make one of them read another stage"
            )
        self.path.append(name)
        stage = self.stages[name]
        for role, source in stage.inputs.items():
            self.resolve(source, f"stages.{name}.inputs.{role}")
        node = self._node(name, stage)
        self.path.pop()
        self.nodes[name] = node
        return node

    def _node(self, name: str, stage: Stage) -> Node:
        source = self.nodes.get(stage.inputs.get("source", ""))
        if "source" in stage.inputs and (source is None or source.model is None):
            raise UserError(
                f"stages.{name}.inputs.source: stage '{stage.inputs['source']}' makes no checkpoint; "
                "name a pretrain, scale_up or scale_out stage"
            )
        if isinstance(stage, PretrainStage):
            return self._pretrain(name, stage, source)
        if source is None or source.model is None:
            return Node(name, stage)
        model = source.model
        if isinstance(stage, GrowthStage):
            model = grown_model(source.model, stage.model, f"stages.{name}.model")
            stage = stage.model_copy(update={"model": model.model_dump()})
        return Node(name, stage, model, source.model, 0, 0, source.lineage_tokens, source.lineage_flops)

    def _pretrain(self, name: str, stage: PretrainStage, source: Node | None) -> Node:
        model = source.model if source else stage.model
        assert model is not None, "the schema asks for a model or a source"
        self._check_length(name, stage, model)
        self._check_corpus(name, stage, model)
        tokens_before, flops_before = (source.lineage_tokens, source.lineage_flops) if source else (0, 0)
        per_token = model.flops_per_token(stage.sequence_length)
        if stage.equal_flops is not None:
            target = self.resolve(stage.equal_flops, f"stages.{name}.equal_flops").lineage_flops
            total = (target - flops_before) // per_token // stage.batch_tokens * stage.batch_tokens
            stage = stage.model_copy(update={"total_tokens": total, "equal_flops": None})
            try:
                stage.check_tokens(total)
            except ValueError as error:
                raise UserError(f"stages.{name}: {error}") from None
        tokens = stage.num_steps * stage.batch_tokens
        source_model = source.model if source else None
        return Node(name, stage, model, source_model, tokens, tokens * per_token, tokens_before, flops_before)

    def _check_length(self, name: str, stage: PretrainStage, model: ModelConfig) -> None:
        if stage.sequence_length > model.max_position_embeddings:
            raise UserError(
                f"stages.{name}.sequence_length: {stage.sequence_length} exceeds the model's max_position_embeddings "
                f"{model.max_position_embeddings}; lower the one or raise the other"
            )

    def _check_corpus(self, name: str, stage: PretrainStage, model: ModelConfig) -> None:
        """The tokenizer's ids must be in the model's vocabulary, the mixture's languages in the corpus."""
        for upstream in self._upstream(stage.inputs["tokens"]):
            if isinstance(upstream, TokenizerStage) and upstream.vocab_size > model.vocab_size:
                raise UserError(
                    f"stages.{name}: the model's vocab_size {model.vocab_size} is smaller than the tokenizer's "
                    f"{upstream.vocab_size}; raise model.vocab_size"
                )
            if isinstance(upstream, CorpusStage) and (unknown := stage.mixture.keys() - upstream.sources.keys()):
                source = min(unknown)
                raise UserError(
                    f"stages.{name}.mixture.{source}: not in the corpus; {nearest(source, upstream.sources)}"
                )

    def _upstream(self, name: str) -> Iterator[Stage]:
        yield self.stages[name]
        for source in self.stages[name].inputs.values():
            yield from self._upstream(source)


def grown_model(source: ModelConfig, changes: Mapping[str, Any], where: str) -> ModelConfig:
    """Apply the sizes that a growth names (not None); head_dim stays, and heads not named follow hidden_size."""
    changes = {field: value for field, value in changes.items() if value is not None}
    values = {**source.model_dump(), **changes}
    if "num_attention_heads" not in changes and isinstance(hidden_size := changes.get("hidden_size"), int):
        values["num_attention_heads"] = hidden_size // source.head_dim
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise first_problem(error, ModelConfig, values, where) from None
