"""Every configuration model. They are frozen and refuse unknown keys.

Defaults are in YAML, which lists every key; what few experiments need has the same default here, for who composes
configurations in Python.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from aquilamoe.config.corpus import (
    VALIDATION_FRACTION,
    CleaningConfig,
    Extended,
    SourceConfig,
    check_cleaned,
    with_mixture,
)
from aquilamoe.config.evaluation import EvaluationConfig, GenerationConfig
from aquilamoe.config.growth import GrowthConfig, UpcyclingConfig
from aquilamoe.config.inheritance import inherited, without_null
from aquilamoe.config.keys import AsTyped
from aquilamoe.config.network import (
    Config,
    Float,
    Int,
    ModelConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from aquilamoe.config.passwords import masked
from aquilamoe.config.steps import OptimizerConfig, RouterConfig, ScheduleConfig, SpikesConfig
from aquilamoe.config.tracking import TrackingConfig

Precision = Literal["bf16", "bf16_master", "fp32"]
# It names files, of which the longest adds some 50 characters; file systems allow 255 bytes.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]


class DataConfig(Config):
    """The corpus by language, and the share of each language in training (`mixture`, normalised to a sum of 1).

    folder: what the paths of some corpora are composed of; nothing else reads it.
    """

    folder: str | None = None
    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    mixture: dict[str, PositiveFloat]
    validation_fraction: Annotated[Float, Field(gt=0.0, lt=0.5)] = VALIDATION_FRACTION
    cleaning: CleaningConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        return with_mixture(values)


class StageConfig(Config):
    """A node of the graph. `inputs` names the stages it reads, by role."""

    kind: str
    inputs: dict[str, str]
    roles: ClassVar[tuple[str, ...]] = ()
    optional_roles: ClassVar[tuple[str, ...]] = ()
    any_role: ClassVar[bool] = False

    @field_validator("inputs", mode="before")
    @classmethod
    def _leave_out_null(cls, inputs: Any) -> Any:
        """`role: null` takes an input away that a template names."""
        return without_null(inputs)

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        for role in self.roles:
            if role not in self.inputs:
                raise ValueError(f"inputs: '{role}' is missing; a {self.kind} stage reads {', '.join(self.roles)}")
        unknown = set(self.inputs) - {*self.roles, *self.optional_roles}
        if unknown and not self.any_role:
            known = ", ".join([*self.roles, *self.optional_roles]) or "nothing"
            raise ValueError(f"inputs: a {self.kind} stage does not read '{min(unknown)}'; it reads {known}")
        return self


class CorpusStage(Extended, StageConfig):
    kind: Literal["corpus"]
    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    validation_fraction: Annotated[Float, Field(gt=0.0, lt=0.5)] = VALIDATION_FRACTION
    cleaning: CleaningConfig | None = None
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
    """A vocabulary that is learned from the corpus, or one from elsewhere (`path`), which reads no corpus."""

    kind: Literal["tokenizer"]
    vocab_size: Annotated[Int, Field(ge=300)]
    path: str | None = None
    sha256: str | None = None
    added = ("path", "sha256")
    optional_roles = ("corpus",)

    @model_validator(mode="before")
    @classmethod
    def _read_no_corpus(cls, values: Any) -> Any:
        """The corpus that a template names is no input of a vocabulary from elsewhere."""
        if not isinstance(values, dict) or values.get("path") is None or not isinstance(values.get("inputs"), dict):
            return values
        return {**values, "inputs": {role: name for role, name in values["inputs"].items() if role != "corpus"}}

    @model_validator(mode="after")
    def _check_corpus(self) -> Self:
        if self.path is None and "corpus" not in self.inputs:
            raise ValueError("inputs: 'corpus' is missing; a tokenizer stage reads corpus, or has a path")
        return self


class TokenizeStage(StageConfig):
    kind: Literal["tokenize"]
    roles = ("corpus", "tokenizer")


class PretrainStage(StageConfig):
    """Train from scratch (`model`) or continue from a checkpoint (`inputs.source`)."""

    kind: Literal["pretrain"]
    roles = ("tokens",)
    optional_roles = ("source",)

    model: ModelConfig | None
    total_tokens: PositiveInt | None
    equal_flops: str | None
    batch_tokens: PositiveInt
    sequence_length: Annotated[Int, Field(ge=2)]
    mixture: dict[str, PositiveFloat]
    learning_rate: PositiveFloat
    precision: Precision
    optimizer_state: Literal["reset", "keep"]
    seed: Seed
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    router: RouterConfig
    spikes: SpikesConfig = SpikesConfig()
    validate_every_tokens: PositiveInt
    validation_tokens: PositiveInt

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


class GrowthStage(StageConfig):
    """What both growths share: a source, and the sizes that change (all others stay the source's)."""

    model: dict[str, Any]
    optimizer_state: Literal["reset", "grow"]
    seed: Seed
    tolerance: PositiveFloat
    certificate_tokens: PositiveInt
    roles = ("source", "tokens")


class ScaleUpStage(GrowthStage):
    kind: Literal["scale_up"]
    growth: GrowthConfig


class ScaleOutStage(GrowthStage):
    kind: Literal["scale_out"]
    upcycling: UpcyclingConfig


class EvaluateStage(StageConfig):
    """Held-out loss of every checkpoint among the inputs, on the whole validation split, and samples of its text."""

    kind: Literal["evaluate"]
    sequence_length: Annotated[Int, Field(ge=2)]
    precision: Literal["bf16", "fp32"]
    prompts: dict[str, list[Annotated[str, Field(min_length=1)]]] = Field(default_factory=dict)
    generation: GenerationConfig = GenerationConfig()
    roles = ("tokens",)
    any_role = True


class ExportStage(StageConfig):
    kind: Literal["export"]
    dtype: Literal["float32", "bfloat16", "float16"]
    roles = ("source",)


Stage = Annotated[
    CorpusStage
    | TokenizerStage
    | TokenizeStage
    | PretrainStage
    | ScaleUpStage
    | ScaleOutStage
    | EvaluateStage
    | ExportStage,
    Field(discriminator="kind"),
]


class ClusterConfig(Config):
    """Where and how stages run. Nothing here enters a fingerprint."""

    executor: Literal["ray", "process"]
    address: str | None
    workers: PositiveInt
    cpus_per_worker: PositiveInt
    gpus_per_worker: NonNegativeInt
    gpu_memory_bytes: NonNegativeInt
    max_failures: NonNegativeInt
    micro_batch_tokens: PositiveInt
    checkpoint_every_tokens: PositiveInt
    compile: bool
    flops_per_s: PositiveFloat | None
    device_flops_per_s: PositiveFloat | None = None
    mfu: Annotated[Float, Field(gt=0.0, le=1.0)] | None = None
    price_per_device_hour: NonNegativeFloat = 0.0
    device_watts: NonNegativeFloat = 0.0
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    shard_size: PositiveInt | None = None
    expert_parallel: PositiveInt = 1
    activation_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "explicit"] = "auto"
    experts: Literal["auto", "grouped", "loop"] = "auto"
    min_workers: PositiveInt | None = None
    start_timeout_s: PositiveFloat = 300.0
    data_processes: PositiveInt | None = None
    runtime_env: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_runtime_env(self) -> Self:
        if self.runtime_env and self.address is None:
            raise ValueError(
                f"runtime_env {masked(self.runtime_env)} without address; it is for the machines of a cluster, on this "
                "one the environment is that of the command: set address, or runtime_env to {}"
            )
        return self

    @model_validator(mode="after")
    def _check_layout(self) -> Self:
        if (self.parallel == "hsdp") != (self.shard_size is not None):
            raise ValueError(
                f"parallel {self.parallel} with shard_size {self.shard_size}; shard_size, the workers that share one "
                "copy of the model, is for parallel hsdp and null for the others"
            )
        if self.workers % (self.shard_size or 1):
            raise ValueError(
                f"{self.workers} workers are no multiple of shard_size {self.shard_size}; choose a divisor of "
                f"{self.workers}, or other workers"
            )
        if self.expert_parallel > 1 and self.parallel == "ddp":
            raise ValueError(
                f"expert_parallel {self.expert_parallel} with parallel ddp, where every worker has all experts; choose "
                "parallel fsdp or hsdp, or expert_parallel 1"
            )
        group = self.shard_size or self.workers
        if group % self.expert_parallel:
            raise ValueError(
                f"{group} workers that share one copy of the model are no multiple of expert_parallel "
                f"{self.expert_parallel}; choose a divisor of {group}"
            )
        return self


class PathsConfig(Config):
    """root: everything that a run writes. remote: where complete outputs are copied to, and fetched from."""

    root: str
    remote: str | None = None


class ReportConfig(Config):
    """Roles of stages in the report: the chain that is grown, and what it is compared with."""

    chain: list[str]
    control: str | None


class ExperimentConfig(Config):
    """One experiment: a graph of stages, and - apart from it - where and how it runs."""

    name: Name
    description: str
    action: Literal[
        "run",
        "plan",
        "dryrun",
        "status",
        "lineage",
        "why",
        "verify",
        "rebuild",
        "generate",
        "evaluate",
        "list",
        "report",
    ]
    watch: bool = False
    until: Name | None = None
    as_json: Annotated[bool, Field(alias="json")] = False
    checkpoint: str | None = None
    prompt: Annotated[str | None, AsTyped()] = None
    generation: GenerationConfig = GenerationConfig()
    tasks: Annotated[tuple[str, ...] | None, AsTyped()] = None
    evaluation: EvaluationConfig = EvaluationConfig()
    other: str | None = None
    seed: Seed
    precision: Precision
    model: ModelConfig
    data: DataConfig
    growth: GrowthConfig
    upcycling: UpcyclingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    stages: Annotated[dict[Name, Stage], Field(min_length=1)]
    report: ReportConfig
    cluster: ClusterConfig
    paths: PathsConfig
    tracking: TrackingConfig

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, names: Any) -> Any:
        """`a,b` and `[a,b]` as one word: both are how lists are typed on a command line."""
        return names.strip("[]").replace(",", " ").split() if isinstance(names, str) else names

    @field_validator("stages", mode="before")
    @classmethod
    def _leave_out_null(cls, stages: Any) -> Any:
        """`stages: {control: null}` takes a stage away that the default experiment has."""
        return without_null(stages)

    @model_validator(mode="before")
    @classmethod
    def _inherit_groups(cls, values: Any) -> Any:
        """What a stage leaves null in a group is as the experiment's group has it."""
        if not isinstance(values, dict) or not isinstance(stages := values.get("stages"), dict):
            return values
        return {**values, "stages": {name: inherited(stage, values) for name, stage in stages.items()}}
