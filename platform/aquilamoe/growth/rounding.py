"""A growth computed again, before its weights are rounded: what files have to hold, and what rounding does to it."""

from collections.abc import Iterable, Iterator, Set

import torch
from torch import Tensor

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, UpcyclingConfig
from aquilamoe.growth import scale_out, scale_up
from aquilamoe.growth.forward import Opened, Stored
from aquilamoe.growth.lazy_tensor import LazyTensor, rows_of_block
from aquilamoe.growth.split import Split
from aquilamoe.growth.stream import Recipe

# No power of two: what is multiplied by it, rounded and divided again is rounded in every element.
ONCE_MORE = 0.5**0.5
# Half, and a little: where another machine computes a number that is nearly halfway, it may round to the other side.
NEAR_HALF = 0.51
# Of the largest number of a block, where files have as many bits as are computed with: sums of another machine differ.
SUMS = 2.0**-20


def unrounded(
    source: Opened,
    target: Opened,
    growth: GrowthConfig | UpcyclingConfig,
    seed: int,
    split: Split | None = None,
) -> "Unrounded":
    """What `growth` makes of the source, before it is rounded to what is in the target's files."""
    (before, old), (after, new) = source, target
    if isinstance(growth, GrowthConfig):
        recipes = scale_up.recipes(before.reader, old, new, growth, seed)
    else:
        recipes = scale_out.recipes(before.reader, old, new, growth, seed, split=split)
    return Unrounded(before, after, recipes)


class Unrounded:
    """Tensors that are computed again, a block of rows at a time, and compared with those in the target's files.

    What is read is therefore both what the growth makes and, but for rounding, what is on the disk. UserError,
    naming the tensor, where these differ by more than rounding, half a unit in the last place; not at all where a
    tensor was copied.
    """

    def __init__(self, source: Stored, target: Stored, recipes: Iterable[Recipe]) -> None:
        self.dtype = target.dtype
        self._source, self._target = source, target
        self._rows = {name: recipe.rows for recipe in recipes for name in recipe.names}
        self._unread = {name: rows.shape[0] for name, rows in self._rows.items()}  # rows, of each

    @property
    def rounds(self) -> bool:
        """Whether files hold computed tensors with fewer bits; random numbers of new routers aside."""
        return self._target.is_rounded and any(not self._is_copy(name) for name in self._rows)

    def _is_copy(self, name: str) -> bool:
        """Whether a tensor has the source's bytes, or was drawn at random and has no exact value to be rounded from."""
        rows = self._rows[name]
        if rows.copies is None:
            return rows.make is not None
        return self._source.reader.dtype(rows.copies) == self._target.reader.dtype(name)

    def get(self, name: str) -> Tensor:
        """A tensor."""
        return self.rows(name, 0, self._rows[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows that are neighbours."""
        rows = self._rows[name]
        out = torch.empty((stop - start, *rows.shape[1:]), dtype=self.dtype)
        for block in _blocks(rows, start, stop):
            part = out[block.start - start : block.stop - start]
            computed = rows[block]
            part.copy_(computed)
            self._check(name, computed, self._target.reader.rows(name, block.start, block.stop), block.start)
        self._unread[name] -= stop - start
        self._release(name)
        return out

    def origin(self, name: str) -> str:
        """Not known to be equal to another."""
        return name

    @property
    def copies(self) -> dict[str, str]:
        """The source's tensor of every tensor that has its bytes, by their names."""
        types = self._source.reader.dtype, self._target.reader.dtype
        return {
            name: rows.copies
            for name, rows in self._rows.items()
            if rows.copies is not None and types[0](rows.copies) == types[1](name)
        }

    def check_rest(self, read: Set[str] = frozenset()) -> None:
        """Compare what was not read as a whole: experts that no token chose, and the embedding of other tokens.

        read: names of tensors that were computed with as they are in the files.
        """
        for name, rows in self._rows.items():
            if self._unread[name] <= 0 or name in read:
                continue
            for block in _blocks(rows, 0, rows.shape[0]):
                written = self._target.reader.rows(name, block.start, block.stop)
                self._check(name, rows[block], written, block.start)
                self._release(name)

    def look_up(self, name: str, numbers_n: Tensor) -> Tensor:
        """Rows by their numbers."""
        rows = self._rows[name]
        if rows.is_random:  # drawn from the first to the last of what is requested
            found = torch.cat([rows[slice(number, number + 1)] for number in numbers_n.tolist()])
        else:
            found = rows[numbers_n]
        self._check(name, found, self._target.reader.get(name)[numbers_n], None)
        self._release(name)
        return found.to(self.dtype, copy=True)

    def _check(self, name: str, computed: Tensor, written: Tensor, first_row: int | None) -> None:
        """Refuse what is in the file unless it is what was computed, rounded."""
        if written.dtype == computed.dtype and torch.equal(written, computed):  # without converting: most are copies
            return
        written, computed = written.to(self.dtype), computed.to(self.dtype)
        dtype, copied = self._target.reader.dtype(name), self._rows[name].copies
        is_copy = copied is not None and self._source.reader.dtype(copied) == dtype
        allowed = torch.zeros(()) if is_copy else _rounding(computed, torch.finfo(dtype))
        is_other = ~((written - computed).abs_() <= allowed)
        if not is_other.any():
            return
        place = int(is_other.flatten().nonzero()[0])
        where = "" if first_row is None else f" at element {first_row * computed[0].numel() + place}"
        raise UserError(
            f"certificate: tensor '{name}' of the target is {written.flatten()[place].item():.6g}{where}, the growth "
            f"makes {computed.flatten()[place].item():.6g} of the source there and rounding to "
            f"{str(dtype).removeprefix('torch.')} changes less; grow it again"
        )

    def _release(self, name: str) -> None:
        self._target.reader.release(name)
        for source_name in self._rows[name].sources:
            self._source.reader.release(source_name)


def _rounding(computed: Tensor, kind: torch.finfo) -> Tensor:
    """The most by which numbers change when they are rounded: half of what separates the numbers of their size."""
    if kind.bits >= torch.finfo(computed.dtype).bits:
        return computed.abs().amax() * SUMS
    _, exponents = torch.frexp(computed)
    apart = torch.ldexp(torch.full_like(computed, kind.eps), exponents - 1)
    return apart.clamp_(min=kind.smallest_normal * kind.eps).mul_(NEAR_HALF)


def _blocks(rows: LazyTensor, start: int, stop: int) -> Iterator[slice]:
    step = rows_of_block(rows.shape)
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


class RoundedAgain:
    """The tensors of a checkpoint with every number off by a rounding, as those of something grown from it are.

    Its numbers fit their type already; a fraction of them does not.

    target: has the types that they are rounded to, of a tensor of the same name, or else of most of it.
    """

    def __init__(self, weights: Stored, target: Stored) -> None:
        self.dtype = weights.dtype
        self._weights, self._target = weights, target

    def get(self, name: str) -> Tensor:
        """A tensor."""
        return self._round(name, self._weights.get(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows that are neighbours."""
        return self._round(name, self._weights.rows(name, start, stop))

    def look_up(self, name: str, numbers_n: Tensor) -> Tensor:
        """Rows by their numbers."""
        return self._round(name, self._weights.look_up(name, numbers_n))

    def origin(self, name: str) -> str:
        """Not known to be equal to another."""
        return name

    def _round(self, name: str, tensor: Tensor) -> Tensor:
        target = self._target
        dtype = target.reader.dtype(name) if name in target.reader.tensors else target.file_dtype
        return tensor.mul_(ONCE_MORE).to(dtype).to(self.dtype).div_(ONCE_MORE)
