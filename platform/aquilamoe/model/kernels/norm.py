"""Root mean square normalisation in as few passes over memory as a CPU without a compiler can make."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight_d: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 or wider.

    Returned in autocast's type where it is on, so that it is rounded once and not by each product that it goes into.
    An accelerator has a kernel of its own, and a compiler makes one: both get torch's function.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if device != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, weight_d.shape, weight_d, eps).to(dtype)
    normed: Tensor = _RMSNorm.apply(x, weight_d, eps, dtype)
    return normed


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_d: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_d, scale)
        return (wide * scale).mul_(weight_d).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_d, scale = ctx.saved_tensors
        gradient, unit = gradient.to(scale.dtype), x * scale
        by_weight_d = (gradient * unit).flatten(0, -2).sum(dim=0)
        gradient = gradient * weight_d
        along = (gradient * unit).mean(dim=-1, keepdim=True)
        by_x = gradient.addcmul_(unit, along, value=-1).mul_(scale)
        return by_x.to(x.dtype), by_weight_d.to(weight_d.dtype), None, None
