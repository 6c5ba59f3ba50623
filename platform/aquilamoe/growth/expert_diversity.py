"""What makes copies of a feed-forward differ: noise, neurons in another order, neurons drawn again (METHODS 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.schema import UpcyclingConfig
from aquilamoe.growth import noise, rng
from aquilamoe.growth.lazy_tensor import Index, LazyTensor, gathered, tensor_of, wide

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Variety:
    """The differences between the copies of one layer's feed-forward.

    place: where they go, e.g. `model.layers.3.`; with a role it names a stream of random numbers.
    dtype: of the computation, F32 or F64.
    """

    upcycling: UpcyclingConfig
    seed: int
    place: str
    dtype: str

    @property
    def note(self) -> str:
        """What makes copies differ, for plans."""
        return {
            "noise": f"noise {self.upcycling.noise:g}",
            "drop": f"{self.upcycling.drop_ratio:g} of the neurons drawn afresh",
            "permute": "neurons in an order of its own",
        }[self.upcycling.method]

    def vary(self, tensor: LazyTensor, role: str, copy: int) -> LazyTensor:
        """Reorder the neurons of a copy: rows of gate and up, and columns of down, by one order for all."""
        if self.upcycling.method not in ("permute", "drop"):
            return tensor
        axis = 1 if role == tensor_names.DOWN else 0
        size = tensor.shape[axis]
        neurons = partial(neuron_order, size, self.seed, self.place, copy)
        if self.upcycling.method == "permute":
            return _take(tensor, axis, size, cache(neurons))
        count = math.ceil(self.upcycling.drop_ratio * size)
        dropped = cache(lambda: np.sort(neurons()[:count]))
        return _redraw(tensor, axis, count, dropped, self._drawn(tensor.shape, f"{role}/drop.{copy}"))

    def add_noise(self, part: LazyTensor, tensor: LazyTensor, expert: str, factor: float) -> LazyTensor:
        """Noise of an expert's own, as a fraction of the deviation of the whole tensor, times its `factor`."""
        if self.upcycling.method != "noise":
            return part
        size, drawn = self.upcycling.noise * factor, self._drawn(part.shape, expert)
        return part.derive(lambda index: drawn[index].mul_(size * tensor.std).add_(part[index]), None, drawn)

    def _drawn(self, shape: tuple[int, ...], role: str) -> LazyTensor:
        return noise.drawn(shape, 1.0, self.dtype, self.seed, self.place + role)


def neuron_order(size: int, seed: int, place: str, copy: int) -> np.ndarray:
    """The order of a copy's neurons; the first of them are those that `drop` draws again."""
    return rng.permutation(size, rng.stream(seed, f"{place}neurons.{copy}"))


def _take(tensor: LazyTensor, axis: int, count: int, neurons: Callable[[], np.ndarray]) -> LazyTensor:
    """So many neurons of a feed-forward, in an order."""
    if axis == 0:
        return gathered(tensor, count, neurons)
    return tensor.derive(lambda index: tensor[index].index_select(1, tensor_of(neurons())), (tensor.shape[0], count))


def _redraw(
    tensor: LazyTensor, axis: int, count: int, dropped: Callable[[], np.ndarray], drawn: LazyTensor
) -> LazyTensor:
    """Draw the dropped neurons again, with the mean and deviation of what they were (Drop-Upcycling)."""
    old = _take(tensor, axis, count, dropped)

    def read(index: Index) -> Tensor:
        import torch

        is_dropped = torch.zeros(tensor.shape[axis], dtype=torch.bool)
        is_dropped[tensor_of(dropped())] = True
        fresh = drawn[index] * old.std + old.mean
        return torch.where(is_dropped if axis else is_dropped[index][:, None], fresh, wide(tensor[index]))

    return tensor.derive(read, None, drawn)
