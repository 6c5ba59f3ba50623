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

    def copy(
        self, role: str, tensor: Tensor, new_rows: Tensor | None = None, new_columns: Tensor | None = None
    ) -> Tensor:
        """Grow one tensor so that the network keeps its function, as long as nothing *new* is given.

        tensor: the source's tensor of this role.
        new_rows, new_columns: tensors of the same shape that the rows and the columns of new units (further copies) are
            taken from instead. Ignored where they are no units: in embedding, head and norms.
        """
        if role in _NORMS:
            return self._copy_gain(role, tensor)
        if role in (names.EMBEDDING, names.HEAD):
            tensor = _pad_vocabulary(tensor, self.shapes[role][0])
        if role == names.EMBEDDING:
            return _pad_with_zeros(_take(tensor, 1, self.units.residual) * self._residual_factor, self.shapes[role])
        rows, columns = self.units.rows(role), self.units.columns(role)
        grown = _take(_read(tensor, columns, new_columns), 0, rows)
        if new_rows is not None and rows is not None and rows.has_new:
            new = torch.tensor(rows.is_new)
            grown[new] = _read(new_rows[torch.tensor(rows.sources)[new]], columns)
        if self.growth.noise > 0 and columns is not None and columns.has_new:
            noisy = noise.antisymmetric(grown.shape[0], columns, self.dtype, self._random(role))
            grown = grown + self.growth.noise * _rms(tensor) * noisy
        if columns is not None and columns.padding:
            grown = torch.cat([grown, self._read_padding(role, grown.shape[0], _rms(tensor), columns)], dim=1)
        if role in (names.Q_WEIGHT, names.Q_BIAS) and not self.units.rotary.is_identity:
            grown = (grown.movedim(0, -1) * self._query_factor).movedim(-1, 0)
        if role in (names.O_WEIGHT, names.DOWN):
            grown = grown * self._residual_factor[:, None]
        return _pad_with_zeros(grown, self.shapes[role])

    def draw(self, role: str) -> Tensor:
        """A fresh tensor as a model starts with: matrices normal with `initializer_range`, biases zero, gains one."""
        if role in _NORMS:
            return torch.ones(self.shapes[role], dtype=self.dtype)
        if role.endswith(".bias"):
            return torch.zeros(self.shapes[role], dtype=self.dtype)
        return noise.normal(self.shapes[role], self.initializer_range, self.dtype, self._random(role))

    def _random(self, role: str) -> torch.Generator:
        return noise.generator(self.seed, self.place + role)

    def _copy_gain(self, role: str, gain: Tensor) -> Tensor:
        """Gains of a norm, changed so that readers see equal copies; the gain of padding multiplies zeros.

        A tied head cannot divide its columns by the number of copies, for they are the embedding's: the final norm
        does it, and takes back the alpha that those columns carry.
        """
        residual = self.units.residual
        # Padding is counted by the mean square that the norm divides by.
        share = (len(residual.sources) / residual.size) ** 0.5
        factor = share / self._residual_factor
        if role == names.FINAL_NORM and self.tied:
            factor = share / (self._residual_factor.square() * torch.tensor(residual.copies, dtype=self.dtype))
        return torch.cat([_take(gain, 0, residual) * factor, torch.ones(residual.padding, dtype=self.dtype)])

    def _read_padding(self, role: str, rows: int, rms: float, columns: UnitMap) -> Tensor:
        """Weights on inputs that are zero: free, so random, and as large as those on copies."""
        size = rms * columns.num_sources / len(columns.sources)
        return noise.normal((rows, columns.padding), size, self.dtype, self._random(f"{role}/padding"))

    @cached_property
    def _residual_factor(self) -> Tensor:
        """alpha of every copied channel: copy i of channel j carries alpha_i * x_j, for the sake of the mean square."""
        residual = self.units.residual
        copies = torch.tensor(residual.copies, dtype=self.dtype)
        if self.growth.norm != "exact":
            return torch.ones_like(copies)
        return (len(residual.sources) / residual.num_sources / copies).sqrt()

    @cached_property
    def _query_factor(self) -> Tensor:
        """Of every query channel: attention divides by the root of head_dim, and pairs between the old are silent."""
        inside = self.units.rotary
        factor = (len(inside.sources) / inside.num_sources) ** 0.5
        of_head = torch.tensor([0.0 if new else factor for new in inside.is_new], dtype=self.dtype)
        return of_head.repeat(len(self.units.q_heads.sources))


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item()


def _read(tensor: Tensor, columns: UnitMap | None, new_columns: Tensor | None = None) -> Tensor:
    """Grow the input side: every copy of a unit reads its share, so that their sum is what the unit was read with."""
    if columns is None or columns.is_identity:
        return tensor
    read = _take(tensor / torch.tensor(columns.counts, dtype=tensor.dtype), 1, columns)
    if new_columns is not None and columns.has_new:
        new = torch.tensor(columns.is_new)
        read[:, new] = _read(new_columns, columns)[:, new]
    return read


def _take(tensor: Tensor, dim: int, units: UnitMap | None) -> Tensor:
    """Copies of the units of one dimension, without padding."""
    if units is None or units.is_identity:
        return tensor
    return tensor.index_select(dim, torch.tensor(units.sources))


def _pad_vocabulary(tensor: Tensor, size: int) -> Tensor:
    """New tokens get the mean of the old rows.

    Logits of the old tokens stay, and by Jensen's inequality a new token takes no more probability than the mean old
    one: the KL divergence of the predictions is at most log(1 + new / old) nats.
    """
    old = tensor.shape[0]
    return tensor if size == old else torch.cat([tensor, tensor.mean(dim=0, keepdim=True).expand(size - old, -1)])


def _pad_with_zeros(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    padded = torch.zeros(shape, dtype=tensor.dtype)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded
