"""Which units of a network stay when it becomes smaller, and what its tensors become.

A unit that goes may have one that stands for it: then what reads the two is added up, which keeps the function where
they are copies. A unit without one is left out. torch is imported by the first block of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from aquilamoe.checkpoint import tensor_names as names
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth.lazy_tensor import (
    Index,
    LazyTensor,
    filled,
    gathered,
    multiply_rows,
    numbers,
    scaled,
    stored,
    tensor_of,
    wide,
)
from aquilamoe.growth.stream import FILLER, Recipe

if TYPE_CHECKING:
    from torch import Tensor

_Q, _K = (names.Q_WEIGHT, names.Q_BIAS, names.Q_NORM), (names.K_WEIGHT, names.K_BIAS, names.K_NORM)
_V = (names.V_WEIGHT, names.V_BIAS)
_NORMS = (names.INPUT_NORM, names.POST_ATTENTION_NORM, names.FINAL_NORM)


@dataclass(frozen=True)
class UnitChoice:
    """The units of a space that stay.

    kept: their numbers in the source, in the target's order.
    firsts: of every unit of the source, the first that equals it, which may be itself; -1 for one that is left out.
    """

    kept: tuple[int, ...]
    firsts: tuple[int, ...]

    @classmethod
    def all_of(cls, size: int) -> UnitChoice:
        """Every unit stays."""
        return cls(tuple(range(size)), tuple(range(size)))

    @classmethod
    def merging(cls, firsts: Sequence[int], size: int) -> UnitChoice:
        """Merge copies until `size` units are left; then what does nothing (-1) has to go, too."""
        different = [unit for unit, first in enumerate(firsts) if unit == first]
        copies = [unit for unit, first in enumerate(firsts) if 0 <= first < unit]
        silent = [unit for unit, first in enumerate(firsts) if first < 0]
        kept = sorted([*different, *[*copies, *silent][: size - len(different)]])
        assert len(kept) == size, "callers count the different units first"
        return cls(tuple(kept), tuple(firsts))

    @cached_property
    def owner(self) -> tuple[int, ...]:
        """Of every unit of the source, the place in `kept` of the unit that stands for it; -1 for none."""
        place = {unit: number for number, unit in enumerate(self.kept)}
        return tuple(place.get(unit, place.get(first, -1)) for unit, first in enumerate(self.firsts))

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Units of the source that each kept one stands for, itself included."""
        counts = [0] * len(self.kept)
        for owner in self.owner:
            if owner >= 0:
                counts[owner] += 1
        return tuple(counts)

    @property
    def is_identity(self) -> bool:
        return self.kept == tuple(range(len(self.firsts)))

    @property
    def merges(self) -> bool:
        """Whether a unit stands for another one."""
        return max(self.counts) > 1

    def alike(self, values_u: Tensor) -> Tensor:
        """Values of all units, with those of the first for its copies, and 0 for what is left out."""
        import torch

        firsts = torch.tensor(self.firsts)
        is_left = (firsts >= 0).view(-1, *(1 for _ in values_u.shape[1:]))
        return torch.where(is_left, values_u[firsts.clamp(min=0)], 0.0)

    def inside(self, kept: Sequence[int], firsts: Sequence[int]) -> UnitChoice:
        """Units of this choice as blocks of channels, each with the same choice of them."""
        size = len(firsts)
        return UnitChoice(
            tuple(unit * size + channel for unit in self.kept for channel in kept),
            tuple(
                unit * size + channel if min(unit, channel) >= 0 else -1 for unit in self.firsts for channel in firsts
            ),
        )

    def norm_factor(self) -> np.ndarray:
        """What a kept unit is multiplied by so that the mean square over all units stays what it was."""
        counts = np.array(self.counts, np.float64)
        factor: np.ndarray = np.sqrt(counts * len(self.kept) / len(self.firsts))
        return factor


@dataclass(frozen=True, kw_only=True)
class LayerReduction:
    """One layer of the target.

    origin: its layer in the source.
    experts: of the source. Those that stay; of a layer that gets dense, those whose neurons it gets.
    neurons: by the role of down_proj in the target.
    """

    origin: int
    q_heads: UnitChoice
    kv_heads: UnitChoice
    experts: tuple[int, ...]
    neurons: Mapping[str, UnitChoice]


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """All that stays."""

    residual: UnitChoice
    layers: tuple[LayerReduction, ...]


def layer_tensors(
    reader: Reader, source: ModelConfig, target: ModelConfig, layer: int, chosen: tuple[int, tuple[int, ...]]
) -> dict[str, LazyTensor]:
    """Tensors of a layer of the source by their roles in the target, with all of their rows and columns.

    layer: of the target. chosen: the layer of the source, and its experts.
    """
    origin, experts = chosen
    on_disk = names.layer_names(source, origin)
    fillers = names.filler_roles(target) if target.is_sparse(layer) else []
    found = {}
    for role in names.role_shapes(target, layer):
        if role in fillers:
            continue
        if source.is_sparse(origin) and not target.is_sparse(layer) and role in (names.GATE, names.UP, names.DOWN):
            found[role] = _dense(reader, source, origin, role, experts)
        elif names.general(role) != role:
            number = int(role.split(".")[2])
            original = names.expert_role(experts[number], names.dense_role(role))
            found[role] = stored(reader, on_disk[original], original)
        elif role == names.ROUTER:
            router = stored(reader, on_disk[role], role)
            is_all = experts == tuple(range(source.num_experts))
            found[role] = router if is_all else gathered(router, len(experts), lambda: np.array(experts))
        else:
            found[role] = stored(reader, on_disk[role], role)
    return found


def _dense(reader: Reader, source: ModelConfig, origin: int, role: str, experts: tuple[int, ...]) -> LazyTensor:
    """A dense feed-forward out of experts that all get the same share, and of the half of a shared one (METHODS 5)."""
    on_disk = names.layer_names(source, origin)
    share = 1.0 if role == names.GATE else len(experts) ** -0.5
    roles = [names.expert_role(expert, role) for expert in experts]
    parts = [scaled(stored(reader, on_disk[each], each), share) for each in roles]
    shared = f"mlp.shared_expert.{role.removeprefix('mlp.')}"
    if source.shared_expert_intermediate_size:
        parts.append(scaled(stored(reader, on_disk[shared], shared), 0.5 if role == names.DOWN else 1.0))
    if len(parts) == 1:
        return parts[0].noted("copied: the function of all experts")
    joined = beside(parts) if role == names.DOWN else stacked(parts)
    return joined.noted(f"joined: {len(parts)} parts of a feed-forward")


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The rows of several tensors, one behind the other."""
    starts = np.cumsum([0, *(part.shape[0] for part in parts)])

    def read(index: Index) -> Tensor:
        import torch

        at, blocks = numbers(index), []
        part_of = torch.bucketize(at, tensor_of(starts[1:]), right=True)
        order = part_of.argsort(stable=True)
        for number in part_of.unique().tolist():
            blocks.append(wide(parts[number][at[part_of == number] - int(starts[number])]))
        rows = torch.cat(blocks)
        return torch.empty_like(rows).index_copy_(0, order, rows)

    return parts[0].derive(read, (int(starts[-1]), *parts[0].shape[1:]), *parts[1:])


def beside(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The columns of several tensors, side by side."""

    def read(index: Index) -> Tensor:
        import torch

        return torch.cat([wide(part[index]) for part in parts], dim=1)

    return parts[0].derive(read, (parts[0].shape[0], sum(part.shape[1] for part in parts)), *parts[1:])


def recipes(reader: Reader, source: ModelConfig, target: ModelConfig, reduction: Reduction) -> Iterator[Recipe]:
    """Yield what every tensor of the target is made of: what is outside the layers, then a layer at a time."""
    whole = _Reducer(source, target, reduction, None)
    for name in names.outer_shapes(target):
        yield Recipe([name], whole.reduce(name, stored(reader, name)))
    for index, layer in enumerate(reduction.layers):
        reducer = replace(whole, layer=layer)
        for role, tensor in layer_tensors(reader, source, target, index, (layer.origin, layer.experts)).items():
            yield Recipe([names.layer_name(target, index, role)], reducer.reduce(role, tensor))
        if target.is_sparse(index):
            shapes = names.role_shapes(target, index)
            for role in names.filler_roles(target):
                yield Recipe([names.layer_name(target, index, role)], filled(shapes[role], 0.0).noted(FILLER))


@dataclass(frozen=True)
class _Reducer:
    """Makes the tensors of one layer, or those outside the layers, smaller."""

    source: ModelConfig
    target: ModelConfig
    reduction: Reduction
    layer: LayerReduction | None

    def reduce(self, role: str, tensor: LazyTensor) -> LazyTensor:
        """One tensor, by its role."""
        rows, columns = self._rows(role), self._columns(role)
        if columns is not None:
            tensor = summed(tensor, columns) if role != names.EMBEDDING else _selected(tensor, columns)
        if rows is not None and not rows.is_identity:
            tensor = gathered(tensor, len(rows.kept), lambda: np.array(rows.kept))
        tensor = self._scaled(role, tensor)
        return tensor.noted(*self._notes(rows, columns))

    def _notes(self, *spaces: UnitChoice | None) -> Iterator[str]:
        for what, space in zip(("rows", "columns"), spaces, strict=True):
            if space is not None and not space.is_identity:
                merged = ", copies merged" if space.merges else ""
                yield f"{what} {len(space.firsts)} -> {len(space.kept)}{merged}"

    def _rows(self, role: str) -> UnitChoice | None:
        """The space of a tensor's rows, where they are units that may go."""
        if role in _NORMS or names.writes_residual(role):
            return self.reduction.residual
        if role in (names.Q_NORM, names.K_NORM) and self.source.qk_norm != "projection":
            return None
        if role in _Q:
            return self.q_channels
        if role in _K:
            return self.k_channels
        if role in _V:
            return self.v_channels
        return self._neurons(role) if role.endswith(("gate_proj.weight", "up_proj.weight")) else None

    def _columns(self, role: str) -> UnitChoice | None:
        """The space of a tensor's columns."""
        if role == names.O_WEIGHT:
            return self.mixed_channels
        if names.writes_residual(role):
            return self._neurons(role)
        is_vector = role in (*_NORMS, names.Q_NORM, names.K_NORM) or role.endswith(".bias")
        return None if is_vector else self.reduction.residual

    def _neurons(self, role: str) -> UnitChoice:
        assert self.layer is not None
        return self.layer.neurons[role.rpartition(".weight")[0].rpartition(".")[0] + ".down_proj.weight"]

    @property
    def _rotary(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the channels of a query or key head, those that stay: pairs between them are silent."""
        old, new = self.source.head_dim // 2, self.target.head_dim // 2
        ratio = old // new
        kept = tuple(half * old + ratio * pair for half in (0, 1) for pair in range(new))
        return kept, tuple(channel if channel in kept else -1 for channel in range(2 * old))

    @property
    def _plain(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the channels of a value head, those that stay: the others are copies."""
        old, new = self.source.head_dim, self.target.head_dim
        return tuple(range(new)), tuple(channel % new for channel in range(old))

    @property
    def q_channels(self) -> UnitChoice:
        assert self.layer is not None
        return self.layer.q_heads.inside(*self._rotary)

    @property
    def k_channels(self) -> UnitChoice:
        assert self.layer is not None
        return self.layer.kv_heads.inside(*self._rotary)

    @property
    def v_channels(self) -> UnitChoice:
        assert self.layer is not None
        return self.layer.kv_heads.inside(*self._plain)

    @property
    def mixed_channels(self) -> UnitChoice:
        assert self.layer is not None
        return self.layer.q_heads.inside(*self._plain)

    def _scaled(self, role: str, tensor: LazyTensor) -> LazyTensor:
        """Norms see the mean square that they saw, and softmax the scores."""
        factor = self._factor(role)
        if factor is None:
            return tensor
        if role != names.EMBEDDING:
            return multiply_rows(tensor, factor)
        if (factor == 1).all():
            return tensor
        return tensor.derive(lambda index: wide(tensor[index]) * tensor_of(factor).to(wide(tensor[index]).dtype))

    def _factor(self, role: str) -> np.ndarray | None:
        if role in (names.Q_WEIGHT, names.Q_BIAS) and self.target.head_dim != self.source.head_dim:
            size = self.target.num_attention_heads * self.target.head_dim
            return np.full(size, (self.target.head_dim / self.source.head_dim) ** 0.5)
        residual = self.reduction.residual
        if role in _NORMS:
            if role == names.FINAL_NORM and self.target.tie_word_embeddings:
                counts = np.array(residual.counts, np.float64)
                tied: np.ndarray = counts / np.square(residual.norm_factor())
                return tied
            return 1 / residual.norm_factor()
        if role == names.EMBEDDING or names.writes_residual(role):
            return residual.norm_factor()
        if self.source.qk_norm == "projection" and role in (*_Q, *_K):
            assert self.layer is not None
            heads = self.layer.q_heads if role in _Q else self.layer.kv_heads
            factor = heads.norm_factor().repeat(self.target.head_dim)
            return 1 / factor if role in (names.Q_NORM, names.K_NORM) else factor
        return None


def _selected(rows: LazyTensor, choice: UnitChoice) -> LazyTensor:
    """The columns that stay."""
    if choice.is_identity:
        return rows

    def read(index: Index) -> Tensor:
        import torch

        return rows[index].index_select(1, torch.tensor(choice.kept))

    return rows.derive(read, (rows.shape[0], len(choice.kept)))


def summed(rows: LazyTensor, choice: UnitChoice) -> LazyTensor:
    """The columns that stay, each with those added that it stands for; in float64, and rounded once."""
    if not choice.merges:
        return _selected(rows, choice)

    def read(index: Index) -> Tensor:
        import torch

        owner, block = torch.tensor(choice.owner), rows[index].double()
        (columns,) = (owner >= 0).nonzero(as_tuple=True)
        sums = torch.zeros(len(block), len(choice.kept), dtype=torch.float64)
        return sums.index_add_(1, owner[columns], block[:, columns])

    return rows.derive(read, (rows.shape[0], len(choice.kept)))
