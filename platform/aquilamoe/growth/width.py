"""Growing the tensors of a layer in width, by the maps of their units: what methods are written in (METHODS 2)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aquilamoe.config.schema import GrowthConfig
from aquilamoe.growth import noise
from aquilamoe.growth.units import UnitMap, Units
from aquilamoe.weights import names

Tensors = Mapping[str, Tensor]  # by role
_NORMS = (names.INPUT_NORM, names.POST_ATTENTION_NORM, names.FINAL_NORM)


@dataclass(frozen=True)
class Width:
    """What a method knows beside its tensors.

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

    def copy(self, role: str, tensor: Tensor, new_rows: Tensor | None = None) -> Tensor:
        """Grow one tensor so that the network keeps its function, as long as `new_rows` is not given.

        tensor: the source's tensor of this role.
        new_rows: a tensor of the same shape that the rows of *new* units (further copies) are taken from instead.
            Ignored where rows do not grow: embedding, head and norms.
        """
        if role in _NORMS:
            return _take(tensor, 0, self.units.residual) * self._gain_factor(final=role == names.FINAL_NORM)
        if role == names.EMBEDDING:
            return _take(tensor, 1, self.units.residual) * self._residual_factor
        rows, columns = self.units.rows(role), self.units.columns(role)
        grown = _take(_read(tensor, columns), 0, rows)
        if new_rows is not None and rows is not None and rows.has_new:
            new = torch.tensor(rows.is_new)
            grown[new] = _read(new_rows[torch.tensor(rows.sources)[new]], columns)
        if self.growth.noise > 0 and columns is not None and columns.has_new:
            size = self.growth.noise * tensor.square().mean().sqrt()
            grown = grown + size * noise.antisymmetric(grown.shape[0], columns, self.dtype, self._random(role))
        if role in (names.O_WEIGHT, names.DOWN):
            grown = grown * self._residual_factor[:, None]
        return grown

    def draw(self, role: str) -> Tensor:
        """A fresh tensor as a model starts with: matrices normal with `initializer_range`, biases zero, gains one."""
        if role in _NORMS:
            return torch.ones(self.shapes[role], dtype=self.dtype)
        if role.endswith(".bias"):
            return torch.zeros(self.shapes[role], dtype=self.dtype)
        return noise.normal(self.shapes[role], self.initializer_range, self.dtype, self._random(role))

    def _random(self, role: str) -> torch.Generator:
        return noise.generator(self.seed, self.place + role)

    @cached_property
    def _residual_factor(self) -> Tensor:
        """alpha of every target channel: copy i of channel j carries alpha_i * x_j, for the sake of the mean square."""
        residual = self.units.residual
        copies = torch.tensor(residual.copies, dtype=self.dtype)
        if self.growth.norm == "copy":
            return torch.ones_like(copies)
        return (len(residual.sources) / residual.num_sources / copies).sqrt()

    def _gain_factor(self, final: bool) -> Tensor:
        """What the gain of every target channel is multiplied by, so that readers see equal copies.

        A tied head cannot divide its columns by the number of copies, for they are the embedding's: the final norm
        does it, and takes back the alpha that those columns carry.
        """
        if final and self.tied:
            return 1 / (self._residual_factor.square() * torch.tensor(self.units.residual.copies, dtype=self.dtype))
        return 1 / self._residual_factor


def _read(tensor: Tensor, columns: UnitMap | None) -> Tensor:
    """Grow the input side: every copy of a unit reads its share, so that their sum is what the unit was read with."""
    if columns is None or columns.is_identity:
        return tensor
    return _take(tensor / torch.tensor(columns.counts, dtype=tensor.dtype), 1, columns)


def _take(tensor: Tensor, dim: int, units: UnitMap | None) -> Tensor:
    if units is None or units.is_identity:
        return tensor
    return tensor.index_select(dim, torch.tensor(units.sources))
