"""The configuration of the growth tool: any checkpoint in, a grown one out. As strict as an experiment's."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator

from aquilamoe.config import passwords
from aquilamoe.config.external import NAME
from aquilamoe.config.growth import GrowthConfig, ShrinkConfig, UpcyclingConfig
from aquilamoe.config.messages import UserError, first_problem, nearest
from aquilamoe.config.numbers import Config, Int, NonNegativeInt, PositiveFloat, Seed

EXAMPLES = {"growth": "fpi", "upcycling": "copy", "shrink": "exact"}
SparseLayers = Literal["all", "every_other"]
TargetDtype = Literal["source", "float32", "bfloat16", "float16"]


_OF_THE_TOOL = {"layers", "calibration_text"}


class SparseUpcycling(UpcyclingConfig):
    """An upcycling, which layers get experts (null leaves that to `model.mlp_only_layers`), and a split's text.

    calibration_text: a file of UTF-8 text; null is the embedded training text.
    """

    layers: SparseLayers | tuple[NonNegativeInt, ...] | None = Field(
        description="Layers that get experts, counted from 0. null: all but model.mlp_only_layers | all | every_other: "
        "1, 3, 5, ... | a list of layers"
    )
    calibration_text: str | None = Field(
        default=None,
        description="UTF-8 text file on which a split is calibrated; null: the embedded training text [path]",
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _check_layers(cls, layers: Any) -> Any:
        """One line instead of a problem for each member of the union."""
        if isinstance(layers, str) and layers not in get_args(SparseLayers):
            choices = get_args(SparseLayers)
            raise ValueError(f"'{layers}' is not a choice; {nearest(layers, choices)}, or a list of layers")
        if layers is not None and not isinstance(layers, str) and not _is_layers(layers):
            raise ValueError(f"{layers!r} is not a list of layers counted from 0; write e.g. [1, 3, 5]")
        return layers

    @property
    def plain(self) -> UpcyclingConfig:
        """The upcycling by itself: what the growth engine uses."""
        return UpcyclingConfig.model_validate(self.model_dump(exclude=_OF_THE_TOOL))

    def dense_layers(self, num_layers: int) -> list[int] | None:
        """Layers without experts of a target with `num_layers` layers, None where `layers` is not set."""
        if self.layers is None:
            return None
        if self.layers == "all":
            return []
        # As in Qwen2-MoE's and others' sparse steps of 2, the first layer is a dense one.
        sparse = range(1, num_layers, 2) if self.layers == "every_other" else self.layers
        beyond = [layer for layer in sparse if layer >= num_layers]
        if beyond:
            raise UserError(
                f"upcycling.layers: layer {beyond[0]} in the list, the source has {num_layers} layers; count them from "
                f"0 to {num_layers - 1}"
            )
        return [layer for layer in range(num_layers) if layer not in sparse]


def _is_layers(layers: Any) -> bool:
    return isinstance(layers, (list, tuple)) and all(type(layer) is int and layer >= 0 for layer in layers)


class CertificateConfig(Config):
    """On how much of which text source and target are compared, and how far a preserving growth may be off."""

    enabled: bool = Field(description="Whether source and target are compared before the target is published")
    text: str | None = Field(
        description="File of UTF-8 text; null: the embedded validation text, Chinese and English in equal parts [path]"
    )
    tokens: Int = Field(
        gt=0, le=2**20, description="Length of the text that is compared; of a split at least 2048 [tokens]"
    )
    sequence_length: Int = Field(ge=2, le=2**17, description="Length of a sequence [tokens]")
    tolerance: PositiveFloat | None = Field(
        description="Largest difference of a logit that a function-preserving growth may show; null: 0.001 (1e-6 for "
        "float64 files) [ratio to the logits' spread]"
    )


class GrowConfig(Config):
    """One call of the growth tool. `model` has the sizes that change; one of growth, upcycling and shrink is set."""

    source: str = Field(
        description="Directory of a checkpoint: safetensors (one file or shards), config.json, tokenizer [path]"
    )
    sources: tuple[Annotated[str, Field(min_length=1)], ...] | None = Field(
        default=None,
        description="Directories of dense checkpoints of one shape, which upcycling=mix makes the experts of one; "
        "instead of source [paths]",
    )
    target: str = Field(
        description="Directory to make; it must not exist, or be the output of this very command [path]"
    )
    dtype: TargetDtype = Field(
        default="source", description="Type of the target's tensors; source: of each as it is in the source"
    )
    keep_float32: bool = Field(
        default=False, description="Whether norms and routers that are float32 in the source stay so with another dtype"
    )
    action: Literal["run", "plan", "certify"] = Field(
        description="run | plan: where every tensor comes from, and its cost; reads headers only | certify: compare "
        "source and target as they are"
    )
    plan: Literal["grouped", "full"] = Field(
        description="action=plan: grouped: equal layers and experts share a line | full: a line for every tensor"
    )
    seed: Seed = Field(description="Seed of all random numbers: noise, routers, sampled maps")
    model: dict[str, Any] = Field(
        description="Sizes that change, of those in the group model; null: as the source, or as follows from the others"
    )
    growth: GrowthConfig | None = Field(
        description="Scale-up to a larger dense model: growth=NAME, then growth.KEY=VALUE; null: none"
    )
    upcycling: SparseUpcycling | None = Field(
        description="Scale-out to a Mixture of Experts: upcycling=NAME, then upcycling.KEY=VALUE; null: none"
    )
    shrink: ShrinkConfig | None = Field(
        default=None, description="The way back to a smaller model: shrink=NAME, then shrink.KEY=VALUE; null: none"
    )
    certificate: CertificateConfig = Field(
        description="Comparison of source and target on held-out tokens, before the target is published"
    )
    disk_bytes_per_s: PositiveFloat = Field(
        description="Disk rate that action=plan assumes, for reading and writing [bytes/s]"
    )
    push: str | None = Field(
        default=None,
        pattern=rf"^{NAME}$",
        description="Repository of the Hugging Face hub, ORG/NAME, as which the target is published; null: none",
    )
    as_json: bool = Field(
        default=False,
        alias="json",
        description="action=plan: whether one JSON document for programs is printed instead of tables",
    )


def parse(values: Mapping[str, Any]) -> GrowConfig:
    """Validate a composed configuration; UserError with one line for the first problem."""
    passwords.learn(values)
    values = _first_source(values)
    needed = {"source": "a directory with a Hugging Face checkpoint", "target": "the directory to make"}
    missing = [key for key in needed if values.get(key) is None]
    if missing:
        raise UserError(*(f"{key}: required but not set; name {needed[key]}, {key}=DIR" for key in missing))
    values = {**values, "upcycling": _chosen(values.get("upcycling"))}
    _check_one_growth(values)
    try:
        return GrowConfig.model_validate(values)
    except ValidationError as error:
        raise first_problem(error, GrowConfig, values) from None


def _first_source(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The first of several sources is the source: its config.json and tokenizer are the target's."""
    sources, upcycling = values.get("sources"), values.get("upcycling")
    is_mix = isinstance(upcycling, Mapping) and upcycling.get("method") == "mix"
    if is_mix and values.get("action") != "certify" and not sources:
        raise UserError("sources: required but not set; name the checkpoints that are mixed, sources=[A,B]")
    if sources is None:
        return values
    if not is_mix:
        raise UserError(f"sources: {sources}, but only upcycling=mix has several; name one, source=DIR")
    if values.get("source") is not None:
        raise UserError(
            f"source: {values['source']} beside sources; a mix takes all of them from sources, leave it out"
        )
    if not isinstance(sources, (list, tuple)) or not all(isinstance(each, str) for each in sources):
        raise UserError(f"sources: {sources!r} is no list of directories; write sources=[A,B]")
    if len(sources) < 2:
        raise UserError(f"sources: {len(sources)} checkpoint; a mix makes an expert of each, name 2 or more")
    return {**values, "source": sources[0]}


def _chosen(upcycling: Any) -> Any:
    """Some keys of `upcycling` have defaults, but without a method nothing was chosen."""
    if isinstance(upcycling, Mapping) and set(upcycling) <= _OF_THE_TOOL:
        for key, value in upcycling.items():
            if value is not None:
                raise UserError(f"upcycling.{key}: {value} of no upcycling; name one, e.g. upcycling=copy")
        return None
    return upcycling


def _check_one_growth(values: Mapping[str, Any]) -> None:
    chosen = {key: values.get(key) for key in EXAMPLES}
    for key, settings in chosen.items():
        if isinstance(settings, Mapping) and settings and "method" not in settings:
            first = next(iter(settings))
            raise UserError(f"{key}.{first}: {settings[first]} of no {key}; name one, e.g. {key}={EXAMPLES[key]}")
    named = [key for key, settings in chosen.items() if settings is not None]
    if len(named) > 1:
        raise UserError(
            f"{', '.join(named)}: {'all' if len(named) > 2 else 'both'} are named, a call does one of them; name "
            "one, and the next in a second call, with the result as its source"
        )
    if not named and values.get("action") != "certify":
        raise UserError(
            "growth: none of growth, upcycling and shrink is named; name one, e.g. growth=aki_pro with larger sizes, "
            "upcycling=copy with model.num_experts=8 model.num_experts_per_tok=2, or shrink=exact with smaller sizes"
        )
