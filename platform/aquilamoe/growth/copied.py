"""Copies of the source's tensors, compared with it byte by byte: what is equal is computed with once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from aquilamoe.growth.forward import Stored, Weights


class Copied:
    """A target's weights, of which tensors that the growth copied are compared with those of the source.

    Where the bytes are equal, the source's tensor is their origin, which a decoder reads for all of them. Where they
    are not, weights come from the target, as if nothing was known of them.

    weights: of the target.
    copies: the source's tensor of every tensor that the growth copies, by their names.
    equal: names of the tensors that were found to be copies.
    """

    def __init__(self, weights: Weights, source: Stored, target: Stored, copies: Mapping[str, str]) -> None:
        self.dtype = weights.dtype
        self.equal: set[str] = set()
        self._weights, self._copies = weights, copies
        self._source, self._target = source, target

    def origin(self, name: str) -> str:
        """The source's tensor that a tensor is a copy of; without one, the tensor itself."""
        copied = self._copies.get(name)
        if copied is None:
            return name
        if name not in self.equal:
            if not _have_equal_bytes(self._source.reader.get(copied), self._target.reader.get(name)):
                return name
            self.equal.add(name)
            self._target.reader.release(name)
        return f"source {copied}"

    def get(self, name: str) -> Tensor:
        """A tensor."""
        return self._source.get(self._copies[name]) if name in self.equal else self._weights.get(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows that are neighbours."""
        return self._weights.rows(name, start, stop)

    def look_up(self, name: str, numbers_n: Tensor) -> Tensor:
        """Rows by their numbers."""
        return self._weights.look_up(name, numbers_n)


def _have_equal_bytes(first: Tensor, second: Tensor) -> bool:
    """Of tensors of one type."""
    if first.shape != second.shape:
        return False
    unit = torch.int64 if first.numel() * first.itemsize % 8 == 0 else torch.uint8
    return torch.equal(first.flatten().view(unit), second.flatten().view(unit))
