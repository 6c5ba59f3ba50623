"""Noise: normal numbers as tensors of which any block can be made, and sums that cancel over copies of a unit.

torch is imported by the first block.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from aquilamoe.checkpoint.dtypes import torch_dtype
from aquilamoe.growth import rng
from aquilamoe.growth.lazy_tensor import Index, LazyTensor, tensor_of
from aquilamoe.growth.units import UnitMap

if TYPE_CHECKING:
    from torch import Tensor

STREAM = 2**18  # elements drawn from one stream; other numbers come of another size
MEAN_RUN = 16  # a map with shorter runs is followed entry by entry


def rows_of_stream(shape: tuple[int, ...]) -> int:
    """Rows of a tensor that are drawn from one stream of random numbers."""
    return max(1, STREAM // max(1, prod(shape[1:])))


def drawn(shape: tuple[int, ...], std: float, dtype: str, seed: int, name: str, *, step: int = 0) -> LazyTensor:
    """Normal numbers with mean 0, of which every `step` rows have a stream: any thread can make any of them.

    dtype: F32 or F64. step: `rows_of_stream` of what they become a part of; left out, their own.
    """
    step = step or rows_of_stream(shape)
    kind = np.float64 if dtype == "F64" else np.float32

    def read(index: Index) -> Tensor:
        if not isinstance(index, slice):
            first = int(index.min())
            return read(slice(first, int(index.max()) + 1))[index - first]
        begin, end = index.start // step * step, min(-(-index.stop // step) * step, shape[0])
        values = np.empty((end - begin, *shape[1:]), kind)
        for start in range(begin, end, step):
            rng.fill(values[start - begin :][:step], rng.stream(seed, f"{name}/{start // step}"))
        if std != 1:
            values *= std
        return tensor_of(values[index.start - begin : index.stop - begin])

    return LazyTensor(shape=shape, read=read, is_random=True)


class Columns:
    """Some columns of a tensor, in an order; taken and added to run by run where they are neighbours."""

    def __init__(self, columns: list[int]) -> None:
        import torch

        self.index = torch.tensor(columns, dtype=torch.int64)
        ends = (self.index.diff() != 1).nonzero().flatten() + 1
        edges = [0, *ends.tolist(), len(columns)]
        runs = [(a, b) for a, b in pairwise(edges) if a < b]
        self.runs = [(columns[a], a, b) for a, b in runs] if len(runs) * MEAN_RUN <= len(columns) else None

    def take(self, block: Tensor) -> Tensor:
        """These columns, as a tensor of their own."""
        import torch

        if self.runs is None:
            return block.index_select(1, self.index)
        return torch.cat([block[:, first : first + stop - start] for first, start, stop in self.runs], dim=1)

    def add(self, block: Tensor, values: Tensor) -> None:
        """Add to these columns of a block, in place; several times where a column comes several times."""
        if self.runs is None:
            block.index_add_(1, self.index, values.to(block.dtype))
            return
        for first, start, stop in self.runs:
            block[:, first : first + stop - start] += values[:, start:stop]


@lru_cache(maxsize=16)
def cancelling(columns: UnitMap, dtype: str) -> Cancelling:
    """The noise over a map, which many tensors share; in F32 or F64."""
    return Cancelling(columns, dtype)


class Cancelling:
    """Noise that sums to zero over the copies of every unit, in each row.

    Where a unit has copies, the noise has variance 1; where it has none, nothing can cancel and there is no noise.
    Inputs that are equal over the copies of a unit therefore do not see it, and the copies are no longer symmetric
    (METHODS section 2, symmetry). One number is drawn for every further copy: of c copies, c - 1 are free. With S the
    sum of a unit's numbers z, its further copies get z - b S and the first one -S / sqrt(c), which has the covariance
    of c numbers minus their mean for b = (1 - 1 / sqrt(c)) / (c - 1). Of two copies, one gets z and the other -z.
    """

    def __init__(self, columns: UnitMap, dtype: str) -> None:
        import torch

        kind, copied = torch_dtype(dtype), [unit for unit, count in enumerate(columns.counts) if count > 1]
        place = {unit: number for number, unit in enumerate(copied)}
        new = [column for column, is_new in enumerate(columns.is_new) if is_new]
        firsts = {columns.sources[column]: column for column, is_new in enumerate(columns.is_new) if not is_new}
        self.size, self.num_units = len(new), len(copied)
        self._new, self._firsts = Columns(new), Columns([firsts[unit] for unit in copied])
        self._partners = Columns([firsts[columns.sources[column]] for column in new])
        self._is_paired = max(columns.counts) == 2
        self._units = Columns([place[columns.sources[column]] for column in new])
        counts = torch.tensor([columns.counts[unit] for unit in copied], dtype=torch.float64)
        scale = (1 - 1 / counts).rsqrt()
        self._of_first = (-scale * counts.rsqrt()).to(kind)
        self._of_sum = ((1 - counts.rsqrt()) / (counts - 1)).to(kind)
        self._of_new = scale[self._units.index].to(kind)

    def add(self, block: Tensor, drawn: Tensor, size: float) -> None:
        """Add noise of a size to a block, in place. drawn: (rows, `size` of this) normal numbers; used up."""
        if self._is_paired:
            self._new.add(block, drawn.mul_(size))
            self._partners.add(block, drawn.neg_())
            return
        import torch

        sums = torch.zeros(len(block), self.num_units, dtype=block.dtype)
        self._units.add(sums, drawn)
        drawn.sub_(self._units.take(sums * self._of_sum)).mul_(self._of_new * size)
        self._new.add(block, drawn)
        self._firsts.add(block, sums.mul_(self._of_first * size))
