"""What a call requests: source and target with all sizes, which of them follow, and what the growth claims."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aquilamoe.checkpoint import carrying, companions, fit, hf_config, links, packed, safetensors_header, tensor_names
from aquilamoe.checkpoint.hf_config import CheckpointConfig
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.config.external import ADDRESS, HUB
from aquilamoe.config.graph import grown_model
from aquilamoe.config.grow import GrowConfig, SparseUpcycling
from aquilamoe.config.growth import GrowthConfig, ShrinkConfig, UpcyclingConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.paths import local
from aquilamoe.config.plugins import PACKAGE_ROOT
from aquilamoe.config.relative import absolute_sizes
from aquilamoe.growth import dtypes, mix, rules, shrink
from aquilamoe.growth.depth import map_layers
from aquilamoe.growth.dtypes import AS_SOURCE, DtypePolicy
from aquilamoe.growth.reduction import Reduction
from aquilamoe.growth.stream import Progress, silent

CARD = "README.md"
EMBEDDED = PACKAGE_ROOT / "data" / "embedded"
LANGUAGES = {path.name.partition("_")[0]: path for path in sorted(EMBEDDED.glob("*.parquet"))}  # of the embedded corpus
AnyGrowth = GrowthConfig | UpcyclingConfig | ShrinkConfig


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint on disk, as its config.json and its headers describe it."""

    directory: Path
    config: CheckpointConfig
    tensors: Mapping[str, safetensors_header.TensorInfo]

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @property
    def dtype(self) -> str:
        """Safetensors' name of the type of most of its weights, e.g. BF16."""
        return safetensors_header.main_dtype(self.tensors)

    @property
    def dtype_name(self) -> str:
        return safetensors_header.DTYPE_NAMES[self.dtype]

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class SourceText:
    """The text of one source of a mix: a language of the embedded corpus, or a file where `path` is set."""

    name: str
    path: Path | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """A growth of one checkpoint to another, checked: it can be done.

    derived: sizes of the target that were not named and that are not the source's, with what they follow.
    preserving: whether the growth claims to keep the function.
    calibration_text: what a split is calibrated on; None is the embedded training text.
    others: of a mix, its sources behind the first. texts: of each source of a mix.
    """

    source: CheckpointFiles
    target: Path
    model: ModelConfig
    growth: AnyGrowth
    seed: int
    derived: Mapping[str, str]
    preserving: bool
    calibration_text: Path | None = None
    others: tuple[CheckpointFiles, ...] = ()
    texts: tuple[SourceText, ...] = ()
    dtype_policy: DtypePolicy = AS_SOURCE

    @property
    def sources(self) -> tuple[CheckpointFiles, ...]:
        """All checkpoints that the target is made of."""
        return (self.source, *self.others)

    @property
    def directories(self) -> list[Path]:
        return [source.directory for source in self.sources]

    @cached_property
    def dtypes(self) -> dict[str, str]:
        """The type of every tensor of the target, as safetensors spells it."""
        models = self.source.model, self.model
        return dtypes.of_target(self.source.tensors, models, _layers(*models, self.growth), self.dtype_policy)

    @property
    def dtype_name(self) -> str:
        """The type that the target's config.json states, e.g. bfloat16: that of most of its weights."""
        return dtypes.stated(self.dtypes, self.shapes)

    @property
    def kind(self) -> str:
        """The stage of the pipeline that does this."""
        if isinstance(self.growth, ShrinkConfig):
            return "shrink"
        return "scale_up" if isinstance(self.growth, GrowthConfig) else "scale_out"

    @cached_property
    def reduction(self) -> Reduction:
        """What stays of the source, of a shrink: found in its weights. UserError where that is more than it may be."""
        assert isinstance(self.growth, ShrinkConfig)
        return self.find_reduction()

    def find_reduction(self, progress: Progress = silent) -> Reduction:
        """The same, with its progress."""
        assert isinstance(self.growth, ShrinkConfig)
        with in_group_model():
            return shrink.find(self.source.directory, self.model, self.growth, progress=progress)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors of the target, in the order of its files."""
        return tensor_names.tensor_shapes(self.model)


def directory(key: str, value: str) -> Path:
    """A path as the user typed it, absolute and without links, so that renaming works on what it names."""
    if not value.strip():
        raise UserError(f"{key}: '{value}' is no directory; name one")
    return Path(os.path.realpath(local(value)))


def source_directory(config: GrowConfig, place: str | None = None) -> Path:
    """Where the source, or another `place`, is: a directory, or `ORG/NAME` or `hf://ORG/NAME@REVISION` of the hub.

    What is not on this machine is downloaded, but not for a plan.

    Raises:
        UserError: there is no such checkpoint, or it cannot be downloaded; with the command that downloads it.
    """
    place, key = place or config.source, "sources" if config.sources else "source"
    typed = place if place.startswith(HUB) else f"{HUB}{place}"
    is_hub = place.startswith(HUB) or (ADDRESS.fullmatch(typed) and not local(place).exists())
    if not is_hub:
        return directory(key, place)
    from aquilamoe.checkpoint import hub

    found = hub.find(key, hub.HubAddress.parse(key, typed), downloads=config.action != "plan")
    return Path(os.path.realpath(found))


def open_checkpoint(key: str, path: Path) -> CheckpointFiles:
    """Read config.json and the headers; UserError unless they are of one model that can be computed."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such directory"
        raise UserError(f"{key}: {path}: {what}; name a directory with a Hugging Face checkpoint")
    config = hf_config.read_checkpoint_config(path)
    tensors = packed.read(path)
    fit.check(path, config.model, tensors)
    # Links out of the checkpoint are refused here, before anything is read that is copied.
    companions.companions(path)
    links.check(path / CARD, path)
    return CheckpointFiles(path, config, tensors)


def resolve(config: GrowConfig) -> Request:
    """Fill in all sizes and check the growth; UserError with one line for what cannot be done."""
    target = directory("target", config.target)
    source, *others = [_source(config, place, target) for place in config.sources or (config.source,)]
    growth, model = _sized(source, config)
    with in_group_model():
        if isinstance(growth, ShrinkConfig):
            shrink.check(source.model, model)
        else:
            rules.check(source.model, model, growth)
        if growth.method == "mix":
            mix.check([source.directory, *(other.directory for other in others)], model)
        carrying.carried(source.config, model, _layers(source.model, model, growth), source.dtype_name)
    return Request(
        source=source,
        target=target,
        model=model,
        growth=growth,
        seed=config.seed,
        derived=_derived(source.model, model, config),
        preserving=isinstance(growth, ShrinkConfig) or rules.preserves(growth, source.model, model),
        dtype_policy=DtypePolicy(config.dtype, config.keep_float32),
        calibration_text=_calibration_text(config),
        others=tuple(others),
        texts=_texts(config),
    )


@contextmanager
def in_group_model() -> Iterator[None]:
    """A rule's message begins with the field: of the model, or of the growth itself."""
    try:
        yield
    except UserError as error:
        inside = "" if str(error).startswith(("growth", "upcycling", "sources", "architecture", "shrink")) else "model."
        raise UserError(f"{inside}{error}") from None


def _sized(source: CheckpointFiles, config: GrowConfig) -> tuple[AnyGrowth, ModelConfig]:
    """The growth with all that it leaves open, and the target's model; not yet checked."""
    if config.shrink is not None:
        return _shrunk(source, config.shrink, config)
    growth = config.upcycling.plain if config.upcycling else config.growth
    assert growth is not None, "a configuration to run or plan names one"
    return growth, grown_model(source.model, _changes(config, source.model), "model", config.growth)


def _shrunk(source: CheckpointFiles, shrinking: ShrinkConfig, config: GrowConfig) -> tuple[ShrinkConfig, ModelConfig]:
    """A shrink with the layers that stay, and the smaller model: what is not named follows from these, or stays."""
    named = {field: value for field, value in config.model.items() if value is not None}
    named = absolute_sizes(source.model, named, "model")
    with in_group_model(), Reader(source.directory) as reader:
        layers = shrink.kept_layers(reader, source.model, named.get("num_hidden_layers"), shrinking)
    followers = shrink.followers(source.model, layers, named)
    model = grown_model(source.model, {**followers, **named}, "model")
    return shrinking.model_copy(update={"layers": layers}), model


def _source(config: GrowConfig, place: str, target: Path) -> CheckpointFiles:
    path = source_directory(config, place)
    _check_apart(path, target)
    return open_checkpoint("sources" if config.sources else "source", path)


def _texts(config: GrowConfig) -> tuple[SourceText, ...]:
    """The text of each source of a mix."""
    if config.upcycling is None or config.upcycling.texts is None:
        return ()
    assert config.sources is not None
    texts = config.upcycling.texts
    if len(texts) != len(config.sources):
        raise UserError(
            f"upcycling.texts: {len(texts)} named, there are {len(config.sources)} sources; name one text for each, in "
            "their order"
        )
    if config.certificate.text is not None:
        raise UserError(
            f"certificate.text: {config.certificate.text}, but a mix is measured on the held-out part of each of "
            "upcycling.texts; leave it out"
        )
    return tuple(SourceText(text, None if text in LANGUAGES else _text_file(text)) for text in texts)


def _text_file(text: str) -> Path:
    path = local(text)
    if not path.is_file():
        raise UserError(
            f"upcycling.texts: '{text}' is neither a language of the embedded corpus ({', '.join(LANGUAGES)}) nor a "
            "file; name a text file"
        )
    return path


def _calibration_text(config: GrowConfig) -> Path | None:
    """The file of text that a split is calibrated on: another than its certificate is made on."""
    if config.upcycling is None or config.upcycling.calibration_text is None:
        return None
    typed = config.upcycling.calibration_text
    if not config.upcycling.calibration_tokens:
        raise UserError(
            f"upcycling.calibration_text: {typed}, but nothing is calibrated; use upcycling=split with "
            "upcycling.calibration_tokens above 0, or leave it out"
        )
    path = local(typed)
    if not path.is_file():
        raise UserError(f"upcycling.calibration_text: {path} is no file; name a text file")
    if config.certificate.text is not None and path.samefile(local(config.certificate.text)):
        raise UserError(
            f"upcycling.calibration_text: {path} is the certificate.text too, which has to be text that nothing was "
            "chosen by; name another file for one of them"
        )
    return path


def _layers(source: ModelConfig, model: ModelConfig, growth: AnyGrowth) -> Sequence[int]:
    """The layer of the source behind every layer of the target."""
    if isinstance(growth, ShrinkConfig):
        return growth.layers or range(model.num_hidden_layers)
    if isinstance(growth, GrowthConfig):
        return map_layers(source, model, growth).sources
    return range(model.num_hidden_layers)


def _check_apart(source: Path, target: Path) -> None:
    if source == target:
        raise UserError(f"target: {target} is the source; a growth leaves its source as it is, name another directory")
    if not target.name:
        raise UserError(f"target: {target} is the root of all directories; name a new directory in it")
    partial = target.with_name(f"{target.name}.partial")
    if source.is_relative_to(partial):
        raise UserError(f"target: {partial} is where it grows, and the source is there; name another target")
    if source.is_relative_to(target):
        raise UserError(f"target: {target} contains the source; name a directory of its own")


def _changes(config: GrowConfig, source: ModelConfig) -> dict[str, Any]:
    """The sizes that were named, with those that `upcycling.layers` stands for."""
    changes = {field: value for field, value in config.model.items() if value is not None}
    if not isinstance(config.upcycling, SparseUpcycling):
        return changes
    if config.upcycling.method == "mix" and config.sources:
        changes.setdefault("num_experts", len(config.sources))
    dense = config.upcycling.dense_layers(source.num_hidden_layers)
    if dense is None:
        return changes
    if "mlp_only_layers" in changes:
        raise UserError(
            f"upcycling.layers: {config.upcycling.layers}, and model.mlp_only_layers {changes['mlp_only_layers']} "
            "both set it; keep one of them"
        )
    return {**changes, "mlp_only_layers": dense}


def _derived(source: ModelConfig, model: ModelConfig, config: GrowConfig) -> dict[str, str]:
    """Why each size that was not named differs from the source's."""
    reasons = {
        "num_attention_heads": f"follows hidden_size at head_dim {model.head_dim}",
        "head_dim": "follows hidden_size and num_attention_heads",
        "rms_norm_eps": "follows hidden_size by growth.norm zero_pad",
        "num_experts": "an expert of each source",
        "moe_intermediate_size": "follows the source's feed-forward",
        "mlp_only_layers": "follows growth.depth" if config.growth else "follows upcycling.layers",
        "layer_types": "follows growth.depth",
        "rope_scaling": "follows head_dim",
        "particulars": "follows growth.depth" if config.growth else "follows num_experts",
        "intermediate_size": "follows moe_intermediate_size, no layer is dense",
    }
    if config.shrink is not None:
        layers = dict.fromkeys(("mlp_only_layers", "layer_types", "num_hidden_layers"), "follows the layers that stay")
        experts = dict.fromkeys(("num_experts_per_tok", "moe_intermediate_size"), "follows num_experts")
        reasons |= {**layers, **experts}
    named = {field for field, value in config.model.items() if value is not None}
    different = [field for field in ModelConfig.model_fields if getattr(source, field) != getattr(model, field)]
    return {field: reasons.get(field, "follows the others") for field in different if field not in named}
