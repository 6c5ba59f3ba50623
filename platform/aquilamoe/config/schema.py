"""The configuration of an experiment. All configuration models are frozen and refuse unknown keys.

The meaning and unit of a key are its field's description: messages, `--help` and docs/configuration.md print it.
Defaults are in YAML, which lists every key; what few experiments need has the same default here, for who composes
configurations in Python. The models of its parts can be imported from here, too.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from aquilamoe.config.cluster import ClusterConfig
from aquilamoe.config.corpus import (
    CLEANING,
    VALIDATION_FRACTION,
    CleaningConfig,
    SourceConfig,
    ValidationFraction,
    with_mixture,
)
from aquilamoe.config.evaluation import EvaluationConfig, GenerationConfig
from aquilamoe.config.growth import GrowthConfig, UpcyclingConfig
from aquilamoe.config.inheritance import inherited, without_null
from aquilamoe.config.keys import AsTyped
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.numbers import Config, PositiveFloat, Seed
from aquilamoe.config.stages import PRECISIONS, Precision, Stage
from aquilamoe.config.stages import CheckpointStage as CheckpointStage
from aquilamoe.config.stages import CorpusStage as CorpusStage
from aquilamoe.config.stages import EvaluateStage as EvaluateStage
from aquilamoe.config.stages import ExportStage as ExportStage
from aquilamoe.config.stages import GrowthStage as GrowthStage
from aquilamoe.config.stages import PretrainStage as PretrainStage
from aquilamoe.config.stages import ScaleOutStage as ScaleOutStage
from aquilamoe.config.stages import ScaleUpStage as ScaleUpStage
from aquilamoe.config.stages import TokenizerStage as TokenizerStage
from aquilamoe.config.steps import OptimizerConfig, ScheduleConfig
from aquilamoe.config.steps import RouterConfig as RouterConfig
from aquilamoe.config.steps import SpikesConfig as SpikesConfig
from aquilamoe.config.tracking import TrackingConfig

# It names files, of which the longest adds some 50 characters; file systems allow 255 bytes.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]


class DataConfig(Config):
    """The corpus by language, and the share of each language in training."""

    folder: str | None = Field(
        default=None, description="Folder of the files, for paths that contain ${data.folder}; null: not used [path]"
    )
    sources: dict[str, SourceConfig] = Field(
        min_length=1,
        description="Parts of the corpus, by language, the name in every metric; null: not used",
    )
    mixture: dict[str, PositiveFloat] = Field(
        description="Share of each source in training, normalised to a sum of 1; null: equal shares [weights]"
    )
    validation_fraction: ValidationFraction = VALIDATION_FRACTION
    cleaning: CleaningConfig | None = Field(default=None, description=CLEANING)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        return with_mixture(values)


class PathsConfig(Config):
    """Where outputs are."""

    root: str = Field(description="Folder of all output: stages, reports, MLflow's database [path]")
    remote: str | None = Field(
        default=None,
        description="Where complete outputs are copied to and fetched from: a directory, or "
        "s3://bucket/prefix?endpoint_override=host:port; null: nowhere [path or URL]",
    )


class ReportConfig(Config):
    """Roles of stages in the report: the chain that is grown, and what it is compared with."""

    chain: list[str] = Field(description="Line of checkpoints that grows, by stage")
    control: str | None = Field(description="Stage that the line is compared with; null: none")


class ExperimentConfig(Config):
    """One experiment: a graph of stages, and - apart from it - where and how it runs."""

    name: Name = Field(description="Name of the MLflow experiment and the report")
    description: str = Field(description="What the experiment is for, shown in the report")
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
        "clean",
        "stop",
    ] = Field(description="What the command does; --help describes each action")
    watch: bool = Field(
        default=False, description="action=status: whether a running pipeline is followed until it ends"
    )
    until: Name | None = Field(
        default=None,
        description="action=run, plan, status: last stage; only it and what it is made from; null: all stages",
    )
    confirm: bool = Field(default=False, description="action=clean: whether to remove what it lists")
    as_json: bool = Field(
        default=False,
        alias="json",
        description="action=plan, status, list, lineage, clean, advise: whether one JSON document for programs is "
        "printed instead of tables",
    )
    checkpoint: str | None = Field(
        default=None,
        description="action=lineage, why, verify, rebuild, generate, evaluate: a stage, a directory, a fingerprint or "
        "a SHA-256 prefix",
    )
    prompt: Annotated[str | None, AsTyped()] = Field(
        default=None, description="action=generate: text to continue; null: the prompts of the evaluation's samples"
    )
    generation: GenerationConfig = Field(
        default=GenerationConfig(), description="action=generate: how the text is continued"
    )
    tasks: Annotated[tuple[str, ...] | None, AsTyped()] = Field(
        default=None,
        description="action=evaluate: names of tasks; null: all of the corpus, cloze_LANGUAGE and bits_LANGUAGE",
    )
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig(), description="action=evaluate: size of the tasks, and further ones"
    )
    source: str | None = Field(
        default=None,
        description="experiment=from_checkpoint: directory of a Hugging Face checkpoint, or hf://ORG/NAME@REVISION; "
        "null: checkpoint [path]",
    )
    other: str | None = Field(
        default=None,
        description="action=why: what checkpoint is compared with; null: its stage as it is configured now",
    )
    seed: Seed = Field(description="Seed of initialisation, growth and data order, of every stage")
    precision: Precision = Field(description=f"Precision of all training. {PRECISIONS}")
    model: ModelConfig = Field(description="Network of the first stage")
    data: DataConfig = Field(description="Corpus")
    growth: GrowthConfig = Field(description="Growth method of every scale-up stage")
    upcycling: UpcyclingConfig = Field(description="Upcycling of every scale-out stage")
    optimizer: OptimizerConfig = Field(description="Optimizer of every stage that trains")
    schedule: ScheduleConfig = Field(description="Learning-rate schedule of every stage that trains")
    stages: dict[Name, Stage] = Field(
        min_length=1, description="Graph of stages, by name; a null stage is left out of the default experiment"
    )
    report: ReportConfig = Field(description="Stages that the report compares")
    cluster: ClusterConfig = Field(description="Where and how stages run; never part of a fingerprint")
    paths: PathsConfig = Field(description="Where outputs are")
    tracking: TrackingConfig = Field(description="MLflow")

    @field_validator("tasks", mode="before")
    @classmethod
    def _split(cls, names: Any) -> Any:
        """`a,b` and `[a,b]` as one word: both are how lists are typed on a command line."""
        return names.strip("[]").replace(",", " ").split() if isinstance(names, str) else names

    @field_validator("optimizer")
    @classmethod
    def _check_groups(cls, optimizer: OptimizerConfig) -> OptimizerConfig:
        """New and old parts are of a stage after a growth, which has defaults of its own for them."""
        if optimizer.groups != OptimizerConfig.model_fields["groups"].default:
            raise ValueError("groups are of one stage; set stages.NAME.optimizer.groups")
        return optimizer

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
