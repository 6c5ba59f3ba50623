"""Scale-Out (sparse upcycling): a checkpoint gets experts, or more of them, a tensor at a time (METHODS section 5)."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import noise, rules
from aquilamoe.growth.stream import Progress, Stream, compute_dtype, rewrite, silent
from aquilamoe.weights import configuration, names
from aquilamoe.weights.store import Reader


def scale_out(
    source: Path,
    target: Path,
    target_config: ModelConfig,
    upcycling: UpcyclingConfig,
    seed: int,
    progress: Progress = silent,
) -> None:
    """Make every feed-forward of the checkpoint in `source` a layer of (more) experts, and write it to `target`.

    Of a dense source, experts are copies of the feed-forward, or of equal parts of it where the target's
    intermediate_size is smaller, and `router_init` says what routers start as. Of a Mixture of Experts they are copies
    of its experts, neighbours with the score of their original. `upcycling.method` says what tells copies apart;
    everything else is copied. The result depends on the arguments alone and keeps the source's dtype. In memory there
    is one tensor. Raises UserError for a growth that cannot be done (see `rules.check`) and for a damaged source.
    """
    source_config = configuration.read_config(source)
    rules.check(source_config, target_config, upcycling)

    def grow(reader: Reader) -> Stream:
        return _upcycle(reader, source_config, target_config, upcycling, seed)

    rewrite(source, target, (source_config, target_config), grow, progress)


def _upcycle(reader: Reader, source: ModelConfig, target: ModelConfig, upcycling: UpcyclingConfig, seed: int) -> Stream:
    """Yield every tensor of the target in file order."""
    dtype = compute_dtype(reader.dtype(names.EMBEDDING))
    shards = 1 if source.is_moe else rules.num_shards(source, target)
    copies = target.num_experts // (source.num_experts or target.num_experts)
    shapes = names.role_shapes(target, 0)
    experts = {
        names.expert_role(expert, role): (role, expert)
        for role in (names.GATE, names.UP, names.DOWN)
        for expert in range(target.num_experts)
    }
    fillers = names.filler_roles(target)
    outer = names.outer_shapes(target)
    yield names.EMBEDDING, reader.get(names.EMBEDDING)
    for layer in range(target.num_hidden_layers):
        random = partial(_stream, seed, f"model.layers.{layer}.")
        for role, shape in shapes.items():
            if role == names.ROUTER and source.is_moe:
                tensor = reader.get(names.layer_name(source, layer, role)).repeat_interleave(copies, dim=0)
            elif role == names.ROUTER:
                tensor = _draw_router(shape, shards, upcycling, dtype, random(role))
            elif role in fillers:
                tensor = torch.zeros(shape, dtype=dtype)
            elif role in experts:
                dense_role, expert = experts[role]
                source_role = names.expert_role(expert // copies, dense_role) if source.is_moe else dense_role
                dense = reader.get(names.layer_name(source, layer, source_role))
                tensor = _grow_expert(dense, dense_role, divmod(expert, shards), shards, upcycling, random)
            else:
                tensor = reader.get(names.layer_name(source, layer, role))
            yield names.layer_name(target, layer, role), tensor
    for name in outer:
        if name != names.EMBEDDING:
            yield name, reader.get(name)


def _stream(seed: int, layer: str, name: str) -> torch.Generator:
    return noise.generator(seed, layer + name)


def _draw_router(
    shape: tuple[int, ...], shards: int, upcycling: UpcyclingConfig, dtype: torch.dtype, random: torch.Generator
) -> Tensor:
    """Scores of the copies of the feed-forward, each repeated over its parts (virtual groups, arXiv 2410.07524).

    `variance` reads router_std as the variance, which is what the paper's words say; `orthogonal` has rows at right
    angles, as long as those of `normal` are on average.
    """
    copies, hidden = shape[0] // shards, shape[1]
    std = upcycling.router_std
    if upcycling.router_init == "orthogonal":
        router = torch.empty(copies, hidden, dtype=dtype)
        torch.nn.init.orthogonal_(router, std * max(copies, hidden) ** 0.5, generator=random)
    else:
        std = {"normal": std, "variance": std**0.5, "zero": 0.0}[upcycling.router_init]
        router = noise.normal((copies, hidden), std, dtype, random)
    return router.repeat_interleave(shards, dim=0)


def _grow_expert(
    dense: Tensor,
    role: str,
    place: tuple[int, int],
    shards: int,
    upcycling: UpcyclingConfig,
    random: Callable[[str], torch.Generator],
) -> Tensor:
    """One tensor of an expert out of the dense one: its neurons are rows of gate and up, and columns of down.

    place: which copy of the feed-forward the expert belongs to, and which part of that it is.
    random: the layer's streams of random numbers by name; what happens to neurons is one stream for all three roles.
    """
    copy, shard = place
    dtype = compute_dtype(dense.dtype)
    axis = 1 if role == names.DOWN else 0
    if upcycling.method in ("permute", "drop"):
        neurons = torch.randperm(dense.shape[axis], generator=random(f"neurons.{copy}"))
        if upcycling.method == "permute":
            dense = dense.index_select(axis, neurons)
        else:
            dropped = neurons[: math.ceil(upcycling.drop_ratio * len(neurons))]
            dense = _redraw(dense.to(dtype), axis, dropped, random(f"{role}/drop.{copy}"))
    if shards > 1:
        dense = dense.chunk(shards, dim=axis)[shard]
        # Gates share a weight of 1 over the parts, so that each counts for 1 / shards; up and down make good for it.
        dense = dense if role == names.GATE else dense.to(dtype) * shards**0.5
    if upcycling.method == "noise":
        dense = dense.to(dtype)
        stream = random(names.expert_role(copy * shards + shard, role))
        dense = dense + noise.normal(tuple(dense.shape), upcycling.noise * dense.std().item(), dtype, stream)
    return dense


def _redraw(dense: Tensor, axis: int, dropped: Tensor, random: torch.Generator) -> Tensor:
    """Draw the dropped neurons afresh, with the mean and deviation of what they were (Drop-Upcycling)."""
    old = dense.index_select(axis, dropped)
    fresh = noise.normal(tuple(old.shape), old.std().item(), dense.dtype, random) + old.mean()
    return dense.index_copy(axis, dropped, fresh)
