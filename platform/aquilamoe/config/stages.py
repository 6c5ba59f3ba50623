"""The stages of an experiment: nodes of its graph, by kind."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from aquilamoe.config.corpus import (
    CLEANING,
    VALIDATION_FRACTION,
    CleaningConfig,
    SourceConfig,
    ValidationFraction,
    check_cleaned,
)
from aquilamoe.config.evaluation import GenerationConfig
from aquilamoe.config.external import Before
from aquilamoe.config.growth import GrowthConfig, UpcyclingConfig
from aquilamoe.config.inheritance import without_null
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.numbers import (
    Config,
    Extended,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from aquilamoe.config.steps import OptimizerConfig, RouterConfig, ScheduleConfig, SpikesConfig

KIND = "Kind of the stage: what it computes"
Precision = Literal["bf16", "bf16_master", "fp32"]
PRECISIONS = (
    "fp32 | bf16: autocast, weights and optimizer in float32; on CPUs without AMX or AVX-512 20 times slower than fp32 "
    "| bf16_master: bf16 weights, with float32 copies in the optimizer, which are saved"
)
SequenceLength = Annotated[Int, Field(ge=2, description="Length of a sequence [tokens]")]


class StageConfig(Config):
    """A node of the graph. `inputs` names the stages it reads, by role.

    `places` are fields of where something is, not of what it is: they are part of no recipe.
    """

    kind: str = Field(description="Kind of the stage: what it computes")
    inputs: dict[str, str] = Field(description="Stages that it reads, by role; null takes one of the template away")
    roles: ClassVar[tuple[str, ...]] = ()
    optional_roles: ClassVar[tuple[str, ...]] = ()
    any_role: ClassVar[bool] = False
    places: ClassVar[tuple[str, ...]] = ()

    @field_validator("inputs", mode="before")
    @classmethod
    def _leave_out_null(cls, inputs: Any) -> Any:
        """`role: null` takes an input away that a template names."""
        return without_null(inputs)

    @property
    def further(self) -> tuple[str, ...]:
        """Roles of further sources, of which there may be any number."""
        return ()

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        for role in self.roles:
            if role not in self.inputs:
                raise ValueError(f"inputs: '{role}' is missing; a {self.kind} stage reads {', '.join(self.roles)}")
        unknown = set(self.inputs) - {*self.roles, *self.optional_roles, *self.further}
        if unknown and not self.any_role:
            known = ", ".join([*self.roles, *self.optional_roles]) or "nothing"
            raise ValueError(f"inputs: a {self.kind} stage does not read '{min(unknown)}'; it reads {known}")
        return self


class CorpusStage(Extended, StageConfig):
    """Documents, read and split into training and validation."""

    kind: Literal["corpus"] = Field(description=KIND)
    sources: dict[str, SourceConfig] = Field(min_length=1, description="Parts of the corpus, by language")
    validation_fraction: ValidationFraction = VALIDATION_FRACTION
    cleaning: CleaningConfig | None = Field(default=None, description=CLEANING)
    added = ("cleaning",)

    @field_validator("sources", mode="before")
    @classmethod
    def _leave_out_sources(cls, sources: Any) -> Any:
        return without_null(sources)

    @model_validator(mode="after")
    def _check_cleaning(self) -> Self:
        check_cleaned(self.sources, self.cleaning)
        return self


class TokenizerStage(Extended, StageConfig):
    """A vocabulary that is learned from the corpus, or one from elsewhere, which reads no corpus.

    That is `path`, or the one of a checkpoint (`inputs.checkpoint`).
    """

    kind: Literal["tokenizer"] = Field(description=KIND)
    vocab_size: Annotated[Int, Field(ge=300)] | None = Field(
        description="Size of the byte-level BPE, special tokens included; null: as inputs.checkpoint has it [tokens]"
    )
    path: str | None = Field(
        default=None,
        description="Tokenizer from elsewhere: a folder with tokenizer.json, or a vocabulary in tiktoken's format; "
        "python://PACKAGE/FILE is one of an installed package; null: learned from the corpus [path]",
    )
    sha256: str | None = Field(default=None, description="SHA-256 of that file, hexadecimal; null: not checked")
    added = ("path", "sha256")
    optional_roles = ("corpus", "checkpoint")

    @model_validator(mode="before")
    @classmethod
    def _read_no_corpus(cls, values: Any) -> Any:
        """The corpus that a template names is no input of a vocabulary from elsewhere."""
        inputs = values.get("inputs") if isinstance(values, dict) else None
        if not isinstance(inputs, dict) or (values.get("path") is None and inputs.get("checkpoint") is None):
            return values
        return {**values, "inputs": {role: name for role, name in inputs.items() if role != "corpus"}}

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        checkpoint = self.inputs.get("checkpoint")
        if self.path is not None and checkpoint is not None:
            raise ValueError(
                f"path {self.path} and inputs.checkpoint {checkpoint}; set one of them, and the other to null"
            )
        if self.path is None and checkpoint is None and "corpus" not in self.inputs:
            raise ValueError("inputs: 'corpus' is missing; a tokenizer stage reads corpus, or has a path")
        if self.vocab_size is None and checkpoint is None:
            raise ValueError("vocab_size null takes the size of inputs.checkpoint, which is not set; set either")
        return self


class TokenizeStage(StageConfig):
    """The corpus as files of tokens."""

    kind: Literal["tokenize"] = Field(description=KIND)
    roles = ("corpus", "tokenizer")


class PretrainStage(StageConfig):
    """Train from scratch (`model`) or continue from a checkpoint (`inputs.source`)."""

    kind: Literal["pretrain"] = Field(description=KIND)
    roles = ("tokens",)
    optional_roles = ("source",)
    places = ("cluster",)

    cluster: dict[str, Any] = Field(
        default_factory=dict,
        exclude=True,
        description="Keys of the group cluster that this stage has otherwise, e.g. {workers: 8, parallel: fsdp}; a "
        "null key is as there; no part of the recipe",
    )
    model: ModelConfig | None = Field(description="Network to train from scratch; null: inputs.source is continued")
    total_tokens: PositiveInt | None = Field(description="Budget; null with equal_flops [tokens]")
    equal_flops: str | None = Field(
        description="Stage whose cumulative FLOPs are the budget of this line of checkpoints; null with total_tokens"
    )
    batch_tokens: PositiveInt = Field(
        description="Batch of an optimizer step over all workers; a multiple of sequence_length [tokens]"
    )
    sequence_length: SequenceLength
    mixture: dict[str, PositiveFloat] = Field(
        description="Share of each source of the corpus in training, normalised; null: data.mixture [weights]"
    )
    learning_rate: PositiveFloat = Field(description="Peak learning rate [dimensionless]")
    precision: Precision = Field(description=f"Precision of the training. {PRECISIONS}")
    optimizer_state: Literal["reset", "keep"] = Field(
        description="Moments of the optimizer at the start. reset: zeros | keep: those of inputs.source"
    )
    seed: Seed = Field(description="Seed of initialisation and data order")
    optimizer: OptimizerConfig = Field(description="Optimizer; a null key is as in the group optimizer")
    schedule: ScheduleConfig = Field(description="Learning-rate schedule; a null key is as in the group schedule")
    router: RouterConfig = Field(description="Balance of a Mixture of Experts; no effect on a dense model")
    spikes: SpikesConfig = Field(
        default=SpikesConfig(), description="Steps whose loss is not finite, or whose gradient norm is too large"
    )
    validate_every_tokens: PositiveInt = Field(description="Interval between validations [tokens]")
    validation_tokens: PositiveInt = Field(description="Held-out text of each language in a validation [tokens]")

    @field_validator("cluster", mode="before")
    @classmethod
    def _leave_out_null_keys(cls, cluster: Any) -> Any:
        """An experiment that is made of another takes keys of it away so."""
        return {} if cluster is None else without_null(cluster)

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if (self.total_tokens is None) == (self.equal_flops is None):
            raise ValueError("set one of total_tokens (tokens) and equal_flops (a stage name), and null the other")
        if self.batch_tokens % self.sequence_length:
            rounded = max(1, self.batch_tokens // self.sequence_length) * self.sequence_length
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is not a multiple of sequence_length {self.sequence_length}; "
                f"choose e.g. {rounded}"
            )
        if self.total_tokens is not None:
            self.check_tokens(self.total_tokens)
        if (self.model is None) == ("source" not in self.inputs):
            raise ValueError("set either model (train from scratch) or inputs.source (continue a checkpoint)")
        return self

    def check_tokens(self, total_tokens: int) -> None:
        """Refuse a budget that cannot hold one batch, or the schedule's warm-up and decay."""
        if total_tokens < self.batch_tokens:
            raise ValueError(
                f"total_tokens {total_tokens} is smaller than one batch (batch_tokens {self.batch_tokens}); "
                "raise total_tokens or lower batch_tokens"
            )
        ramps = self.schedule.warmup_tokens + self.schedule.decay_tokens
        if ramps > total_tokens:
            raise ValueError(
                f"warmup_tokens + decay_tokens = {ramps} exceed total_tokens {total_tokens}; shorten the schedule"
            )

    @property
    def num_steps(self) -> int:
        """Optimizer steps: the last, partial batch is not taken."""
        assert self.total_tokens is not None, "budgets are resolved before a stage is used"
        return self.total_tokens // self.batch_tokens


# What a stage of this kind has that takes the place of one that trains in a template.
TRAINING_KEYS = frozenset(PretrainStage.model_fields) - {"kind"}


class CheckpointStage(StageConfig):
    """A checkpoint from elsewhere. Its recipe is the SHA-256 of its files, wherever they are, and what is stated."""

    kind: Literal["checkpoint"] = Field(description=KIND)
    inputs: dict[str, str] = Field(default_factory=dict, description="Stages that it reads: none")
    path: str | None = Field(
        default=None,
        exclude=True,
        description="Directory with a Hugging Face checkpoint, or hf://ORG/NAME@REVISION; no part of the recipe [path]",
    )
    tokens_seen: NonNegativeInt | None = Field(
        default=None, description="Tokens that it was trained on; null: unknown [tokens]"
    )
    flops: NonNegativeFloat | None = Field(
        default=None, description="Model FLOPs of that training; null: unknown [FLOPs]"
    )
    files: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = Field(
        default_factory=dict, description="SHA-256 of its files by name, hexadecimal; read from them, never set"
    )
    model: ModelConfig | None = Field(default=None, description="Network; read from config.json, never set")
    places = ("path",)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_template(cls, values: Any) -> Any:
        """`stages.prepare={kind: checkpoint, path: DIR}` is merged with the keys of the stage that it replaces."""
        if not isinstance(values, dict) or values.get("files"):
            return values
        return {key: value for key, value in values.items() if key not in TRAINING_KEYS}

    @property
    def before(self) -> Before:
        """What is behind it."""
        return Before(self.tokens_seen, self.flops)


class GrowthStage(StageConfig):
    """What both growths share: a source, and the sizes that change (all others stay the source's)."""

    model: dict[str, Any] = Field(
        description="Sizes that change, of those in the group model; null: as the source, or as follows from the others"
    )
    optimizer_state: Literal["reset", "grow", "grow_asymmetric"] = Field(
        description="Moments of the optimizer. reset: none | grow: the source's, mapped as the weights are | "
        "grow_asymmetric: as grow, and zero for further copies, which then learn apart"
    )
    seed: Seed = Field(description="Seed of noise, routers and sampled maps")
    tolerance: PositiveFloat = Field(
        description="Largest difference of a logit that a function-preserving growth may show, before weights are "
        "rounded to 16 bits [ratio to the logits' spread]"
    )
    certificate_tokens: PositiveInt = Field(
        description="Held-out text on which source and target are compared [tokens]"
    )
    roles = ("source", "tokens")


class ScaleUpStage(GrowthStage):
    """A larger model out of the source; a Mixture of Experts keeps its experts, which become wider."""

    kind: Literal["scale_up"] = Field(description=KIND)
    growth: GrowthConfig = Field(description="Growth method; a null key is as in the group growth")


class ScaleOutStage(GrowthStage):
    """A Mixture of Experts out of a dense source or several (`source_2`, ...), or more experts out of experts."""

    kind: Literal["scale_out"] = Field(description=KIND)
    upcycling: UpcyclingConfig = Field(description="Upcycling; a null key is as in the group upcycling")

    @property
    def further(self) -> tuple[str, ...]:
        """Roles of the sources of a mix behind the first, in their order."""
        if self.upcycling.method != "mix" or self.upcycling.texts is None:
            return ()
        return tuple(f"source_{number}" for number in range(2, len(self.upcycling.texts) + 1))

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        for role in self.further:
            if role not in self.inputs:
                raise ValueError(
                    f"inputs: '{role}' is missing; upcycling.texts names {len(self.further) + 1} texts, name as many "
                    "sources"
                )
        if self.further and self.optimizer_state == "grow":
            raise ValueError("optimizer_state grow of a mix; moments of several sources are not mixed, use reset")
        return self


class EvaluateStage(Extended, StageConfig):
    """Held-out loss of every checkpoint among the inputs, on the validation split, and samples of its text."""

    kind: Literal["evaluate"] = Field(description=KIND)
    sequence_length: SequenceLength
    precision: Literal["bf16", "fp32"] = Field(description="Precision of the evaluation. bf16: autocast | fp32")
    validation_tokens: PositiveInt | None = Field(
        default=None, description="Held-out text of each language that is read; null: the whole split [tokens]"
    )
    prompts: dict[str, list[Annotated[str, Field(min_length=1)]]] = Field(
        default_factory=dict, description="Beginnings of the samples, by language"
    )
    generation: GenerationConfig = Field(default=GenerationConfig(), description="How the prompts are continued")
    added = ("validation_tokens",)
    roles = ("tokens",)
    any_role = True


class ExportStage(StageConfig):
    """The source as a directory that transformers opens."""

    kind: Literal["export"] = Field(description=KIND)
    dtype: Literal["float32", "bfloat16", "float16"] = Field(description="Data type of the exported weights")
    roles = ("source",)


Stage = Annotated[
    CorpusStage
    | TokenizerStage
    | TokenizeStage
    | PretrainStage
    | ScaleUpStage
    | ScaleOutStage
    | EvaluateStage
    | ExportStage
    | CheckpointStage,
    Field(discriminator="kind"),
]
