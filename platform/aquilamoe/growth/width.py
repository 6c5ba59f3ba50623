"""Growing the tensors of a layer in width, by the maps of their units: what methods are written in (METHODS 2).

torch is imported by the first block of rows: a plan reads of a grown tensor only its parts and notes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.schema import GrowthConfig
from aquilamoe.growth import noise
from aquilamoe.growth.lazy_tensor import (
    Index,
    LazyTensor,
    as_rows,
    extended,
    filled,
    gathered,
    is_exact,
    multiply,
    multiply_rows,
    narrow,
    tensor_of,
    wide,
)
from aquilamoe.growth.units import UnitMap, Units

if TYPE_CHECKING:
    from torch import Tensor

Tensors = Mapping[str, LazyTensor]  # by role
_FINAL_NORM = (tensor_names.FINAL_NORM, tensor_names.FINAL_NORM_BIAS)
# Biases of norms become what gains become: with them, only whole copies of all channels are exact (see `rules`).
_NORMS = (
    *(tensor_names.INPUT_NORM, tensor_names.INPUT_NORM_BIAS),
    *(tensor_names.POST_ATTENTION_NORM, tensor_names.POST_ATTENTION_NORM_BIAS),
    *_FINAL_NORM,
)


@dataclass(frozen=True, kw_only=True)
class Width:
    """What a method gets beside its tensors.

    units: the maps of units.
    growth: how norms are treated and how large the noise is.
    shapes: the target's shape of every role that is being grown.
    tied: whether the head is the embedding.
    initializer_range: standard deviation of freshly drawn matrices.
    seed, place: `place` is where the tensors go (`model.layers.3.`, or empty outside the layers); with the role it
        names a stream of random numbers.
    dtype: of the computation, F32 or F64.
    divides_scores: whether attention divides scores by the root of head_dim, and not by a constant.
    """

    units: Units
    growth: GrowthConfig
    shapes: Mapping[str, tuple[int, ...]]
    tied: bool
    initializer_range: float
    seed: int
    place: str
    dtype: str
    divides_scores: bool = True

    def copy(
        self,
        role: str,
        tensor: LazyTensor | Tensor,
        new_rows: LazyTensor | Tensor | None = None,
        new_columns: LazyTensor | Tensor | None = None,
    ) -> LazyTensor:
        """Grow one tensor so that the network keeps its function, as long as no *new* units are passed.

        tensor: the source's tensor of this role, or what was made of it.
        new_rows, new_columns: tensors of the same shape that the rows and the columns of new units (further copies) are
            taken from instead. Ignored where they are no units: in embedding, head and norms.
        """
        tensor = as_rows(tensor)
        grown = self._copy(role, tensor, new_rows, new_columns)
        return grown.noted(*self._notes(role, tensor, new_rows is not None, new_columns is not None))

    def _copy(
        self,
        role: str,
        tensor: LazyTensor,
        new_rows: LazyTensor | Tensor | None,
        new_columns: LazyTensor | Tensor | None,
    ) -> LazyTensor:
        if role in _NORMS:
            return self._copy_gain(role, tensor)
        if role in (tensor_names.Q_NORM, tensor_names.K_NORM):
            return self._copy_head_gain(role, tensor)
        if role in (tensor_names.EMBEDDING, tensor_names.HEAD):
            # Logits of the old tokens stay, and by Jensen's inequality a new token takes no more probability than the
            # mean old one: the KL divergence of the predictions is at most log(1 + new / old) nats.
            known = tensor
            tensor = extended(known, self.shapes[role][0], lambda: known.mean_row)
        if role == tensor_names.EMBEDDING:
            return self._pad(role, _copy_columns(tensor, self.units.residual, self._residual_factor))
        rows, columns = self.units.rows(role), self.units.columns(role)
        grown = _read_copies(tensor, columns, None if new_columns is None else as_rows(new_columns))
        if new_rows is not None and rows is not None and rows.has_new:
            grown = _mix_rows(grown, _read_copies(as_rows(new_rows), columns), rows)
        else:
            grown = _copy_rows(grown, rows)
        if columns is not None:
            grown = self._with_noise(role, grown, tensor, columns)
        return self._pad(role, self._scale_rows(role, grown))

    def _notes(self, role: str, tensor: LazyTensor, has_new_rows: bool, has_new_columns: bool) -> Iterator[str]:
        """What `_copy` did to a tensor: to its rows, then to its columns, then noise and new tokens."""
        residual = self.units.residual
        rows, columns = self.units.rows(role), self.units.columns(role)
        if role in (tensor_names.EMBEDDING, *_NORMS):
            spaces: list[UnitMap | None] = [residual]
        elif role in (tensor_names.Q_NORM, tensor_names.K_NORM):
            spaces = [self._gain_channels(role)] if tensor.shape != self.shapes[role] else []
        else:
            spaces = [rows, columns]
        is_scaled = role in (tensor_names.EMBEDDING, *_NORMS) or tensor_names.writes_residual(role)
        is_rescaled = self.growth.norm == "exact" and is_scaled
        for space in spaces:
            if space is not None and not space.is_identity:
                rescaled = " (rescaled, norm exact)" if is_rescaled and space is residual else ""
                yield self.units.describe(space) + rescaled
        if has_new_rows and rows is not None and rows.has_new:
            yield "new rows from the layer above"
        if columns is not None and columns.has_new:
            if has_new_columns:
                yield "new columns from the layer above"
            if self.growth.noise > 0:
                yield f"noise {self.growth.noise:g}"
        if role in (tensor_names.EMBEDDING, tensor_names.HEAD) and self.shapes[role][0] != tensor.shape[0]:
            yield f"tokens {tensor.shape[0]} -> {self.shapes[role][0]}, new ones as the mean"

    def draw(self, role: str) -> LazyTensor:
        """A fresh tensor as a model starts with: matrices normal with `initializer_range`, biases zero, gains one."""
        shape, std = self.shapes[role], self.initializer_range
        if role.endswith("norm.weight"):
            return filled(shape, 1.0).noted("ones")
        if role.endswith(".bias"):
            return filled(shape, 0.0).noted("zeros")
        drawn = noise.drawn(shape, std, self.dtype, self.seed, self.place + role)
        return drawn.noted(f"drawn, normal with std {std:g}")

    def _drawn(self, role: str, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """Normal numbers for some columns of a tensor."""
        step = noise.rows_of_stream(self.shapes[role])
        return noise.drawn(shape, 1.0, self.dtype, self.seed, self.place + name, step=step)

    def _with_noise(self, role: str, grown: LazyTensor, tensor: LazyTensor, columns: UnitMap) -> LazyTensor:
        """Add noise that cancels over the copies of an input, and what is read of the padding.

        The latter are weights on inputs that are zero: free, so random, and as large as those on copies.
        """
        if self.growth.noise > 0 and columns.has_new:
            drawn, copies = self._drawn(role, role, (grown.shape[0], sum(columns.is_new))), grown
            cancelling = cache(partial(noise.cancelling, columns, self.dtype))

            def read(index: Index) -> Tensor:
                block = wide(copies[index])
                cancelling().add(block, drawn[index], self.growth.noise * tensor.rms)
                return block

            grown = copies.derive(read, None, drawn)
        if not columns.padding:
            return grown
        free = self._drawn(role, f"{role}/padding", (grown.shape[0], columns.padding))
        share, known = columns.num_sources / len(columns.sources), grown

        def read_padded(index: Index) -> Tensor:
            import torch

            return torch.cat([wide(known[index]), free[index] * (tensor.rms * share)], dim=1)

        return known.derive(read_padded, (known.shape[0], columns.size), free)

    def _scale_rows(self, role: str, grown: LazyTensor) -> LazyTensor:
        """What is written to the residual stream carries alpha; queries compensate the root of a wider head_dim.

        Norms on queries and keys have the epsilon of all norms. Where padding changes it, what they divide changes too.
        """
        if tensor_names.writes_residual(role):
            factor = self._residual_factor
        elif role in (tensor_names.Q_WEIGHT, tensor_names.K_WEIGHT) and tensor_names.Q_NORM in self.shapes:
            residual = self.units.residual
            factor = self._head_factor(role) * (len(residual.sources) / residual.size) ** 0.5
        elif role in (tensor_names.Q_WEIGHT, tensor_names.Q_BIAS):
            factor = self._query_factor
        else:
            return grown
        return multiply_rows(grown, factor)

    def _gain_channels(self, role: str) -> UnitMap:
        """The channels that a norm on queries or keys is over, where it is over those of all heads."""
        is_query = role in (tensor_names.Q_WEIGHT, tensor_names.Q_NORM)
        return self.units.q_channels if is_query else self.units.k_channels

    def _head_factor(self, role: str) -> np.ndarray:
        """beta of every query or key channel, where one norm is over the channels of all heads (OLMoE).

        Copies of a head carry beta times its channels, so that the mean square over all heads stays at uneven counts.
        A norm over each head (Qwen3) sees whole heads: 1.
        """
        channels = self._gain_channels(role)
        is_query = role in (tensor_names.Q_WEIGHT, tensor_names.Q_NORM)
        if self.shapes[tensor_names.Q_NORM if is_query else tensor_names.K_NORM][0] != channels.size:
            return np.ones(channels.size)
        factor: np.ndarray = np.sqrt(channels.size / channels.num_sources / channels.multiplicity)
        return factor

    def _copy_head_gain(self, role: str, gain: LazyTensor) -> LazyTensor:
        """Gains of the norm on queries or keys: of one head, shared by all, or of all heads together."""
        if gain.shape == self.shapes[role]:
            return gain
        return multiply_rows(_copy_rows(gain, self._gain_channels(role)), 1 / self._head_factor(role))

    def _copy_gain(self, role: str, gain: LazyTensor) -> LazyTensor:
        """Gains of a norm, changed so that readers see equal copies; the gain of padding multiplies zeros.

        A tied head cannot divide its columns by the number of copies, for they are the embedding's: the final norm
        does it, and takes back the alpha that those columns carry.
        """
        residual = self.units.residual
        # Padding is counted by the mean square that the norm divides by.
        share = (len(residual.sources) / residual.size) ** 0.5
        factor = share / self._residual_factor
        if role in _FINAL_NORM and self.tied:
            factor = share / (np.square(self._residual_factor) * residual.multiplicity)
        return extended(multiply_rows(_copy_rows(gain, residual), factor), residual.size, _number(1.0))

    def _pad(self, role: str, grown: LazyTensor) -> LazyTensor:
        """Zeros where padding is written: behind the rows, or behind the columns of the embedding."""
        rows, *columns = self.shapes[role]
        if columns and columns[0] != grown.shape[1]:
            narrower, more = grown, columns[0] - grown.shape[1]

            def read(index: Index) -> Tensor:
                from torch.nn.functional import pad

                return pad(narrower[index], (0, more))

            grown = narrower.derive(read, (rows, *columns))
        return extended(grown, rows, _number(0.0))

    @cached_property
    def _residual_factor(self) -> np.ndarray:
        """alpha of every copied channel: copy i of channel j carries alpha_i * x_j, for the sake of the mean square."""
        residual = self.units.residual
        if self.growth.norm != "exact":
            return np.ones(len(residual.sources))
        factor: np.ndarray = np.sqrt(len(residual.sources) / residual.num_sources / residual.multiplicity)
        return factor

    @cached_property
    def _query_factor(self) -> np.ndarray:
        """Of every query channel: attention divides by the root of head_dim, and pairs between the old are silent."""
        inside = self.units.rotary
        factor = (len(inside.sources) / inside.num_sources) ** 0.5 if self.divides_scores else 1.0
        of_head = np.array([0.0 if new else factor for new in inside.is_new])
        return np.tile(of_head, len(self.units.q_heads.sources))


def _number(value: float) -> Callable[[], Tensor]:
    """What further rows are filled with."""
    return lambda: tensor_of(np.array(value, np.float32))


def _read_copies(tensor: LazyTensor, columns: UnitMap | None, new_columns: LazyTensor | None = None) -> LazyTensor:
    """Grow the input side: every copy of a unit reads its share, so that their sum is what the unit was read with."""
    if columns is None:
        return tensor
    share = 1 / columns.multiplicity
    own = _copy_columns(tensor, columns, share)
    if new_columns is None or not columns.has_new:
        return own
    other = _copy_columns(new_columns, columns, share)

    def read(index: Index) -> Tensor:
        import torch

        return torch.where(tensor_of(columns.further), other[index], own[index])

    return own.derive(read, None, other)


def _copy_columns(tensor: LazyTensor, columns: UnitMap, factor: np.ndarray) -> LazyTensor:
    """Copies of columns, without padding, each times its factor."""
    if columns.sources == tuple(range(columns.num_sources)):
        if (factor == 1).all():
            return tensor
        return tensor.derive(lambda index: multiply(tensor[index], tensor_of(factor)))
    places, exact = cache(lambda: noise.Columns(list(columns.sources))), is_exact(factor)

    def read(index: Index) -> Tensor:
        block = places().take(tensor[index])
        block = block if exact else wide(block)
        return block.mul_(tensor_of(factor).to(block.dtype))

    return tensor.derive(read, (tensor.shape[0], len(columns.sources)))


def _copy_rows(tensor: LazyTensor, units: UnitMap | None) -> LazyTensor:
    """Copies of rows, without padding."""
    if units is None or units.sources == tuple(range(units.num_sources)):
        return tensor
    return gathered(tensor, len(units.sources), lambda: units.index)


def _mix_rows(old: LazyTensor, new: LazyTensor, units: UnitMap) -> LazyTensor:
    """Copies of rows, the first of each unit from `old` and further ones from `new`."""

    def read(index: Index) -> Tensor:
        import torch

        at, further = tensor_of(units.index)[index], tensor_of(units.further)[index]
        if further.all() or not further.any():
            return (new if further.all() else old)[narrow(at)]
        parts = wide(old[narrow(at[~further])]), wide(new[narrow(at[further])])
        block = torch.empty(len(at), *old.shape[1:], dtype=parts[0].dtype)
        block[~further], block[further] = parts
        return block

    return old.derive(read, (len(units.sources), *old.shape[1:]), new)
