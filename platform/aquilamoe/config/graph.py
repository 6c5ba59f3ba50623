"""From an experiment's stages to a graph: references resolved, model sizes and FLOPs known, before anything runs."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from aquilamoe.ancestors import ancestors
from aquilamoe.config import passwords, plugins, stage_cluster, training
from aquilamoe.config.external import TOKENIZER, Before, ExternalCheckpoint
from aquilamoe.config.inheritance import without_null
from aquilamoe.config.messages import UserError, first_problem, nearest
from aquilamoe.config.node import Node as Node
from aquilamoe.config.node import grown
from aquilamoe.config.numbers import MAX_LAYERS
from aquilamoe.config.paths import local
from aquilamoe.config.relative import absolute_sizes
from aquilamoe.config.scaling import scaled
from aquilamoe.config.schema import (
    CheckpointStage,
    CorpusStage,
    EvaluateStage,
    ExperimentConfig,
    GrowthConfig,
    GrowthStage,
    ModelConfig,
    PretrainStage,
    ScaleOutStage,
    ScaleUpStage,
    Stage,
    TokenizerStage,
)

KIND_READ = {"corpus": "corpus", "tokenizer": "tokenizer", "tokens": "tokenize"}  # by role; all others read checkpoints
ABOUT_OUTPUTS = ("lineage", "why", "verify", "rebuild", "generate", "evaluate")  # actions that `checkpoint` is for
MAKE_CHECKPOINTS = ("checkpoint", "pretrain", "scale_up", "scale_out", "export")


def parse(values: Mapping[str, Any]) -> ExperimentConfig:
    """Validate a composed configuration at its `scale`; UserError with one line for the first problem."""
    passwords.learn(values)
    values = scaled(values)
    try:
        return ExperimentConfig.model_validate(values)
    except ValidationError as error:
        raise first_problem(error, ExperimentConfig, values) from None


def build(experiment: ExperimentConfig) -> dict[str, Node]:
    """Return the nodes in an order in which every stage comes after what it reads."""
    builder = _Builder(experiment)
    for name in experiment.stages:
        stage_cluster.of(builder.resolve(name), experiment.cluster)  # its checks apply before anything runs
    for name in experiment.report.chain:
        builder.check_makes_checkpoint(name, "report.chain")
    if experiment.report.control is not None:
        builder.check_makes_checkpoint(experiment.report.control, "report.control")
    return builder.nodes


def until(nodes: Mapping[str, Node], last: str | None) -> dict[str, Node]:
    """The stage `last` and everything that it is made from; all stages where it is None."""
    if last is None:
        return dict(nodes)
    if last not in nodes:
        raise UserError(f"until: there is no stage '{last}'; {nearest(last, nodes)}")
    kept, waiting = set(), [last]
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.add(name)
            waiting += nodes[name].stage.inputs.values()
    return {name: node for name, node in nodes.items() if name in kept}


class _Builder:
    """Depth-first over inputs and `equal_flops`, so that a stage's facts are known before they are needed."""

    def __init__(self, experiment: ExperimentConfig) -> None:
        self.experiment, self.stages = experiment, experiment.stages
        self.nodes: dict[str, Node] = {}
        self.external: dict[str, ExternalCheckpoint] = {}
        self.path: list[str] = []

    def resolve(self, name: str) -> Node:
        if name in self.nodes:
            return self.nodes[name]
        if name in self.path:
            raise UserError(
                f"stages: {' -> '.join([*self.path, name])} is a cycle; make one of them read another stage"
            )
        self.path.append(name)
        stage = self.stages[name]
        for role, source in stage.inputs.items():
            self._check_input(f"stages.{name}.inputs.{role}", role, source)
            self.resolve(source)
        node = self._node(name, stage)
        self.path.pop()
        self.nodes[name] = node
        return node

    def _check_exists(self, name: str, required_by: str) -> None:
        if name not in self.stages:
            raise UserError(f"{required_by}: there is no stage '{name}'; {nearest(name, self.stages)}")

    def _check_input(self, where: str, role: str, name: str) -> None:
        self._check_exists(name, where)
        if role not in KIND_READ:
            self.check_makes_checkpoint(name, where)
        elif self.stages[name].kind != KIND_READ[role]:
            fitting = [other for other, stage in self.stages.items() if stage.kind == KIND_READ[role]]
            raise UserError(
                f"{where}: stage '{name}' is of kind {self.stages[name].kind}, this input reads {KIND_READ[role]}; "
                f"{nearest(name, fitting)}"
            )

    def check_makes_checkpoint(self, name: str, where: str) -> None:
        self._check_exists(name, where)
        if self.stages[name].kind not in MAKE_CHECKPOINTS:
            fitting = [other for other, stage in self.stages.items() if stage.kind in MAKE_CHECKPOINTS]
            raise UserError(f"{where}: stage '{name}' makes no checkpoint; {nearest(name, fitting)}")

    def _node(self, name: str, stage: Stage) -> Node:
        source = self.nodes[stage.inputs["source"]] if "source" in stage.inputs else None
        if isinstance(stage, PretrainStage):
            return self._pretrain(name, stage, source)
        if isinstance(stage, CheckpointStage):
            return self._external(name, stage)
        if isinstance(stage, TokenizerStage) and "checkpoint" in stage.inputs:
            return Node(name=name, stage=self._tokenizer_of(name, stage, stage.inputs["checkpoint"]))
        if isinstance(stage, EvaluateStage):
            self._check_evaluation(name, stage)
            return Node(name=name, stage=stage)
        if source is None:
            return Node(name=name, stage=stage)
        model = source.model
        assert model is not None, "an input `source` makes a checkpoint"
        if isinstance(stage, GrowthStage):
            self._check_tokenizer(name, stage, source.name)
            if stage.optimizer_state != "reset":
                training.moments_of(self.nodes, source, f"stages.{name}.optimizer_state", "grow")
            growth = stage.growth if isinstance(stage, ScaleUpStage) else None
            others = self._other_sources(name, stage)
            sizes = {"num_experts": 1 + len(others), **without_null(stage.model)} if others else stage.model
            model = grown_model(model, sizes, f"stages.{name}.model", growth)
            stage = stage.model_copy(update={"model": model.model_dump()})
            if others and isinstance(stage, ScaleOutStage):
                return self._mix(name, stage, model, [source, *others])
        return Node(
            name=name,
            stage=stage,
            model=model,
            source_model=source.model,
            ancestor_tokens=source.lineage_tokens,
            ancestor_flops=source.lineage_flops,
            before=source.before,
            growths=grown(source, stage, model),
            num_trainings=source.num_trainings,
        )

    def _other_sources(self, name: str, stage: Stage) -> list[Node]:
        """The sources of a mix behind the first; UserError for a text that the corpus does not have."""
        if not isinstance(stage, ScaleOutStage) or not stage.further:
            return []
        tokens = stage.inputs["tokens"]
        for of_corpus in ancestors(tokens, lambda each: self.stages[each].inputs.values()):
            corpus = self.nodes[of_corpus].stage
            if not isinstance(corpus, CorpusStage):
                continue
            for text in set(stage.upcycling.texts or ()) - corpus.sources.keys():
                raise UserError(
                    f"stages.{name}.upcycling.texts: '{text}' is not in the corpus; {nearest(text, corpus.sources)}"
                )
        for role in stage.further:
            self._check_tokenizer(name, stage, stage.inputs[role])
        return [self.nodes[stage.inputs[role]] for role in stage.further]

    def _mix(self, name: str, stage: ScaleOutStage, model: ModelConfig, sources: list[Node]) -> Node:
        """A line of checkpoints that several lines end in: what these have in common was trained once."""
        lines = [each for source in sources for each in self._line(source.name)]
        nodes = [self.nodes[each] for each in dict.fromkeys(lines)]
        own = {id(node.before): node.before for node in nodes if node.is_external and node.before is not None}
        return Node(
            name=name,
            stage=stage,
            model=model,
            source_model=sources[0].model,
            other_models=tuple(source.model for source in sources[1:] if source.model is not None),
            ancestor_tokens=sum(node.tokens for node in nodes),
            ancestor_flops=sum(node.flops for node in nodes),
            before=Before.sum(list(own.values())),
            growths=grown(sources[0], stage, model),
            num_trainings=sources[0].num_trainings,
        )

    def _external(self, name: str, stage: CheckpointStage) -> Node:
        """Read what a checkpoint from elsewhere is; a run may download it."""
        experiment, where = self.experiment, f"stages.{name}"
        if experiment.action in ABOUT_OUTPUTS and stage.path is not None and stage.path == experiment.checkpoint:
            raise UserError(
                f"{where}.path: '{stage.path}' is what action={experiment.action} is about, by checkpoint; name the "
                "directory of the checkpoint from elsewhere in source=DIR"
            )
        root, downloads = local(experiment.paths.root).absolute(), experiment.action == "run"
        found: ExternalCheckpoint = plugins.load("stages", stage.kind).inspect(stage, where, root, downloads)
        self.external[name] = found
        stage = stage.model_copy(update={"model": found.model, "files": dict(found.files)})
        return Node(name=name, stage=stage, model=found.model, before=stage.before)

    def _tokenizer_of(self, name: str, stage: TokenizerStage, checkpoint: str) -> TokenizerStage:
        """The stage with the size of the checkpoint's tokenizer, where it states none."""
        where = f"stages.{name}.inputs.checkpoint"
        if checkpoint not in self.external:
            remedy = nearest(checkpoint, self.external)
            raise UserError(
                f"{where}: '{checkpoint}' is no stage of kind checkpoint, whose tokenizer it takes; {remedy}"
            )
        found = self.external[checkpoint].vocabulary
        if found is None and stage.vocab_size is None:
            raise UserError(
                f"{where}: the checkpoint of '{checkpoint}' has no {TOKENIZER}; write one with transformers "
                "(AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)), or set path to a tokenizer"
            )
        return stage if stage.vocab_size is not None else stage.model_copy(update={"vocab_size": found})

    def _check_tokenizer(self, name: str, stage: Stage, checkpoint: str) -> None:
        """Refuse tokens for a line of checkpoints that another tokenizer has made than the one of its beginning."""
        own = next((each for each in self._line(checkpoint) if each in self.external), None)
        files = self.external[own].files if own else {}
        if own is None or TOKENIZER not in files or "tokens" not in stage.inputs:
            return
        tokens = stage.inputs["tokens"]
        for each in ancestors(tokens, lambda of: self.stages[of].inputs.values()):
            upstream = self.stages[each]
            if isinstance(upstream, TokenizerStage):
                other = self.external.get(upstream.inputs.get("checkpoint", ""))
                if other is None or other.files.get(TOKENIZER) != files[TOKENIZER]:
                    raise UserError(
                        f"stages.{name}.inputs.tokens: '{tokens}' has the ids of tokenizer '{each}', '{checkpoint}' "
                        f"those of '{own}'; set stages.{each}.inputs.checkpoint to {own}, and its vocab_size to null"
                    )

    def _line(self, name: str) -> list[str]:
        """A checkpoint and the checkpoints that it comes from, nearest first."""

        def sources(each: str) -> list[str]:
            stage = self.stages[each]
            return [stage.inputs[role] for role in ("source", *stage.further) if role in stage.inputs]

        return [name, *ancestors(name, sources)]

    def _pretrain(self, name: str, stage: PretrainStage, source: Node | None) -> Node:
        model = source.model if source else stage.model
        assert model is not None, "the schema requires a model or a source"
        self._check_computed(f"stages.{name}{'.model' if stage.model else ''}", model)
        _check_length(f"stages.{name}.sequence_length", stage.sequence_length, model)
        self._check_corpus(name, stage, model)
        if source:
            self._check_tokenizer(name, stage, source.name)
        if stage.optimizer_state == "keep" and source:
            training.check_moments(self.nodes, f"stages.{name}.optimizer_state", source, stage)
        training.check_groups(f"stages.{name}.optimizer.groups", stage, source)
        tokens_before, flops_before = (source.lineage_tokens, source.lineage_flops) if source else (0, 0)
        per_token = model.flops_per_token(stage.sequence_length)
        if stage.equal_flops is not None:
            stage = self._equalized(name, stage, flops_before, per_token)
        tokens = stage.num_steps * stage.batch_tokens
        return Node(
            name=name,
            stage=stage,
            model=model,
            source_model=source.model if source else None,
            tokens=tokens,
            flops=tokens * per_token,
            ancestor_tokens=tokens_before,
            ancestor_flops=flops_before,
            before=source.before if source else None,
            growths=source.growths if source else (),
            num_trainings=1 + (source.num_trainings if source else 0),
        )

    def _equalized(self, name: str, stage: PretrainStage, flops_before: int, per_token: int) -> PretrainStage:
        """Give the stage the tokens that bring its line of checkpoints to the FLOPs of the other, less a batch."""
        assert stage.equal_flops is not None
        where = f"stages.{name}.equal_flops"
        self.check_makes_checkpoint(stage.equal_flops, where)
        flops = self.resolve(stage.equal_flops).lineage_flops
        total = (flops - flops_before) // per_token // stage.batch_tokens * stage.batch_tokens
        if total <= 0:
            raise UserError(
                f"{where}: the line of '{stage.equal_flops}' costs {flops:.3g} FLOPs, this one {flops_before:.3g} "
                f"before it trains and {per_token * stage.batch_tokens:.3g} a batch; name a stage that costs more"
            )
        try:
            stage.check_tokens(total)
        except ValueError as error:
            raise UserError(f"stages.{name}: {error}") from None
        return stage.model_copy(update={"total_tokens": total, "equal_flops": None})

    def _check_evaluation(self, name: str, stage: EvaluateStage) -> None:
        for role, checkpoint in stage.inputs.items():
            model = self.nodes[checkpoint].model
            if role not in KIND_READ and model is not None:
                self._check_computed(f"stages.{name}.inputs.{role}", model)
                self._check_tokenizer(name, stage, checkpoint)
                _check_length(f"stages.{name}.sequence_length", stage.sequence_length, model)

    def _check_computed(self, where: str, model: ModelConfig) -> None:
        if model.uncomputed:
            known = "" if model.particulars else "linear, yarn or llama3, or "
            raise UserError(f"{where}: {model.uncomputed}; choose {known}another checkpoint")

    def _check_corpus(self, name: str, stage: PretrainStage, model: ModelConfig) -> None:
        """The tokenizer's ids must be in the model's vocabulary, the mixture's languages in the corpus."""
        tokens = stage.inputs["tokens"]
        for name_of in [tokens, *ancestors(tokens, lambda each: self.stages[each].inputs.values())]:
            upstream = self.nodes[name_of].stage
            if isinstance(upstream, TokenizerStage) and (upstream.vocab_size or 0) > model.vocab_size:
                raise UserError(
                    f"stages.{name}: the model's vocab_size {model.vocab_size} is smaller than the tokenizer's "
                    f"{upstream.vocab_size}; raise model.vocab_size"
                )
            if isinstance(upstream, CorpusStage) and (unknown := stage.mixture.keys() - upstream.sources.keys()):
                source = min(unknown)
                raise UserError(
                    f"stages.{name}.mixture.{source}: not in the corpus; {nearest(source, upstream.sources)}"
                )


def _check_length(where: str, sequence_length: int, model: ModelConfig) -> None:
    if sequence_length > model.max_position_embeddings:
        raise UserError(
            f"{where}: {sequence_length} exceeds the model's max_position_embeddings "
            f"{model.max_position_embeddings}; lower the one or raise the other"
        )


def grown_model(
    source: ModelConfig, changes: Mapping[str, Any], where: str, growth: GrowthConfig | None = None
) -> ModelConfig:
    """Apply the sizes that a growth names (not None) to the source.

    What is not named stays, but for what follows: the number of heads from hidden_size at constant head_dim (made up to
    whole groups), rms_norm_eps from the growth's norm, and the size of the first experts from the feed-forward.
    """
    changes = absolute_sizes(source, changes, where)
    values = {**source.model_dump(), **({} if source.is_moe else {"moe_intermediate_size": None}), **changes}
    hidden_size, head_dim = values["hidden_size"], values["head_dim"]
    if isinstance(hidden_size, int) and isinstance(head_dim, int) and hidden_size > 0 and head_dim > 0:
        if "hidden_size" in changes and "num_attention_heads" not in changes:
            channels = source.num_attention_heads * source.head_dim  # of all queries: Qwen3 has more than hidden_size
            heads, groups = channels * hidden_size // source.hidden_size // head_dim, values["num_key_value_heads"]
            values["num_attention_heads"] = heads + (-heads % groups if isinstance(groups, int) and groups > 0 else 0)
        if source.rope_scaling is not None and not head_dim % source.head_dim and "rope_scaling" not in changes:
            values["rope_scaling"] = source.rope_scaling.for_larger_heads(head_dim // source.head_dim).model_dump()
        if growth is not None and "rms_norm_eps" not in changes:
            values["rms_norm_eps"] = growth.grown_eps(source, hidden_size)
    if values["num_experts"] and source.particulars is not None and "particulars" not in changes:
        values["particulars"] = source.with_experts
    if growth is not None:
        values |= _of_layers(source, values["num_hidden_layers"], growth, changes)
    try:
        grown = ModelConfig.model_validate(values)
    except ValidationError as error:
        raise first_problem(error, ModelConfig, values, where) from None
    neurons = changes.get("intermediate_size", grown.intermediate_size)
    if source.is_moe and grown.intermediate_size != neurons:
        raise UserError(
            f"{where}.intermediate_size: {neurons}, but every layer has experts, of {grown.moe_intermediate_size} "
            "neurons; set moe_intermediate_size"
        )
    return grown


def _of_layers(
    source: ModelConfig, num_layers: Any, growth: GrowthConfig, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields that describe layers, for those of the target; what is named stays as it is."""
    if type(num_layers) is not int or not 0 < num_layers <= MAX_LAYERS:
        return {}  # refused by the schema
    layers = growth.layer_sources(source.num_hidden_layers, num_layers)
    if len(layers) != num_layers or max(layers) >= source.num_hidden_layers:  # refused by the rules of growth
        layers = tuple(min(layer, source.num_hidden_layers - 1) for layer in range(num_layers))
    types = [source.layer_types[layer] for layer in layers] if source.layer_types else []
    dense = [layer for layer, origin in enumerate(layers) if origin in source.mlp_only_layers]
    found = {"layer_types": types, "mlp_only_layers": dense}
    if source.particulars is not None and source.particulars.nope_layers:
        nope = tuple(layer for layer, origin in enumerate(layers) if origin in source.particulars.nope_layers)
        found["particulars"] = source.particulars.model_copy(update={"nope_layers": nope}).model_dump()
    return {key: value for key, value in found.items() if key not in changes}
