"""Scale-Out (sparse upcycling): a checkpoint gets experts, or more of them, a block of rows at a time (METHODS 5)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import noise, rules
from aquilamoe.growth.rows import Index, Rows, as_rows, filled, gathered, scaled, stored, wide
from aquilamoe.growth.stream import Progress, Recipe, compute_dtype, rewrite, silent
from aquilamoe.weights import configuration, names
from aquilamoe.weights.store import Reader

# The shared expert is a copy of the dense feed-forward.
_SHARED = {names.SHARED_GATE: names.GATE, names.SHARED_UP: names.UP, names.SHARED_DOWN: names.DOWN}


def scale_out(
    source: Path,
    target: Path,
    target_config: ModelConfig,
    upcycling: UpcyclingConfig,
    seed: int,
    progress: Progress = silent,
) -> dict[str, str]:
    """Make feed-forwards of the checkpoint in `source` layers of (more) experts, and write it to `target`.

    Of a dense source, experts are copies of the feed-forward, or of equal parts of it where the target's
    moe_intermediate_size is smaller, and `router_init` says what routers start as. A shared expert is a copy too: it
    starts with a share of one half, and the others are halved. Of a Mixture of Experts they are copies of its experts,
    neighbours with the score of their original. `upcycling.method` says what tells copies apart; everything else is
    copied, `mlp_only_layers` as they are. The result depends on the arguments alone and keeps the source's dtype. In
    memory there are some blocks of rows. Returns the SHA-256 of every tensor. Raises UserError for a growth that cannot
    be done (see `rules.check`) and for a damaged source.
    """
    source_config = configuration.read_config(source)
    rules.check(source_config, target_config, upcycling)
    grow = partial(_grow, source=source_config, target=target_config, upcycling=upcycling, seed=seed)
    return rewrite(source, target, (source_config, target_config), grow, progress)


def _grow(
    reader: Reader, source: ModelConfig, target: ModelConfig, upcycling: UpcyclingConfig, seed: int
) -> Iterator[Recipe]:
    """Yield what every tensor of the target is made of."""
    for name in names.outer_shapes(target):
        yield Recipe([name], stored(reader, name))
    for index in range(target.num_hidden_layers):
        layer = _Layer(reader, source, target, upcycling, seed, index)
        yield from layer.sparse() if target.is_sparse(index) else layer.dense()


@dataclass(frozen=True)
class _Layer:
    """One layer that gets experts."""

    reader: Reader
    source: ModelConfig
    target: ModelConfig
    upcycling: UpcyclingConfig
    seed: int
    index: int

    def dense(self) -> Iterator[Recipe]:
        """The layer as it is."""
        for role in names.role_shapes(self.target, self.index):
            yield self._to(self._from(role), role)

    def sparse(self) -> Iterator[Recipe]:
        """The layer with a router and experts."""
        fillers = names.filler_roles(self.target)
        for role, shape in names.role_shapes(self.target, self.index).items():
            if role.startswith("mlp.experts."):
                continue
            if role == names.ROUTER:
                yield self._to(self._router(shape), role)
            elif role in fillers or (role == names.SHARED_ROUTER and not self.source.is_moe):
                yield self._to(filled(shape, 0.0), role)
            else:
                yield self._to(self._from(role if self.source.is_moe else _SHARED.get(role, role)), role)
        for role in (names.GATE, names.UP, names.DOWN):
            yield from self._experts(role)

    def _from(self, role: str) -> Rows:
        return stored(self.reader, names.layer_name(self.source, self.index, role))

    def _to(self, rows: Rows, *roles: str) -> Recipe:
        return Recipe([names.layer_name(self.target, self.index, role) for role in roles], rows)

    def _name(self, name: str) -> str:
        """Of a stream of random numbers."""
        return f"model.layers.{self.index}.{name}"

    def _experts(self, role: str) -> Iterator[Recipe]:
        """What every expert has in one role; each tensor of the source is read for all of its copies at once."""
        originals = [names.expert_role(expert, role) for expert in range(self.source.num_experts)] or [role]
        shards = rules.num_shards(self.source, self.target)
        copies = self.target.num_experts // (len(originals) * shards)
        for original, original_role in enumerate(originals):
            tensor = self._from(original_role)
            of_original = range(original * copies, (original + 1) * copies)
            if self.upcycling.method == "copy":
                for shard in range(shards):
                    experts = [names.expert_role(copy * shards + shard, role) for copy in of_original]
                    yield self._to(self._cut(tensor, role, shard, shards), *experts)
                continue
            for copy in of_original:
                varied = self._vary(tensor, role, copy)
                for shard in range(shards):
                    expert = names.expert_role(copy * shards + shard, role)
                    part = self._cut(varied, role, shard, shards)
                    yield self._to(self._add_noise(part, tensor, expert, role), expert)

    def _cut(self, tensor: Rows, role: str, shard: int, shards: int) -> Rows:
        """One part of a feed-forward, times what keeps the sum over all of them."""
        if shards == 1:
            return scaled(tensor, self._factor(role, shards))
        neurons = self.target.moe_intermediate_size
        part = slice(shard * neurons, (shard + 1) * neurons)
        if role == names.DOWN:
            cut = tensor.derive(lambda index: tensor[index][:, part], (tensor.shape[0], neurons))
        else:
            cut = gathered(tensor, torch.arange(part.start, part.stop))
        return scaled(cut, self._factor(role, shards))

    def _factor(self, role: str, shards: int) -> float:
        """Gates share a weight of 1 over the parts, so that each counts for 1 / shards; up and down make good for it.

        Beside a shared expert, which has a half, the others have the other half.
        """
        factor = 1.0 if role == names.GATE else shards**0.5
        is_halved = role == names.DOWN and not self.source.is_moe and self.target.shared_expert_intermediate_size
        return factor / 2 if is_halved else factor

    def _add_noise(self, part: Rows, tensor: Rows, expert: str, role: str) -> Rows:
        """Noise of an expert's own, as a fraction of the deviation of the whole tensor."""
        if self.upcycling.method != "noise":
            return part
        size = self.upcycling.noise * self._factor(role, rules.num_shards(self.source, self.target))
        drawn = self._drawn(part.shape, expert)
        return part.derive(lambda index: drawn[index].mul_(size * tensor.std).add_(part[index]), None, drawn)

    def _drawn(self, shape: tuple[int, ...], name: str) -> Rows:
        dtype = compute_dtype(self.reader.dtype(names.EMBEDDING))
        return noise.drawn(shape, 1.0, dtype, self.seed, self._name(name))

    def _vary(self, tensor: Rows, role: str, copy: int) -> Rows:
        """What tells the neurons of a copy apart: rows of gate and up, and columns of down, by one stream for all."""
        if self.upcycling.method not in ("permute", "drop"):
            return tensor
        axis = 1 if role == names.DOWN else 0
        neurons = torch.randperm(
            tensor.shape[axis], generator=noise.generator(self.seed, self._name(f"neurons.{copy}"))
        )
        if self.upcycling.method == "permute":
            return _take(tensor, axis, neurons)
        dropped = neurons[: math.ceil(self.upcycling.drop_ratio * len(neurons))]
        return _redraw(tensor, axis, dropped, self._drawn(tensor.shape, f"{role}/drop.{copy}"))

    def _router(self, shape: tuple[int, ...]) -> Rows:
        """Scores of the copies: those of their originals, or of a dense source drawn for each feed-forward.

        Parts of a feed-forward have one score (virtual groups, arXiv 2410.07524). `variance` reads router_std as the
        variance, which is what the paper's words say; `orthogonal` has rows at right angles, as long as those of
        `normal` are on average.
        """
        if self.source.is_moe:
            experts = torch.arange(self.source.num_experts)
            originals = experts.repeat_interleave(self.target.num_experts // self.source.num_experts)
            return gathered(self._from(names.ROUTER), originals)
        shards = rules.num_shards(self.source, self.target)
        copies, hidden = shape[0] // shards, shape[1]
        dtype = compute_dtype(self.reader.dtype(names.EMBEDDING))
        random, std = noise.generator(self.seed, self._name(names.ROUTER)), self.upcycling.router_std
        if self.upcycling.router_init == "orthogonal":
            router = torch.empty(copies, hidden, dtype=dtype)
            torch.nn.init.orthogonal_(router, std * max(copies, hidden) ** 0.5, generator=random)
        else:
            std = {"normal": std, "variance": std**0.5, "zero": 0.0}[self.upcycling.router_init]
            router = noise.normal((copies, hidden), std, dtype, random)
        return as_rows(router.repeat_interleave(shards, dim=0))


def _take(tensor: Rows, axis: int, neurons: Tensor) -> Rows:
    """Neurons of a feed-forward in an order."""
    if axis == 0:
        return gathered(tensor, neurons)
    return tensor.derive(lambda index: tensor[index].index_select(1, neurons), (tensor.shape[0], len(neurons)))


def _redraw(tensor: Rows, axis: int, dropped: Tensor, drawn: Rows) -> Rows:
    """Draw the dropped neurons afresh, with the mean and deviation of what they were (Drop-Upcycling)."""
    old = _take(tensor, axis, dropped.sort().values)
    is_dropped = torch.zeros(tensor.shape[axis], dtype=torch.bool)
    is_dropped[dropped] = True

    def read(index: Index) -> Tensor:
        fresh = drawn[index] * old.std + old.mean
        return torch.where(is_dropped if axis else is_dropped[index][:, None], fresh, wide(tensor[index]))

    return tensor.derive(read, None, drawn)
