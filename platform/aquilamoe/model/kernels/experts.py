"""A layer's experts on the rows that the router sends them: sort, gather, expert feed-forwards, weighted sum.

Shapes: n tokens, k experts per token, s = n*k routed rows, e experts, d hidden, f neurons of an expert, r rows of one
expert. Nothing here needs to know on the host how many rows an expert has, but for the `loop`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.model.kernels.choice import ExpertsKernel


def count_rows(experts_nk: Tensor, num_experts: int) -> Tensor:
    """How many rows each expert is given: int64 of shape (e,). Unlike `bincount` it never waits for the device."""
    flat_s = experts_nk.flatten()
    return flat_s.new_zeros(num_experts).scatter_add_(0, flat_s, torch.ones_like(flat_s))


def sort_rows(experts_nk: Tensor) -> tuple[Tensor, Tensor]:
    """Order the assignments by expert, of one expert by token.

    Returns token_s, the token of each sorted row, and slots_nk, the sorted row of each assignment.
    """
    n, k = experts_nk.shape
    order_s = experts_nk.flatten().argsort(stable=True)
    slots_s = torch.empty_like(order_s).scatter_(0, order_s, torch.arange(n * k, device=order_s.device))
    return order_s // k, slots_s.view(n, k)


def gather_rows(x_nd: Tensor, token_s: Tensor, slots_nk: Tensor) -> Tensor:
    """x_nd[token_s]. Its gradient is a sum of gathered rows, in one order: nothing is scattered."""
    return _Gather.apply(x_nd, token_s, slots_nk)


def weigh_rows(rows_sd: Tensor, gates_nk: Tensor, token_s: Tensor, slots_nk: Tensor) -> Tensor:
    """The sum of each token's rows times their gates: shape (n, d), in the precision of the gates."""
    return _Weigh.apply(rows_sd, gates_nk, token_s, slots_nk)


def expert_feed_forwards(
    rows_sd: Tensor, counts_e: Tensor, gate_efd: Tensor, up_efd: Tensor, down_edf: Tensor, *, kernel: ExpertsKernel
) -> Tensor:
    """SwiGLU of each row by its expert, rows_sd being sorted: the first counts_e[0] rows are of expert 0, and so on.

    Computed in the precision of the rows; weights of another are rounded to it, and get gradients in their own. Torch
    compiles a grouped product of bfloat16 alone: everything else is a loop.
    """
    if kernel == "loop" or rows_sd.dtype != torch.bfloat16:
        inner_sf = F.silu(_loop_product(rows_sd, counts_e, gate_efd)) * _loop_product(rows_sd, counts_e, up_efd)
        return _loop_product(inner_sf, counts_e, down_edf)
    ends_e = counts_e.cumsum(0).to(torch.int32)
    inner_sf = F.silu(_grouped_product(rows_sd, ends_e, gate_efd)) * _grouped_product(rows_sd, ends_e, up_efd)
    return _grouped_product(inner_sf, ends_e, down_edf)


def _grouped_product(rows_si: Tensor, ends_e: Tensor, weight_eoi: Tensor) -> Tensor:
    return _Contiguous.apply(F.grouped_mm(rows_si, weight_eoi.to(rows_si.dtype).transpose(1, 2), offs=ends_e))


class _Contiguous(torch.autograd.Function):
    """Nothing, but for gradients with strides that `grouped_mm` refuses, such as those of a sum."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, token_s: Tensor, slots_nk: Tensor) -> Tensor:
        ctx.save_for_backward(slots_nk)
        return x_nd.index_select(0, token_s)

    @staticmethod
    def backward(ctx: Any, gradient_sd: Tensor) -> tuple[Tensor, None, None]:
        (slots_nk,) = ctx.saved_tensors
        return _sum_rows(gradient_sd, slots_nk, None), None, None


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_sd: Tensor, gates_nk: Tensor, token_s: Tensor, slots_nk: Tensor) -> Tensor:
        ctx.save_for_backward(rows_sd, gates_nk, token_s, slots_nk)
        return _sum_rows(rows_sd.to(gates_nk.dtype), slots_nk, gates_nk)

    @staticmethod
    def backward(ctx: Any, gradient_nd: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_sd, gates_nk, token_s, slots_nk = ctx.saved_tensors
        gates_s = torch.empty_like(gates_nk).flatten().scatter_(0, slots_nk.flatten(), gates_nk.flatten())
        gradient_sd = gradient_nd.index_select(0, token_s)
        gates_gradient_s = (gradient_sd * rows_sd.to(gates_nk.dtype)).sum(dim=-1)
        return (gradient_sd * gates_s[:, None]).to(rows_sd.dtype), gates_gradient_s[slots_nk], None, None


def _sum_rows(rows_sd: Tensor, slots_nk: Tensor, weights_nk: Tensor | None) -> Tensor:
    """The (weighted) sum over k of rows_sd[slots_nk]."""
    return (_sum_bags if rows_sd.device.type == "cpu" else _sum_gathered)(rows_sd, slots_nk, weights_nk)


def _sum_bags(rows_sd: Tensor, slots_nk: Tensor, weights_nk: Tensor | None) -> Tensor:
    """In one pass, by the sum that is made for bags of embeddings."""
    return F.embedding_bag(slots_nk, rows_sd, mode="sum", per_sample_weights=weights_nk)


def _sum_gathered(rows_sd: Tensor, slots_nk: Tensor, weights_nk: Tensor | None) -> Tensor:
    """As products and sums, which a compiler makes one pass of."""
    rows_nkd = rows_sd[slots_nk]
    return (rows_nkd if weights_nk is None else rows_nkd * weights_nk[..., None]).sum(dim=1)


@torch.library.custom_op("aquilamoe::loop_product", mutates_args=())
def _loop_product(rows_si: Tensor, counts_e: Tensor, weight_eoi: Tensor) -> Tensor:
    """rows @ weight' of each row's expert, an expert after the other: one opaque operation for the compiler.

    An expert's product runs on into the rows of the next, up to the padded number, and is overwritten by it.
    """
    s = rows_si.shape[0]
    out_so = rows_si.new_empty(s + _multiple(s), weight_eoi.shape[1])
    for expert, start, _, padded in _parts(counts_e, rows_si.dtype):
        weight_oi = weight_eoi[expert].to(rows_si.dtype)
        torch.mm(_window(rows_si, start, padded), weight_oi.t(), out=out_so[start : start + padded])
    return out_so[:s]


@torch.library.custom_op("aquilamoe::loop_product_gradients", mutates_args=())
def _loop_product_gradients(
    gradient_so: Tensor, rows_si: Tensor, counts_e: Tensor, weight_eoi: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `_loop_product` by its rows and by its weights."""
    gradient_so = gradient_so.contiguous()
    s, size_i = rows_si.shape
    by_rows_si = rows_si.new_empty(s + _multiple(s), size_i)
    by_weight_eoi = torch.zeros_like(weight_eoi)
    for expert, start, count, padded in _parts(counts_e, rows_si.dtype):
        window_ro = _window(gradient_so, start, padded)
        weight_oi = weight_eoi[expert].to(rows_si.dtype)
        torch.mm(window_ro, weight_oi, out=by_rows_si[start : start + padded])
        by_weight_eoi[expert] = _sum_of_products(gradient_so, rows_si, start, count, padded)
    return by_rows_si[:s], by_weight_eoi


def _sum_of_products(left_so: Tensor, right_si: Tensor, start: int, count: int, padded: int) -> Tensor:
    """left' @ right over one expert's rows. Zeros in the narrower take the rows of the next expert out."""
    if left_so.shape[1] <= right_si.shape[1]:
        left_ro, right_ri = _only(left_so, start, count, padded), _window(right_si, start, padded)
    else:
        left_ro, right_ri = _window(left_so, start, padded), _only(right_si, start, count, padded)
    return left_ro.t() @ right_ri


def _parts(counts_e: Tensor, dtype: torch.dtype) -> Iterator[tuple[int, int, int, int]]:
    """Of each expert that has rows: its index, where they start, how many they are, and how many with padding."""
    start = 0
    for expert, count in enumerate(counts_e.tolist()):
        if count:
            yield expert, start, count, count + -count % _multiple(count) if dtype == torch.bfloat16 else count
        start += count


def _multiple(count: int) -> int:
    """To what rows are padded: of 16 numbers in an octave, multiples of 16, to the next; on average by 2 %.

    A CPU compiles a bfloat16 product for each new shape, in the time of several products, and the rows of an expert
    change at every step; these shapes come again. In float32 nothing is compiled.
    """
    return 1 << max(4, count.bit_length() - 5)


def _window(rows_si: Tensor, start: int, padded: int) -> Tensor:
    """So many rows from `start`; zeros where there are no more."""
    window_ri = rows_si[start : start + padded]
    return window_ri if len(window_ri) == padded else F.pad(window_ri, (0, 0, 0, padded - len(window_ri)))


def _only(rows_si: Tensor, start: int, count: int, padded: int) -> Tensor:
    """So many rows from `start`; zeros after the expert's own."""
    return (
        rows_si[start : start + padded]
        if count == padded
        else F.pad(rows_si[start : start + count], (0, 0, 0, padded - count))
    )


@_loop_product.register_fake
def _(rows_si: Tensor, _counts_e: Tensor, weight_eoi: Tensor) -> Tensor:
    return rows_si.new_empty(rows_si.shape[0], weight_eoi.shape[1])


@_loop_product_gradients.register_fake
def _(_gradient_so: Tensor, rows_si: Tensor, _counts_e: Tensor, weight_eoi: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows_si), torch.empty_like(weight_eoi)


def _save_for_gradients(ctx: Any, inputs: Sequence[Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, gradient_so: Tensor) -> tuple[Tensor, None, Tensor]:
    by_rows_si, by_weight_eoi = _loop_product_gradients(gradient_so, *ctx.saved_tensors)
    return by_rows_si, None, by_weight_eoi


_loop_product.register_autograd(_differentiate, setup_context=_save_for_gradients)
