"""Dense checkpoints of one shape as the experts of one Mixture of Experts: branch, train, mix (arXiv 2403.07816).

Expert e of every layer is the feed-forward of source e. What is not an expert exists once: the average of the sources,
or that of the first. `growth.mix_router` finds routers from text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aquilamoe.checkpoint import hf_config, jsonfile, packed, safetensors_header, tensor_names
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.checkpoint.sources import of_source
from aquilamoe.config.external import TOKENIZER
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import rules
from aquilamoe.growth.dtypes import AS_SOURCE, DtypePolicy
from aquilamoe.growth.lazy_tensor import Index, LazyTensor, as_rows, filled, stored
from aquilamoe.growth.scale_out import drawn_router, zeros
from aquilamoe.growth.stream import FILLER, Progress, Recipe, rewrite, silent

if TYPE_CHECKING:
    from torch import Tensor

Routers = Mapping[int, "Tensor"]  # by layer: rows (experts, d)
FITTED = ("hidden", "ridge")  # initial routers that are computed from text


def mix(
    sources: Sequence[Path],
    target: Path,
    target_config: ModelConfig,
    upcycling: UpcyclingConfig,
    seed: int,
    *,
    progress: Progress = silent,
    dtype_policy: DtypePolicy = AS_SOURCE,
    routers: Routers | None = None,
) -> dict[str, str]:
    """Make the checkpoints in `sources` the experts of one, and write it to `target`.

    Sums are taken in float64 and do not depend on the order of the sources. The averages of equal tensors are these
    tensors, bit for bit.

    Args:
        sources: directories of Hugging Face checkpoints with safetensors, one for each expert.
        target: directory to write; config and tokenizer are those of the first source.
        target_config: model of the target, with all of its sizes.
        upcycling: of method mix, with its settings.
        seed: of the routers, where they are drawn.
        progress: called with the number of tensors written, and of all tensors.
        dtype_policy: the types of the target's tensors; each as in the first source by default.
        routers: what `mix_router.fit` found, for an initial router that needs text.

    Returns:
        The SHA-256 of every tensor, in hexadecimal, by its name in the target.

    Raises:
        UserError: the sources do not fit together (see `check`), or one is damaged.
    """
    config = hf_config.read_checkpoint_config(sources[0])
    rules.check(config.model, target_config, upcycling)
    check(sources, target_config)
    assert (routers is None) == (upcycling.router_init not in FITTED)
    grow = partial(recipes, source=config.model, target=target_config, upcycling=upcycling, seed=seed, routers=routers)
    return rewrite(
        sources[0],
        target,
        (config, target_config),
        layers=range(target_config.num_hidden_layers),
        grow=grow,
        progress=progress,
        dtype_policy=dtype_policy,
        others=sources[1:],
    )


def check(sources: Sequence[Path], target: ModelConfig) -> None:
    """UserError unless checkpoints are of one shape, type and tokenizer, as many as the target has experts."""
    rules.check_sources([(str(path), hf_config.read_checkpoint_config(path).model) for path in sources], target)
    vocabulary, dtype = _vocabulary(sources[0]), _dtype(sources[0])
    for directory in sources[1:]:
        if (other := _dtype(directory)) != dtype:
            raise UserError(
                f"sources: {sources[0]} is of {dtype}, {directory} of {other}; a mix is of checkpoints of one type, "
                "convert one of them"
            )
        if _vocabulary(directory) != vocabulary:
            raise UserError(
                f"sources: {TOKENIZER} of {sources[0]} and of {directory} are not the same; a mix is of checkpoints of "
                "one tokenizer, choose those that were trained from one checkpoint"
            )


def _dtype(directory: Path) -> str:
    return safetensors_header.DTYPE_NAMES[safetensors_header.main_dtype(packed.read(directory))]


def _vocabulary(directory: Path) -> object:
    """What turns text into ids; how a version of a library writes it down may differ."""
    if not (directory / TOKENIZER).is_file():
        return None
    stated = jsonfile.read(directory / TOKENIZER, directory, jsonfile.MAX_INDEX_BYTES)
    return [stated.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")]


def recipes(
    reader: Reader,
    source: ModelConfig,
    target: ModelConfig,
    upcycling: UpcyclingConfig,
    seed: int,
    *,
    routers: Routers | None = None,
) -> Iterator[Recipe]:
    """Yield what every tensor of the target is made of.

    reader: of `Sources`, as many as the target has experts. routers: without them, for plans, shapes are right.
    """
    mixed = _Mixed(reader, target.num_experts, upcycling)
    for name in tensor_names.outer_shapes(target):
        yield Recipe([name], mixed.shared(name, name))
    for layer in range(target.num_hidden_layers):
        fillers = tensor_names.filler_roles(target) if target.is_sparse(layer) else []
        for role, shape in tensor_names.role_shapes(target, layer).items():
            name = tensor_names.layer_name(target, layer, role)
            if role == tensor_names.ROUTER:
                rows = _router(routers, upcycling, seed, layer, shape)
            elif role in fillers:
                rows = zeros(shape, FILLER)
            elif role.startswith("mlp.experts."):
                number = int(role.split(".")[2])
                made_of = tensor_names.dense_role(role)
                rows = mixed.of(number, tensor_names.layer_name(source, layer, made_of), made_of)
            else:
                rows = mixed.shared(tensor_names.layer_name(source, layer, role), role)
            yield Recipe([name], rows)


def _router(
    routers: Routers | None, upcycling: UpcyclingConfig, seed: int, layer: int, shape: tuple[int, ...]
) -> LazyTensor:
    if upcycling.router_init not in FITTED:
        return drawn_router(upcycling, seed, layer, shape)
    rows = filled(shape, 0.0) if routers is None else as_rows(routers[layer])
    how = {"ridge": "ridge regression on which source's text it is", "hidden": "mean inputs, apart from the others'"}
    return rows.noted(f"of the texts: {how[upcycling.router_init]}")


class _Mixed:
    """Tensors of several sources.

    reader: of `Sources`.
    count: of the sources.
    """

    def __init__(self, reader: Reader, count: int, upcycling: UpcyclingConfig) -> None:
        self._reader, self._count = reader, count
        self._is_averaged = upcycling.shared == "average"
        weights = upcycling.weights or (1.0,) * count
        self._weights = [weight / sum(sorted(weights)) for weight in weights]

    def of(self, number: int, name: str, label: str) -> LazyTensor:
        """A tensor of one source."""
        return stored(self._reader, of_source(name, number), of_source(label, number))

    def shared(self, name: str, label: str) -> LazyTensor:
        """What the experts share."""
        if not self._is_averaged:
            return self.of(0, name, label)
        parts = [self.of(number, name, label) for number in range(self._count)]

        def read(index: Index) -> Tensor:
            return _average([part[index] for part in parts], self._weights)

        return parts[0].derive(read, None, *parts[1:]).noted(f"average of {self._count} sources")


def _average(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean of blocks, float64 inside; the mean of equal numbers is that number."""
    import torch

    wide_sb = torch.stack([block.double() for block in blocks])
    terms_sb = torch.stack([weight * block for weight, block in zip(weights, wide_sb, strict=True)])
    # Sums of sorted terms are the same in any order of the sources, and rounding takes no mean out of their range.
    total = terms_sb.sort(dim=0).values.sum(dim=0)
    total = total.clamp(min=wide_sb.amin(dim=0), max=wide_sb.amax(dim=0))
    return total if blocks[0].dtype == torch.float64 else total.float()
