"""Tensors that are never in memory as a whole: their rows are made on request, a block at a time.

What is made of such a tensor is such a tensor again. Nothing is read or computed until rows of it are taken, and
then only these. Arithmetic is done in float32 or wider, and rounded once, when the rows are written. torch is imported
when the first row is made: a growth that only copies does without, and so does a plan, which prints what tensors are
made of and how.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, reduce
from math import frexp, prod
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from aquilamoe.checkpoint.reader import Reader

if TYPE_CHECKING:
    from torch import Tensor

Index: TypeAlias = "slice | Tensor"  # of rows: a slice without a step, or their numbers (int64)
Number = int | float
# Elements computed at once. With half of them a growth by copies takes a quarter longer, for what Python and torch do
# to each block; with twice as many it takes a tenth less, and more memory than it may.
BLOCK = 2**19


class Part(NamedTuple):
    """A tensor of the source: its name on disk, and what plans print of it."""

    name: str
    label: str


@dataclass(frozen=True, eq=False, kw_only=True)
class LazyTensor:
    """A tensor of one or two dimensions by its rows: `rows[10:20]`, arithmetic with numbers and equal shapes, `map`.

    shape: of the whole.
    read: makes rows; they may be a view of a file, and must not be changed in place.
    parts: the source's tensors that it is made of, as they were added.
    notes: what was done to them, for plans.
    copies: name of the source's tensor that it is, bit for bit.
    make: makes all of it without torch, where it is small; float32 or wider.
    in_memory: whether a part of it was computed elsewhere, out of tensors that are not known.
    is_random: whether it has random numbers of its place in the target; others are the same wherever they go.
    """

    shape: tuple[int, ...]
    read: Callable[[Index], Tensor]
    parts: tuple[Part, ...] = field(default=(), kw_only=True)
    notes: tuple[str, ...] = field(default=(), kw_only=True)
    copies: str | None = field(default=None, kw_only=True)
    make: Callable[[], np.ndarray] | None = field(default=None, kw_only=True)
    in_memory: bool = field(default=False, kw_only=True)
    is_random: bool = field(default=False, kw_only=True)

    @property
    def sources(self) -> frozenset[str]:
        """On-disk names of the source's tensors that it is made of."""
        return frozenset(part.name for part in self.parts)

    def noted(self, *notes: str) -> LazyTensor:
        """The same tensor with further notes on how it was made."""
        return replace(self, notes=(*self.notes, *notes))

    def __getitem__(self, index: Index) -> Tensor:
        return self.read(index)

    def whole(self) -> Tensor:
        """The tensor in memory, float32 or wider: for what cannot be done to rows alone."""
        return wide(self[slice(0, self.shape[0])])

    def map(self, function: Callable[[Tensor], Tensor]) -> LazyTensor:
        """Apply a function to blocks of rows, of which it keeps the shape."""
        return combine(function, self)

    def derive(
        self, read: Callable[[Index], Tensor], shape: tuple[int, ...] | None = None, *others: LazyTensor | None
    ) -> LazyTensor:
        """A tensor that `read` makes of rows of this one and of `others`."""
        parts = [self, *(other for other in others if other is not None)]
        return LazyTensor(
            shape=self.shape if shape is None else shape,
            read=read,
            parts=tuple(dict.fromkeys(each for part in parts for each in part.parts)),
            notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
            in_memory=any(part.in_memory for part in parts),
            is_random=any(part.is_random for part in parts),
        )

    def __add__(self, other: LazyTensor | Number) -> LazyTensor:
        return combine(operator.add, self, other)

    def __radd__(self, other: Number) -> LazyTensor:
        return combine(operator.add, other, self)

    def __sub__(self, other: LazyTensor | Number) -> LazyTensor:
        return combine(operator.sub, self, other)

    def __rsub__(self, other: Number) -> LazyTensor:
        return combine(operator.sub, other, self)

    def __mul__(self, other: LazyTensor | Number) -> LazyTensor:
        return combine(operator.mul, self, other)

    def __rmul__(self, other: Number) -> LazyTensor:
        return combine(operator.mul, other, self)

    def __truediv__(self, other: LazyTensor | Number) -> LazyTensor:
        return combine(operator.truediv, self, other)

    def __neg__(self) -> LazyTensor:
        return combine(operator.neg, self)

    @property
    def mean(self) -> float:
        """Of all elements."""
        return self._sums[0] / prod(self.shape)

    @property
    def rms(self) -> float:
        """Root of the mean square of all elements."""
        return (self._sums[1] / prod(self.shape)) ** 0.5

    @property
    def std(self) -> float:
        """Standard deviation of all elements."""
        return max(0.0, self.rms**2 - self.mean**2) ** 0.5

    @cached_property
    def _sums(self) -> tuple[float, float]:
        """Of all elements and of their squares; one pass over the rows."""
        total, squares = 0.0, 0.0
        for index in block_slices(self.shape):
            block = wide(self[index]).flatten(1)
            total += block.sum(dim=1).double().sum().item()
            squares += block.norm(dim=1).double().square().sum().item()
        return total, squares

    @cached_property
    def mean_row(self) -> Tensor:
        """The mean of all rows, float64; one pass over them."""
        blocks = (wide(self[index]).sum(dim=0).double() for index in block_slices(self.shape))
        return reduce(operator.add, blocks) / self.shape[0]


def combine(operation: Callable[..., Tensor], *parts: LazyTensor | Number) -> LazyTensor:
    """Apply an operation to the blocks of tensors of one shape, and to numbers."""
    tensors = [part for part in parts if isinstance(part, LazyTensor)]
    others = [part for part in parts if not isinstance(part, LazyTensor)]
    if any(part.shape != tensors[0].shape for part in tensors):
        raise ValueError(f"tensors of different shapes: {', '.join(str(part.shape) for part in tensors)}")
    if not all(isinstance(part, Number) for part in others):
        raise TypeError(f"the rows of a tensor go together with numbers and other rows, not with {others}")

    def read(index: Index) -> Tensor:
        return operation(*(wide(part[index]) if isinstance(part, LazyTensor) else part for part in parts))

    return tensors[0].derive(read, None, *tensors[1:])


def block_slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """The blocks of a tensor."""
    step = rows_of_block(shape)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def rows_of_block(shape: tuple[int, ...]) -> int:
    """Rows that are computed at once."""
    return max(1, BLOCK // max(1, prod(shape[1:])))


def wide(block: Tensor) -> Tensor:
    """In the type of computations: float32 or wider."""
    return block if block.dtype.itemsize >= 4 else block.float()


def numbers(index: Index) -> Tensor:
    """Rows by their numbers."""
    import torch

    return torch.arange(index.start, index.stop) if isinstance(index, slice) else index


def narrow(index: Tensor) -> Index:
    """Rows as a slice where they are neighbours in their order, because a slice need not be gathered."""
    size = len(index)
    if size == 0:
        return slice(0, 0)
    start = int(index[0])
    is_run = int(index[-1]) == start + size - 1 and bool((index.diff() == 1).all())
    return slice(start, start + size) if is_run else index


def stored(reader: Reader, name: str, label: str = "") -> LazyTensor:
    """A tensor of the source. UserError, naming file and tensor, for rows that are infinite or no numbers.

    label: what plans print of it; its name if left out.
    """

    def read(index: Index) -> Tensor:
        if isinstance(index, slice):
            block = reader.rows(name, index.start, index.stop)
            reader.check(name, block, index.start)
            return block
        block = reader.get(name).index_select(0, index)
        if not all(bound.isfinite() for bound in block.aminmax()):
            reader.check(name, reader.get(name))
        return block

    return LazyTensor(shape=reader.shape(name), read=read, parts=(Part(name, label or name),), copies=name)


def as_rows(tensor: LazyTensor | Tensor) -> LazyTensor:
    """A tensor that may be in memory already."""
    if isinstance(tensor, LazyTensor):
        return tensor
    return LazyTensor(shape=tuple(tensor.shape), read=lambda index: tensor[index], in_memory=True)


def tensor_of(values: np.ndarray) -> Tensor:
    """An array as a tensor, of the same memory."""
    import torch

    return torch.from_numpy(values)


def from_function(shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> LazyTensor:
    """A tensor that is made without torch, when it is written, in float32 or wider."""
    make = cache(make)
    return LazyTensor(shape=shape, read=lambda index: tensor_of(make())[index], make=make)


def filled(shape: tuple[int, ...], value: float) -> LazyTensor:
    """A tensor of one number."""

    def read(index: Index) -> Tensor:
        import torch

        return torch.full((len(numbers(index)), *shape[1:]), value)

    return LazyTensor(shape=shape, read=read)


def repeated(rows: LazyTensor, times: int) -> LazyTensor:
    """Every row so many times."""
    if times == 1:
        return rows
    size = rows.shape[0] * times
    return rows.derive(lambda index: rows[narrow(numbers(index) // times)], (size, *rows.shape[1:]))


def cycled(values: Tensor, times: int) -> LazyTensor:
    """All rows of a tensor in memory, so many times one after the other."""
    size = values.shape[0]
    return LazyTensor(shape=(size * times, *values.shape[1:]), read=lambda index: values[numbers(index) % size])


def between(rows: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Some rows that follow each other."""

    def read(index: Index) -> Tensor:
        return rows[slice(start + index.start, start + index.stop) if isinstance(index, slice) else index + start]

    return rows.derive(read, (stop - start, *rows.shape[1:]))


def gathered(rows: LazyTensor, size: int, sources: Callable[[], np.ndarray]) -> LazyTensor:
    """Row `sources()[i]` of a tensor as row i, of `size` rows."""
    return rows.derive(lambda index: rows[narrow(tensor_of(sources())[index])], (size, *rows.shape[1:]))


def extended(rows: LazyTensor, size: int, row: Callable[[], Tensor]) -> LazyTensor:
    """Further rows behind those of a tensor, all equal to `row()`, which is called when the first of them is read."""
    known = rows.shape[0]
    if size == known:
        return rows

    def read(index: Index) -> Tensor:
        if isinstance(index, slice) and index.stop <= known:
            return rows[index]
        at = numbers(index)
        is_known = at < known
        block = row().expand(len(at), *rows.shape[1:])
        if not is_known.any():
            return block
        inside = wide(rows[narrow(at[is_known])])
        block = block.to(inside.dtype, copy=True).contiguous()
        block[is_known] = inside
        return block

    return rows.derive(read, (size, *rows.shape[1:]))


def is_exact(factor: np.ndarray) -> bool:
    """Whether multiplying by it rounds nothing, in any type: zeros and powers of two."""
    mantissa, _ = np.frexp(np.abs(factor))
    return bool(((mantissa == 0.5) | (factor == 0)).all())


def multiply(block: Tensor, factor: Tensor) -> Tensor:
    """A block times a factor, in its own type where nothing is rounded."""
    block = block if is_exact(factor.numpy()) else wide(block)
    return block * factor.to(block.dtype)


def multiply_rows(rows: LazyTensor, factor: np.ndarray) -> LazyTensor:
    """Every row times its factor."""
    if (factor == 1).all():
        return rows
    shape = (-1, *(1 for _ in rows.shape[1:]))
    return rows.derive(lambda index: multiply(rows[index], tensor_of(factor)[index].view(shape)))


def scaled(rows: LazyTensor, factor: float) -> LazyTensor:
    """A tensor times a number."""
    if factor == 1:
        return rows
    is_exact = abs(frexp(factor)[0]) in (0, 0.5)
    return rows.derive(lambda index: (rows[index] if is_exact else wide(rows[index])) * factor)
