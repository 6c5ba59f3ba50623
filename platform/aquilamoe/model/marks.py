"""Marks of the weights of a parameter that are new after a growth: one bit of every row and column."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Marks:
    """Of one parameter: the new rows (..., R, 1) and the new columns (..., 1, C); of vectors, C is 1.

    Stacked experts have marks of their own, with the expert as the first dimension.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def alike(cls, shape: Shape, is_new: bool) -> Marks:
        """All of a parameter is new, or nothing."""
        sizes = shape if len(shape) > 1 else (*shape, 1)
        rows = torch.full((*sizes[:-1], 1), is_new)
        return cls(rows, torch.zeros((*sizes[:-2], 1, sizes[-1]), dtype=torch.bool))

    @property
    def any_new(self) -> bool:
        return bool(self.rows.any() or self.columns.any())

    @property
    def all_new(self) -> bool:
        of_rows, of_columns = self.rows.flatten(-2).all(-1), self.columns.flatten(-2).all(-1)
        return bool((of_rows | of_columns).all())

    def part(self, place: tuple[slice, ...]) -> Tensor:
        """Whether each weight is new, of a part of the parameter: by place in each of its dimensions."""
        if len(place) == 1:
            return (self.rows | self.columns)[place[0], 0]
        *experts, rows, columns = place
        return self.rows[(*experts, rows)] | self.columns[(*experts, slice(None), columns)]
