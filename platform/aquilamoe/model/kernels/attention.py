"""Causal grouped-query attention, two ways: torch's fused kernel, and products and a softmax in tiles.

Shapes: b batch, h query heads, g key-value heads (h is a multiple of g), t positions, c channels of a head; p pairs of
a sequence and a key-value head, q their queries by position and head (t * h/g), l keys that a block may see.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.model.kernels.choice import AttentionKernel

TILE_BYTES = 4 << 20  # of scores, so that a CPU keeps them in its cache
LONG = 512  # positions, from which on blocks are twice as long


def causal_attention(
    q_bhtc: Tensor, k_bgtc: Tensor, v_bgtc: Tensor, kernel: AttentionKernel, window: int | None = None
) -> Tensor:
    """softmax(q k' / sqrt(c) where keys are not later than queries) v, of shape (b, h, t, c).

    In autocast's type where it is on. `explicit` keeps the softmax for the gradient: 2 bytes for each pair of a query
    and a key that it may see, and each head, in bfloat16.

    Args:
        q_bhtc: queries.
        k_bgtc: keys.
        v_bgtc: values.
        kernel: how it is computed.
        window: positions that a query sees, its own included; None sees all before it.
    """
    length = q_bhtc.shape[2]
    window = None if window is None or window >= length else window
    if kernel == "sdpa":
        if window is not None:
            return _banded(q_bhtc, k_bgtc, v_bgtc, window)
        grouped = q_bhtc.shape[1] != k_bgtc.shape[1]
        return F.scaled_dot_product_attention(q_bhtc, k_bgtc, v_bgtc, is_causal=True, enable_gqa=grouped)
    device = q_bhtc.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q_bhtc.dtype
    b, h, t, c = q_bhtc.shape
    g = k_bgtc.shape[1]
    # The query heads of a key-value head become rows of one tall matrix, a position's beside each other.
    q_pqc = q_bhtc.to(dtype).unflatten(1, (g, h // g)).transpose(2, 3).reshape(b * g, -1, c)
    k_ptc, v_ptc = (each.to(dtype).reshape(b * g, t, c) for each in (k_bgtc, v_bgtc))
    mixed_pqc = _explicit(q_pqc, k_ptc, v_ptc, window or t)[0]
    return mixed_pqc.view(b, g, t, h // g, c).transpose(2, 3).reshape(b, h, t, c)


def _banded(q_bhtc: Tensor, k_bgtc: Tensor, v_bgtc: Tensor, window: int) -> Tensor:
    """Attention in blocks of `window` queries, each beside its own keys and those of the block before.

    Work and memory grow with length * window, where a mask over all keys would take length * length.
    """
    batch, heads, length, _ = q_bhtc.shape
    grouped = heads != k_bgtc.shape[1]
    # Copies: parts of the whole would keep it in memory.
    q, k, v = (each[:, :, :window].contiguous() for each in (q_bhtc, k_bgtc, v_bgtc))
    first_bhwc = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    padding = (0, 0, 0, -length % window)
    q, k, v = (F.pad(each, padding) for each in (q_bhtc[:, :, window:], k_bgtc, v_bgtc))
    q_nhwc = q.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)  # n: blocks of all sequences
    k_nglc, v_nglc = (each.unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).flatten(0, 1) for each in (k, v))
    rows, keys = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
    seen_wl = (keys > rows) & (keys <= rows + window)
    rest = F.scaled_dot_product_attention(q_nhwc, k_nglc, v_nglc, attn_mask=seen_wl, enable_gqa=grouped)
    rest_bhtc = rest.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first_bhwc, rest_bhtc], dim=2)[:, :, :length]


# Opaque to the compiler, which would unroll the tiles; its products are the same library's.
@torch.library.custom_op("aquilamoe::explicit_attention", mutates_args=())
def _explicit(q_pqc: Tensor, k_ptc: Tensor, v_ptc: Tensor, window: int) -> tuple[Tensor, list[Tensor]]:
    """The mixed values, and the softmax of every tile."""
    length, scale = k_ptc.shape[1], q_pqc.shape[2] ** -0.5
    heads = q_pqc.shape[1] // length
    unseen_qt = torch.full((length,) * 2, float("-inf"), dtype=q_pqc.dtype, device=q_pqc.device)
    unseen_qt = unseen_qt.triu(1) if window >= length else unseen_qt.triu(1) + unseen_qt.tril(-window)
    unseen_qt = unseen_qt.repeat_interleave(heads, dim=0)
    mixed_pqc = torch.empty_like(q_pqc)
    shares = []
    for pairs, queries, keys in _tiles(q_pqc, k_ptc, window):
        scores_pql = torch.baddbmm(
            unseen_qt[None, queries, keys], q_pqc[pairs, queries], k_ptc[pairs, keys].mT, alpha=scale
        )
        shares.append(scores_pql.softmax(dim=-1))
        mixed_pqc[pairs, queries] = shares[-1] @ v_ptc[pairs, keys]
    return mixed_pqc, shares


@torch.library.custom_op("aquilamoe::explicit_attention_gradients", mutates_args=())
def _explicit_gradients(
    gradient_pqc: Tensor, q_pqc: Tensor, k_ptc: Tensor, v_ptc: Tensor, shares: list[Tensor], *, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q_pqc.dtype, torch.float32)  # of what is summed over blocks of queries
    by_q_pqc = torch.empty_like(q_pqc)
    by_k_ptc, by_v_ptc = torch.zeros_like(k_ptc, dtype=wide), torch.zeros_like(v_ptc, dtype=wide)
    for (pairs, queries, keys), shares_pql in zip(_tiles(q_pqc, k_ptc, window), shares, strict=True):
        above_pqc = gradient_pqc[pairs, queries]
        by_v_ptc[pairs, keys] += shares_pql.mT @ above_pqc
        by_shares_pql = above_pqc @ v_ptc[pairs, keys].mT
        by_scores_pql = torch._softmax_backward_data(by_shares_pql, shares_pql, -1, shares_pql.dtype)
        by_q_pqc[pairs, queries] = by_scores_pql @ k_ptc[pairs, keys]
        by_k_ptc[pairs, keys] += by_scores_pql.mT @ q_pqc[pairs, queries]
    scale = q_pqc.shape[2] ** -0.5
    return by_q_pqc.mul_(scale), by_k_ptc.mul_(scale).to(k_ptc.dtype), by_v_ptc.to(v_ptc.dtype)


def _tiles(q_pqc: Tensor, k_ptc: Tensor, window: int) -> Iterator[tuple[slice, slice, slice]]:
    """Blocks of queries with the keys that they may see, a few pairs at a time: slices of pairs, queries and keys.

    A block's keys begin where the window of its first query does and end where its queries do, so that about half of
    all scores, or what is outside of the windows, is not computed.
    """
    pairs, length, _ = k_ptc.shape
    heads, block = q_pqc.shape[1] // length, 64 if length <= LONG else 128
    for start in range(0, length, block):
        end, first_key = min(start + block, length), max(0, start - window + 1)
        score_bytes = (end - start) * heads * (end - first_key) * q_pqc.element_size()
        step = max(1, TILE_BYTES // score_bytes)
        for first in range(0, pairs, step):
            queries = slice(start * heads, end * heads)
            yield slice(first, min(first + step, pairs)), queries, slice(first_key, end)


@_explicit.register_fake
def _(q_pqc: Tensor, k_ptc: Tensor, v_ptc: Tensor, window: int) -> tuple[Tensor, list[Tensor]]:  # noqa: ARG001
    tiles = _tiles(q_pqc, k_ptc, window)
    sizes = [[each.stop - each.start for each in slices] for slices in tiles]
    return torch.empty_like(q_pqc), [q_pqc.new_empty(size) for size in sizes]


@_explicit_gradients.register_fake
def _(
    gradient_pqc: Tensor,  # noqa: ARG001
    q_pqc: Tensor,
    k_ptc: Tensor,
    v_ptc: Tensor,
    shares: list[Tensor],  # noqa: ARG001
    *,
    window: int,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    return torch.empty_like(q_pqc), torch.empty_like(k_ptc), torch.empty_like(v_ptc)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output[1])


def _differentiate(ctx: Any, by_mixed_pqc: Tensor, _by_shares: Any) -> tuple[Tensor | None, ...]:
    q_pqc, k_ptc, v_ptc, *shares = ctx.saved_tensors
    gradients = _explicit_gradients(by_mixed_pqc.contiguous(), q_pqc, k_ptc, v_ptc, shares, window=ctx.window)
    return *gradients, None


_explicit.register_autograd(_differentiate, setup_context=_save)
