"""The random numbers of growth: a stream for every tensor, and noise that cancels over the copies of a unit."""

import hashlib

import torch
from torch import Tensor

from aquilamoe.growth.units import UnitMap


def generator(seed: int, name: str) -> torch.Generator:
    """Random numbers of one tensor: the same for a seed in whatever order tensors are streamed."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def normal(shape: tuple[int, ...], std: float, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """A tensor of normal numbers with mean 0."""
    return torch.empty(shape, dtype=dtype).normal_(0.0, std, generator=random)


def antisymmetric(rows: int, columns: UnitMap, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Noise of shape (rows, target columns) that sums to zero over the copies of every unit, in each row.

    Where a unit has copies, the noise has variance 1; where it has none, nothing can cancel and the noise is 0.
    Inputs that are equal over the copies of a unit therefore do not see it, and the copies are no longer symmetric
    (METHODS section 2, symmetry).
    """
    noise = normal((rows, len(columns.sources)), 1.0, dtype, random)
    sources = torch.tensor(columns.sources)
    counts = torch.tensor(columns.counts, dtype=dtype)
    means = torch.zeros(rows, columns.num_sources, dtype=dtype).index_add_(1, sources, noise) / counts
    # Subtracting the mean of c numbers leaves the fraction 1 - 1/c of their variance.
    scale = torch.where(counts > 1, (1 - 1 / counts).clamp(min=0.5).rsqrt(), 0.0)
    return noise.sub_(means[:, sources]).mul_(scale[sources])
