"""Where a function-preserving growth has put the source: its residual channels, and its layers, in the target."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth.depth import map_layers
from aquilamoe.growth.units import circular, map_units

# What a layer adds counts as no smaller than this fraction of the stream that it adds to.
LEAST_UPDATE = 1e-3
# A stream is rounded whenever something is added to it: differences by so many units in its last place are none.
ROUNDINGS = 8


@dataclass(frozen=True)
class Alignment:
    """Between the residual streams of a source and of a target that computes the same function.

    layers: for each layer of the target, the layer of the source whose work it does; None for a silent copy.
    channels_c: int64, the source channel of each copied channel of the target.
    factors_c: what a copied channel carries, as a multiple of the source's.
    padding: channels behind the copies; they are zero.
    """

    layers: tuple[int | None, ...]
    channels_c: Tensor
    factors_c: Tensor
    padding: int

    def to_target(self, x_btd: Tensor) -> Tensor:
        """The source's residual stream as the target carries it."""
        return F.pad(x_btd[..., self.channels_c] * self.factors_c, (0, self.padding))

    def difference(self, before_nd: Tensor, after_nd: Tensor, target_nd: Tensor, counted_n: Tensor) -> float:
        """How far the target is from the source behind a layer, relative to what the layer adds.

        before_nd, after_nd: the source's stream on both sides of the layer. target_nd: what the target made of
        `to_target(before_nd)`. counted_n: tokens that count.
        Returned is the largest root mean square of any token and any channel, in the source's units: 1 is as far off as
        if the layer was not there.
        """
        before_nd = before_nd[counted_n]
        after_nd = after_nd[counted_n]
        target_nd = target_nd[counted_n]
        if len(after_nd) == 0:
            return 0.0
        added_nd = F.pad((after_nd - before_nd)[:, self.channels_c], (0, self.padding))
        copied_nd = target_nd[:, : len(self.factors_c)] / self.factors_c
        rounded_nd = ROUNDINGS * torch.finfo(after_nd.dtype).eps * copied_nd.abs()
        copied_nd = ((copied_nd - after_nd[:, self.channels_c]).abs() - rounded_nd).clamp(min=0.0)
        error_nd = torch.cat([copied_nd, target_nd[:, len(self.factors_c) :]], dim=1)
        least_n = LEAST_UPDATE * _size(after_nd, 1)
        of_tokens = _ratio(_size(error_nd, 1), _size(added_nd, 1) + least_n)
        mean = _size(added_nd.flatten(), 0) + LEAST_UPDATE * _size(after_nd.flatten(), 0)
        of_channels = _ratio(_size(error_nd, 0), torch.maximum(_size(added_nd, 0), mean))
        return torch.maximum(of_tokens.max(), of_channels.max()).item()


def _size(tensor: Tensor, dim: int) -> Tensor:
    """Root of the mean square."""
    return tensor.square().mean(dim=dim).sqrt()


def _ratio(error: Tensor, size: Tensor) -> Tensor:
    """`error / size` by element; 0 where the error is 0, even if the size is 0."""
    return torch.where(error == 0, 0.0, error / size)


def align(
    source: ModelConfig, target: ModelConfig, growth: GrowthConfig | UpcyclingConfig, seed: int, dtype: torch.dtype
) -> Alignment:
    """Of a growth that keeps the function (see `rules.preserves`), by the seed that it was made with."""
    if isinstance(growth, UpcyclingConfig):
        channels = circular(source.hidden_size, target.hidden_size)
        ones_c = torch.ones(source.hidden_size, dtype=dtype)
        return Alignment(tuple(range(target.num_hidden_layers)), torch.tensor(channels.sources), ones_c, 0)
    copies = map_layers(source, target, growth)
    residual = map_units(source, target, growth, seed).residual
    factors_c = torch.ones(len(residual.sources), dtype=dtype)
    if growth.norm == "exact":
        # So that the squares of a channel's copies sum to D'/D, and the mean square stays (METHODS section 2).
        factors_c = (target.hidden_size / source.hidden_size / torch.tensor(residual.copies, dtype=dtype)).sqrt()
    return Alignment(
        layers=tuple(None if new else layer for layer, new in zip(copies.sources, copies.is_new, strict=True)),
        channels_c=torch.tensor(residual.sources),
        factors_c=factors_c,
        padding=residual.padding,
    )
