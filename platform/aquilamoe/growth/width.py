"""Growing the tensors of a layer in width, by the maps of their units: what methods are written in (METHODS 2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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
    narrow,
    wide,
)
from aquilamoe.growth.units import UnitMap, Units

Tensors = Mapping[str, LazyTensor]  # by role
_NORMS = (tensor_names.INPUT_NORM, tensor_names.POST_ATTENTION_NORM, tensor_names.FINAL_NORM)


@dataclass(frozen=True)
class Width:
    """What a method gets beside its tensors.

    units: the maps of units.
    growth: how norms are treated and how large the noise is.
    shapes: the target's shape of every role that is being grown.
    tied: whether the head is the embedding.
    initializer_range: standard deviation of freshly drawn matrices.
    seed, place: `place` is where the tensors go (`model.layers.3.`, or empty outside the layers); with the role it
        names a stream of random numbers.
    dtype: of the computation, float32 or wider.
    """

    units: Units
    growth: GrowthConfig
    shapes: Mapping[str, tuple[int, ...]]
    tied: bool
    initializer_range: float
    seed: int
    place: str
    dtype: torch.dtype

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

    def draw(self, role: str) -> LazyTensor:
        """A fresh tensor as a model starts with: matrices normal with `initializer_range`, biases zero, gains one."""
        if role.endswith("norm.weight"):
            return filled(self.shapes[role], 1.0)
        if role.endswith(".bias"):
            return filled(self.shapes[role], 0.0)
        return noise.drawn(self.shapes[role], self.initializer_range, self.dtype, self.seed, self.place + role)

    def _drawn(self, role: str, name: str, shape: tuple[int, ...]) -> LazyTensor:
        """Normal numbers for some columns of a tensor."""
        step = noise.rows_of_stream(self.shapes[role])
        return noise.drawn(shape, 1.0, self.dtype, self.seed, self.place + name, step)

    def _with_noise(self, role: str, grown: LazyTensor, tensor: LazyTensor, columns: UnitMap) -> LazyTensor:
        """Add noise that cancels over the copies of an input, and what is read of the padding.

        The latter are weights on inputs that are zero: free, so random, and as large as those on copies.
        """
        if self.growth.noise > 0 and columns.has_new:
            cancelling = noise.cancelling(columns, self.dtype)
            drawn, copies = self._drawn(role, role, (grown.shape[0], cancelling.size)), grown

            def read(index: Index) -> Tensor:
                block = wide(copies[index])
                cancelling.add(block, drawn[index], self.growth.noise * tensor.rms)
                return block

            grown = copies.derive(read, None, drawn)
        if not columns.padding:
            return grown
        free = self._drawn(role, f"{role}/padding", (grown.shape[0], columns.padding))
        share, known = columns.num_sources / len(columns.sources), grown
        return known.derive(
            lambda index: torch.cat([wide(known[index]), free[index] * (tensor.rms * share)], dim=1),
            (known.shape[0], columns.size),
            free,
        )

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
        if (factor == 1).all():
            return grown
        shape = (-1, *(1 for _ in grown.shape[1:]))
        return grown.derive(lambda index: multiply(grown[index], factor[index].view(shape)))

    def _head_factor(self, role: str) -> Tensor:
        """beta of every query or key channel, where one norm is over the channels of all heads (OLMoE).

        Copies of a head carry beta times its channels, so that the mean square over all heads stays at uneven counts.
        A norm over each head (Qwen3) sees whole heads: 1.
        """
        heads = self.units.q_heads if role in (tensor_names.Q_WEIGHT, tensor_names.Q_NORM) else self.units.kv_heads
        channels = self.units.q_channels if heads is self.units.q_heads else self.units.k_channels
        gains = self.shapes[tensor_names.Q_NORM if heads is self.units.q_heads else tensor_names.K_NORM][0]
        if gains != channels.size:
            return torch.ones(channels.size, dtype=torch.float64)
        copies = torch.tensor(channels.copies, dtype=torch.float64)
        return (channels.size / channels.num_sources / copies).sqrt()

    def _copy_head_gain(self, role: str, gain: LazyTensor) -> LazyTensor:
        """Gains of the norm on queries or keys: of one head, shared by all, or of all heads together."""
        if gain.shape == self.shapes[role]:
            return gain
        copied = _copy_rows(gain, self.units.q_channels if role == tensor_names.Q_NORM else self.units.k_channels)
        factor = 1 / self._head_factor(role)
        if (factor == 1).all():
            return copied
        return copied.derive(lambda index: multiply(copied[index], factor[index]))

    def _copy_gain(self, role: str, gain: LazyTensor) -> LazyTensor:
        """Gains of a norm, changed so that readers see equal copies; the gain of padding multiplies zeros.

        A tied head cannot divide its columns by the number of copies, for they are the embedding's: the final norm
        does it, and takes back the alpha that those columns carry.
        """
        residual = self.units.residual
        # Padding is counted by the mean square that the norm divides by.
        share = (len(residual.sources) / residual.size) ** 0.5
        factor = share / self._residual_factor
        if role == tensor_names.FINAL_NORM and self.tied:
            factor = share / (self._residual_factor.square() * torch.tensor(residual.copies, dtype=torch.float64))
        grown = _copy_rows(gain, residual)
        if not (factor == 1).all():
            copied = grown
            grown = copied.derive(lambda index: multiply(copied[index], factor[index]))
        return extended(grown, residual.size, lambda: torch.ones(()))

    def _pad(self, role: str, grown: LazyTensor) -> LazyTensor:
        """Zeros where padding is written: behind the rows, or behind the columns of the embedding."""
        rows, *columns = self.shapes[role]
        if columns and columns[0] != grown.shape[1]:
            narrower, more = grown, columns[0] - grown.shape[1]
            grown = narrower.derive(lambda index: torch.nn.functional.pad(narrower[index], (0, more)), (rows, *columns))
        return extended(grown, rows, lambda: torch.zeros(()))

    @cached_property
    def _residual_factor(self) -> Tensor:
        """alpha of every copied channel: copy i of channel j carries alpha_i * x_j, for the sake of the mean square."""
        residual = self.units.residual
        copies = torch.tensor(residual.copies, dtype=torch.float64)
        if self.growth.norm != "exact":
            return torch.ones_like(copies)
        return (len(residual.sources) / residual.num_sources / copies).sqrt()

    @cached_property
    def _query_factor(self) -> Tensor:
        """Of every query channel: attention divides by the root of head_dim, and pairs between the old are silent."""
        inside = self.units.rotary
        factor = (len(inside.sources) / inside.num_sources) ** 0.5
        of_head = torch.tensor([0.0 if new else factor for new in inside.is_new], dtype=torch.float64)
        return of_head.repeat(len(self.units.q_heads.sources))


def _read_copies(tensor: LazyTensor, columns: UnitMap | None, new_columns: LazyTensor | None = None) -> LazyTensor:
    """Grow the input side: every copy of a unit reads its share, so that their sum is what the unit was read with."""
    if columns is None:
        return tensor
    share = 1 / torch.tensor(columns.copies, dtype=torch.float64)
    own = _copy_columns(tensor, columns, share)
    if new_columns is None or not columns.has_new:
        return own
    other, is_new = _copy_columns(new_columns, columns, share), torch.tensor(columns.is_new)
    return own.derive(lambda index: torch.where(is_new, other[index], own[index]), None, other)


def _copy_columns(tensor: LazyTensor, columns: UnitMap, factor: Tensor) -> LazyTensor:
    """Copies of columns, without padding, each times its factor."""
    if columns.sources == tuple(range(columns.num_sources)):
        if (factor == 1).all():
            return tensor
        return tensor.derive(lambda index: multiply(tensor[index], factor))
    places, exact = noise.Columns(list(columns.sources)), is_exact(factor)

    def read(index: Index) -> Tensor:
        block = places.take(tensor[index])
        block = block if exact else wide(block)
        return block.mul_(factor.to(block.dtype))

    return tensor.derive(read, (tensor.shape[0], len(columns.sources)))


def _copy_rows(tensor: LazyTensor, units: UnitMap | None) -> LazyTensor:
    """Copies of rows, without padding."""
    if units is None or units.sources == tuple(range(units.num_sources)):
        return tensor
    return gathered(tensor, torch.tensor(units.sources))


def _mix_rows(old: LazyTensor, new: LazyTensor, units: UnitMap) -> LazyTensor:
    """Copies of rows, the first of each unit from `old` and further ones from `new`."""
    sources, is_new = torch.tensor(units.sources), torch.tensor(units.is_new)

    def read(index: Index) -> Tensor:
        at, further = sources[index], is_new[index]
        if further.all() or not further.any():
            return (new if further.all() else old)[narrow(at)]
        parts = wide(old[narrow(at[~further])]), wide(new[narrow(at[further])])
        block = torch.empty(len(at), *old.shape[1:], dtype=parts[0].dtype)
        block[~further], block[further] = parts
        return block

    return old.derive(read, (len(sources), *old.shape[1:]), new)
