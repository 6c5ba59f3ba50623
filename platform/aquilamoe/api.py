"""What notebooks and other programs use: growth, certificates and the records of a store, as plain objects.

Nothing here prints or exits: what a caller can repair raises `UserError`, whose text is one line.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from aquilamoe.cli.shipped import CONF, options
from aquilamoe.config import grow as grow_config
from aquilamoe.config.grow import GrowConfig, TargetDtype
from aquilamoe.config.messages import UserError, nearest
from aquilamoe.growth.tool import plan
from aquilamoe.growth.tool.grow import certify as grow_certify
from aquilamoe.growth.tool.grow import make
from aquilamoe.growth.tool.plan import GrowthCost, TensorLine
from aquilamoe.growth.tool.reporter import Silent
from aquilamoe.growth.tool.request import resolve
from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.lineage.graph import ArtifactGraph, read_graph
from aquilamoe.lineage.lookup import find

# A method by its name, or its settings: {"method": "fpi", "noise": 0.2}; omitted settings are as in conf/.
Method = str | Mapping[str, Any]
# A checkpoint's directory, or several, which upcycling mix makes one of.
Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class GrowthPlan:
    """A growth before it is done, known from headers only.

    Attributes:
        model: every field of the target's model, in Hugging Face's spelling.
        parameters: parameters of the target; `active_parameters` are those that a token meets.
        preserving: whether the growth claims to keep the function of the source.
        tensors: where each tensor of the target comes from, one line each.
        cost: bytes read, written and held in memory at most, and estimated seconds.
    """

    model: Mapping[str, Any]
    parameters: int
    active_parameters: int
    preserving: bool
    tensors: tuple[TensorLine, ...]
    cost: GrowthCost


@dataclass(frozen=True)
class GrownCheckpoint:
    """A published target: a complete Hugging Face directory.

    Attributes:
        directory: where it is.
        record: what `record.json` has: recipe, digests of tensors, versions.
        certificate: source and target compared on held-out tokens; None where that was switched off.
    """

    directory: Path
    record: Mapping[str, Any]

    @property
    def certificate(self) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self.record["certificate"]
        return found


def plan_growth(
    source: Source,
    target: str | Path,
    *,
    model: Mapping[str, Any],
    growth: Method | None = None,
    upcycling: Method | None = None,
    shrink: Method | None = None,
    seed: int = 1234,
    dtype: TargetDtype = "source",
) -> GrowthPlan:
    """Plan a growth from the headers of the source, or a shrink from its weights; nothing is written.

    Args:
        source: directory of a Hugging Face checkpoint with safetensors; of method mix, a list of them.
        target: directory that the growth would make.
        model: the sizes that change, e.g. `{"hidden_size": 96}`.
        growth: the method of a scale-up, e.g. "aki_pro"; exactly one of `growth`, `upcycling` and `shrink` is
            given.
        upcycling: the method of a scale-out, e.g. "copy".
        shrink: the method of the way back, e.g. "exact".
        seed: of all random numbers.
        dtype: of the target's tensors, e.g. "bfloat16"; "source" keeps the type of each.

    Returns:
        Sizes, cost (bytes, seconds) and the origin of every tensor of the target.

    Raises:
        UserError: the source cannot be read, or the growth cannot be done.
    """
    config = _config(source, target, model, growth=growth, upcycling=upcycling, shrink=shrink, seed=seed, dtype=dtype)
    request = resolve(config)
    return GrowthPlan(
        model=request.model.model_dump(mode="json"),
        parameters=request.model.num_params,
        active_parameters=request.model.num_active_params,
        preserving=request.preserving,
        tensors=tuple(plan.lines(request, full=True)),
        cost=plan.cost(request, config.disk_bytes_per_s),
    )


def grow(
    source: str | Path,
    target: str | Path,
    *,
    model: Mapping[str, Any],
    growth: Method = "fpi",
    seed: int = 1234,
    dtype: TargetDtype = "source",
    certificate: Mapping[str, Any] | None = None,
) -> GrownCheckpoint:
    """Grow a checkpoint in width and depth (section 3.1 of the paper), certify it and publish the target.

    Args:
        source: directory of a Hugging Face checkpoint with safetensors.
        target: directory to make; one that this very call has made is returned as it is.
        model: the sizes that change, e.g. `{"hidden_size": 96, "num_hidden_layers": 6}`.
        growth: the method, by name or with settings.
        seed: of all random numbers.
        dtype: of the target's tensors, e.g. "bfloat16"; "source" keeps the type of each.
        certificate: settings that differ from conf/grow.yaml, e.g. `{"tokens": 256}` or `{"enabled": False}`.

    Returns:
        The published directory with its record and certificate.

    Raises:
        UserError: the growth cannot be done, or claims to keep the function and does not.
    """
    config = _config(source, target, model, growth=growth, seed=seed, certificate=certificate, dtype=dtype)
    return _made(config, "grow")


def upcycle(
    source: Source,
    target: str | Path,
    *,
    model: Mapping[str, Any],
    upcycling: Method = "copy",
    seed: int = 1234,
    dtype: TargetDtype = "source",
    certificate: Mapping[str, Any] | None = None,
) -> GrownCheckpoint:
    """Make a Mixture of Experts of a dense checkpoint (section 3.2 of the paper), or give one more experts.

    Args:
        source: directory of a Hugging Face checkpoint with safetensors; of method mix, a list of them.
        target: directory to make; one that this very call has made is returned as it is.
        model: the sizes that change, at least `num_experts` and `num_experts_per_tok`.
        upcycling: the method, by name or with settings.
        seed: of all random numbers.
        dtype: of the target's tensors, e.g. "bfloat16"; "source" keeps the type of each.
        certificate: settings that differ from conf/grow.yaml, e.g. `{"tokens": 256}` or `{"enabled": False}`.

    Returns:
        The published directory with its record and certificate.

    Raises:
        UserError: the upcycling cannot be done, or claims to keep the function and does not.
    """
    config = _config(source, target, model, upcycling=upcycling, seed=seed, certificate=certificate, dtype=dtype)
    return _made(config, "upcycle")


def shrink(
    source: str | Path,
    target: str | Path,
    *,
    model: Mapping[str, Any],
    shrink: Method = "exact",
    dtype: TargetDtype = "source",
    certificate: Mapping[str, Any] | None = None,
) -> GrownCheckpoint:
    """Make a checkpoint smaller without changing its function: merge copies, drop what does nothing.

    Args:
        source: directory of a Hugging Face checkpoint with safetensors.
        target: directory to make; one that this very call has made is returned as it is.
        model: the sizes that change, e.g. `{"hidden_size": 64, "num_hidden_layers": 4}`.
        shrink: the method, by name or with settings.
        dtype: of the target's tensors, e.g. "bfloat16"; "source" keeps the type of each.
        certificate: settings that differ from conf/grow.yaml, e.g. `{"tokens": 256}` or `{"enabled": False}`.

    Returns:
        The published directory with its record and certificate.

    Raises:
        UserError: more units of the source differ than the target has.
    """
    return _made(_config(source, target, model, shrink=shrink, certificate=certificate, dtype=dtype), "shrink")


def certify(source: str | Path, target: str | Path, **settings: Any) -> Mapping[str, Any]:
    """Compare two checkpoints as they are, on held-out tokens.

    Args:
        source: directory of the checkpoint that the other was grown from.
        target: directory of the grown checkpoint; one with a record is held to what that claims.
        settings: what differs from `certificate` in conf/grow.yaml, e.g. `tokens=256, text="held-out.txt"`.

    Returns:
        The certificate, see `growth.certificate.certify`; losses in nats/token.

    Raises:
        UserError: the two cannot be compared, or the target claims to keep the function and does not.
    """
    return grow_certify(_config(source, target, {}, certificate=settings, action="certify"), Silent())


@dataclass(frozen=True)
class Store:
    """The outputs below a `paths.root`, with their records and their lineage.

    Args:
        root: the folder that `paths.root` named, `runs` by default.
    """

    root: str | Path = "runs"

    def outputs(self) -> list[Artifact]:
        """All complete outputs, newest first.

        Raises:
            UserError: `root` has no outputs.
        """
        return self._library().newest_first()

    def output(self, name: str) -> Artifact:
        """The output that a fingerprint, a directory's name or a SHA-256 prefix names, or a stage's newest.

        Raises:
            UserError: no output, or several, have that name.
        """
        library = self._library()
        newest = library.of_stage(name)
        return newest[0] if newest else find(library, {}, name)

    def lineage(self, name: str) -> list[Artifact]:
        """The output that `name` names, then everything that it was made from, nearest first.

        Raises:
            UserError: no output, or several, have that name.
        """
        entry = self.output(name)
        return [entry, *self._library().ancestors(entry)]

    def __iter__(self) -> Iterator[Artifact]:
        return iter(self.outputs())

    def _library(self) -> ArtifactGraph:
        folder = Path(self.root) / "stages"
        if not folder.is_dir():
            raise UserError(
                f"{self.root}: has no outputs (there is no {folder}); name the folder that paths.root named"
            )
        return read_graph(folder)


def _made(config: GrowConfig, verb: str) -> GrownCheckpoint:
    request = resolve(config)
    source = config.source if config.sources is None else list(config.sources)
    call = f"aquilamoe.{verb}({source!r}, {config.target!r}, ...)"
    return GrownCheckpoint(request.target, make(request, config, call, Silent()))


def _config(
    source: Source,
    target: str | Path,
    model: Mapping[str, Any],
    *,
    growth: Method | None = None,
    upcycling: Method | None = None,
    shrink: Method | None = None,
    certificate: Mapping[str, Any] | None = None,
    **others: str | int,
) -> GrowConfig:
    """The settings of conf/grow.yaml, overridden by the arguments; `others` are `seed`, `dtype` and `action`."""
    values = _yaml(CONF / "grow.yaml")
    del values["defaults"], values["hydra"]
    places = [str(source)] if isinstance(source, (str, Path)) else [str(each) for each in source]
    several = {} if isinstance(source, (str, Path)) else {"source": None, "sources": places}
    values |= {"source": next(iter(places), None), "target": str(target), **several, **others}
    values["model"] |= model
    values["certificate"] |= certificate or {}
    if growth is not None:
        values["growth"] = _method("growth", growth)
    if shrink is not None:
        values["shrink"] = _method("shrink", shrink)
    if upcycling is not None:
        values["upcycling"] |= _method("upcycling", upcycling)
    return grow_config.parse(values)


def _method(group: str, method: Method) -> dict[str, Any]:
    settings = {"method": method} if isinstance(method, str) else dict(method)
    name = str(settings.get("method"))
    if name not in options(group):
        raise UserError(f"{group}: '{name}' is no method; {nearest(name, options(group))}")
    return _yaml(CONF / group / f"{name}.yaml") | settings


def _yaml(path: Path) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.load(path))
    return {str(key): value for key, value in values.items()}
