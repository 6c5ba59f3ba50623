"""Scale-Out (sparse upcycling): a checkpoint gets experts, or more of them, a block of rows at a time (METHODS 5)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aquilamoe.checkpoint import hf_config, tensor_names
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import rng, rules
from aquilamoe.growth.dtypes import AS_SOURCE, DtypePolicy
from aquilamoe.growth.expert_diversity import Variety
from aquilamoe.growth.lazy_tensor import LazyTensor, between, cycled, from_function, repeated, scaled, stored
from aquilamoe.growth.stream import FILLER, Progress, Recipe, compute_dtype, rewrite, silent

if TYPE_CHECKING:
    from aquilamoe.growth.split import Split

# The shared expert is a copy of the dense feed-forward.
_SHARED = {
    tensor_names.SHARED_GATE: tensor_names.GATE,
    tensor_names.SHARED_UP: tensor_names.UP,
    tensor_names.SHARED_DOWN: tensor_names.DOWN,
}


def scale_out(
    source: Path,
    target: Path,
    target_config: ModelConfig,
    upcycling: UpcyclingConfig,
    seed: int,
    *,
    progress: Progress = silent,
    dtype_policy: DtypePolicy = AS_SOURCE,
    split: Split | None = None,
) -> dict[str, str]:
    """Make feed-forwards of the checkpoint in `source` layers of (more) experts, and write it to `target`.

    Of a dense source, experts are copies of the feed-forward, or of equal parts of it where the target's
    moe_intermediate_size is smaller, and `router_init` sets what routers start as. A shared expert is a copy too: it
    starts with a share of one half, and the others are halved. Of a Mixture of Experts they are copies of its experts,
    neighbours with the score of their original. `upcycling.method` sets how copies differ; everything else is copied,
    `mlp_only_layers` as they are. The result depends only on the arguments. In memory there are some blocks of
    rows.

    Args:
        source: directory of a Hugging Face checkpoint with safetensors.
        target: directory to write.
        target_config: model of the target, with all of its sizes.
        upcycling: the method and its settings.
        seed: of all random numbers.
        progress: called with the number of tensors written, and of all tensors.
        dtype_policy: the types of the target's tensors; each as in the source by default.
        split: what `growth.split.calibrate` found, for the method that needs it.

    Returns:
        The SHA-256 of every tensor, in hexadecimal, by its name in the target.

    Raises:
        UserError: the growth cannot be done (see `rules.check`), or the source is damaged.
    """
    config = hf_config.read_checkpoint_config(source)
    rules.check(config.model, target_config, upcycling)
    assert (split is None) == (upcycling.method != "split")
    grow = partial(recipes, source=config.model, target=target_config, upcycling=upcycling, seed=seed, split=split)
    return rewrite(
        source,
        target,
        (config, target_config),
        layers=range(target_config.num_hidden_layers),
        grow=grow,
        progress=progress,
        dtype_policy=dtype_policy,
    )


def recipes(
    reader: Reader,
    source: ModelConfig,
    target: ModelConfig,
    upcycling: UpcyclingConfig,
    seed: int,
    *,
    split: Split | None = None,
) -> Iterator[Recipe]:
    """Yield what every tensor of the target is made of.

    split: what separates the copies of an expert; without it, for plans, shapes are right and rows those of originals.
    """
    for name in tensor_names.outer_shapes(target):
        yield Recipe([name], stored(reader, name))
    for index in range(target.num_hidden_layers):
        layer = _Layer(
            reader=reader, source=source, target=target, upcycling=upcycling, seed=seed, index=index, split=split
        )
        yield from layer.sparse() if target.is_sparse(index) else layer.dense()


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """One layer that gets experts."""

    reader: Reader
    source: ModelConfig
    target: ModelConfig
    upcycling: UpcyclingConfig
    seed: int
    index: int
    split: Split | None

    def dense(self) -> Iterator[Recipe]:
        """The layer as it is."""
        for role in tensor_names.role_shapes(self.target, self.index):
            yield self._to(self._from(role), role)

    def sparse(self) -> Iterator[Recipe]:
        """The layer with a router and experts."""
        fillers = tensor_names.filler_roles(self.target)
        for role, shape in tensor_names.role_shapes(self.target, self.index).items():
            if role.startswith("mlp.experts."):
                continue
            if role == tensor_names.ROUTER:
                yield self._to(self._router(shape), role)
            elif role in fillers:
                yield self._to(zeros(shape, FILLER), role)
            elif self.source.is_moe or role not in (*_SHARED, tensor_names.SHARED_ROUTER):
                yield self._to(self._from(role), role)
            elif role in _SHARED:
                yield self._to(self._from(_SHARED[role]).noted("copied: the shared expert"), role)
            else:
                yield self._to(zeros(shape, "zeros: every token goes through the shared expert by one half"), role)
        for role in (tensor_names.GATE, tensor_names.UP, tensor_names.DOWN):
            yield from self._experts(role)

    def _from(self, role: str) -> LazyTensor:
        return stored(self.reader, tensor_names.layer_name(self.source, self.index, role), role)

    def _to(self, rows: LazyTensor, *roles: str) -> Recipe:
        return Recipe([tensor_names.layer_name(self.target, self.index, role) for role in roles], rows)

    def _experts(self, role: str) -> Iterator[Recipe]:
        """What every expert has in one role; each tensor of the source is read for all of its copies at once."""
        originals = [tensor_names.expert_role(expert, role) for expert in range(self.source.num_experts)] or [role]
        shards = rules.num_shards(self.source, self.target)
        copies = self.target.num_experts // (len(originals) * shards)
        for original, original_role in enumerate(originals):
            tensor = self._from(original_role)
            of_original = range(original * copies, (original + 1) * copies)
            if self.upcycling.method in ("copy", "split"):
                for shard in range(shards):
                    experts = [tensor_names.expert_role(copy * shards + shard, role) for copy in of_original]
                    yield self._to(self._cut(tensor, role, shard, shards), *experts)
                continue
            yield from self._varied(tensor, role, of_original, shards)

    def _varied(self, tensor: LazyTensor, role: str, copies: range, shards: int) -> Iterator[Recipe]:
        """Copies that random numbers make differ, each a tensor of its own."""
        place = f"model.layers.{self.index}."
        variety = Variety(self.upcycling, self.seed, place, compute_dtype(self.reader))
        for copy in copies:
            varied = variety.vary(tensor, role, copy)
            for shard in range(shards):
                expert = tensor_names.expert_role(copy * shards + shard, role)
                part = self._cut(varied, role, shard, shards)
                varied_part = variety.add_noise(part, tensor, expert, self._factor(role, shards))
                yield self._to(varied_part.noted(variety.note), expert)

    def _cut(self, tensor: LazyTensor, role: str, shard: int, shards: int) -> LazyTensor:
        """One part of a feed-forward, times what keeps the sum over all of them."""
        note = f"one of {self.target.num_experts // (max(1, self.source.num_experts) * shards)} copies"
        if shards == 1:
            return self._scale(tensor, role, shards, note)
        neurons = self.target.moe_intermediate_size
        part = slice(shard * neurons, (shard + 1) * neurons)
        if role == tensor_names.DOWN:
            cut = tensor.derive(lambda index: tensor[index][:, part], (tensor.shape[0], neurons))
        else:
            cut = between(tensor, part.start, part.stop)
        return self._scale(cut, role, shards, f"{note}, part {shard} of {shards}")

    def _scale(self, tensor: LazyTensor, role: str, shards: int, note: str) -> LazyTensor:
        factors = {"x 1/2": self._is_halved(role), f"x sqrt({shards})": shards > 1 and role != tensor_names.GATE}
        notes = [factor for factor, is_used in factors.items() if is_used]
        return scaled(tensor, self._factor(role, shards)).noted(note, *notes)

    def _factor(self, role: str, shards: int) -> float:
        """Gates share a weight of 1 over the parts, so that each counts for 1 / shards; up and down compensate."""
        factor = 1.0 if role == tensor_names.GATE else shards**0.5
        return factor / 2 if self._is_halved(role) else factor

    def _is_halved(self, role: str) -> bool:
        """Beside a shared expert, which has a half, the others have the other half."""
        is_shared = not self.source.is_moe and self.target.shared_expert_intermediate_size > 0
        return is_shared and role == tensor_names.DOWN

    def _router(self, shape: tuple[int, ...]) -> LazyTensor:
        """Scores of the copies: those of their originals, of a split plus what separates the copies; of a dense source
        drawn for each feed-forward.

        Parts of a feed-forward have one score (virtual groups, arXiv 2410.07524). `variance` reads router_std as the
        variance, which is the paper's literal wording; `orthogonal` has rows at right angles, as long as those of
        `normal` are on average.
        """
        if self.source.is_moe:
            times = self.target.num_experts // self.source.num_experts
            rows = repeated(self._from(tensor_names.ROUTER), times).noted(f"every row {times} times")
            if self.upcycling.method != "split":
                return rows
            apart = "plus and minus M u" if times & (times - 1) == 0 else "plus M times the centre of a cluster"
            if self.split is not None:
                rows = rows + cycled(self.split.offsets[self.index], self.source.num_experts)
            return rows.noted(f"{apart}, {self.upcycling.direction}")
        return drawn_router(self.upcycling, self.seed, self.index, shape, rules.num_shards(self.source, self.target))


def drawn_router(
    upcycling: UpcyclingConfig, seed: int, layer: int, shape: tuple[int, ...], shards: int = 1
) -> LazyTensor:
    """A router's rows, drawn for each feed-forward, of which each has so many shards: `_Layer._router` states how."""
    name, std = f"model.layers.{layer}.{tensor_names.ROUTER}", upcycling.router_std

    def make() -> np.ndarray:
        random = rng.stream(seed, name)
        if upcycling.router_init == "orthogonal":
            router = std * rng.orthogonal(shape[0] // shards, shape[1], random)
        else:
            deviation = {"normal": std, "variance": std**0.5, "zero": 0.0}[upcycling.router_init]
            router = deviation * rng.normal((shape[0] // shards, shape[1]), random, np.float64)
        return router.repeat(shards, axis=0)

    note = {
        "normal": f"drawn, normal with std {std:g}",
        "variance": f"drawn, normal with variance {std:g}",
        "orthogonal": f"drawn, orthogonal rows with std {std:g}",
        "zero": "zeros",
    }[upcycling.router_init]
    return from_function(shape, make).noted(
        note + (f"; one row for the {shards} parts of a copy" if shards > 1 else "")
    )


def zeros(shape: tuple[int, ...], why: str) -> LazyTensor:
    """A tensor of zeros, and why it is."""
    return from_function(shape, partial(np.zeros, shape)).noted(why)
