"""The head and its cross-entropy in chunks of tokens: neither the logits nor their gradient exist as a whole.

A vocabulary of 152k makes logits of 0.6 MB a token in float32, and as much for their gradient. Here the gradient is
computed beside the loss, while a chunk's logits are there, so that nothing is computed twice: the forward pass does
all three products (logits, gradient of the hidden states, gradient of the head), the backward pass only scales.

Shapes: n tokens, d hidden, v vocabulary, m tokens of a chunk.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from aquilamoe.model.kernels.chunks import chunk_rows


def head_cross_entropy(hidden_nd: Tensor, head_vd: Tensor, targets_n: Tensor) -> Tensor:
    """Mean of -log softmax(hidden head')[target] in nats per token: a scalar, float32 or wider.

    The products are computed in autocast's type where it is on, else in that of `hidden_nd`; the softmax, the loss and
    the sums over chunks in float32 or wider. The gradient is that of the whole, and not differentiable again.
    """
    device = hidden_nd.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden_nd.dtype
    differentiated = torch.is_grad_enabled() and (hidden_nd.requires_grad or head_vd.requires_grad)
    loss: Tensor = _HeadCrossEntropy.apply(hidden_nd, head_vd, targets_n, dtype, differentiated)
    return loss


class _HeadCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_nd: Tensor, head_vd: Tensor, targets_n: Tensor, dtype: torch.dtype, differentiated: bool
    ) -> Tensor:
        with torch.autocast(hidden_nd.device.type, enabled=False):
            total, *gradients = _sums(hidden_nd, head_vd.to(dtype), targets_n, differentiated)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_nd.dtype, head_vd.dtype
        ctx.count = targets_n.numel()
        return total / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        scale = gradient / ctx.count
        found = [(scale * saved).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        return *found, None, None, None


def _sums(hidden_nd: Tensor, head_vd: Tensor, targets_n: Tensor, differentiated: bool) -> list[Tensor]:
    """Sum of the losses and, if `differentiated`, its gradients by `hidden_nd` and by `head_vd`."""
    wide = torch.promote_types(head_vd.dtype, torch.float32)
    total = hidden_nd.new_zeros((), dtype=wide)
    if not differentiated:
        for x_md, targets_m in _chunks(hidden_nd, head_vd, targets_n):
            total += F.cross_entropy(F.linear(x_md, head_vd).to(wide), targets_m, reduction="sum")
        return [total]
    by_head_vd = torch.zeros_like(head_vd, dtype=wide)
    by_hidden_nd = []
    for x_md, targets_m in _chunks(hidden_nd, head_vd, targets_n):
        loss, by_logits_mv = _loss_and_gradient(F.linear(x_md, head_vd).to(wide), targets_m[:, None], head_vd.dtype)
        total += loss
        by_hidden_nd.append(by_logits_mv @ head_vd)
        by_head_vd += by_logits_mv.T @ x_md
        del by_logits_mv  # before the next chunk's logits
    return [total, torch.cat(by_hidden_nd), by_head_vd]


def _loss_and_gradient(logits_mv: Tensor, targets_m1: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sum of the losses of a chunk, and its gradient by the logits: the shares, less 1 at the target.

    The largest share is 1 / sum(exp(logits - largest)): of it comes the logarithm, which no small share underflows.
    """
    shares_mv = logits_mv.softmax(dim=-1)
    log_sums_m = logits_mv.amax(dim=-1) - shares_mv.amax(dim=-1).log()
    loss = (log_sums_m - logits_mv.gather(1, targets_m1).squeeze(1)).sum()
    del logits_mv
    shares_mv.scatter_add_(1, targets_m1, shares_mv.new_full((), -1.0).expand_as(targets_m1))
    return loss, shares_mv.to(dtype)


def _chunks(hidden_nd: Tensor, head_vd: Tensor, targets_n: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = chunk_rows(hidden_nd.shape[0], head_vd.shape[0], hidden_nd.device.type)
    return list(zip(hidden_nd.to(head_vd.dtype).split(rows), targets_n.split(rows), strict=True))
