"""The two ways to compute attention are one function, forward and backward, in every precision."""

import pytest
import torch
from torch import Tensor

from aquilamoe.model.kernels.attention import causal_attention
from aquilamoe.model.kernels.choice import AttentionKernel, Kernels

KERNELS: tuple[AttentionKernel, ...] = ("sdpa", "explicit")


WINDOWS = [None, 1, 2, 4, 5, 12, 13, 50]  # of sequences of 13 positions


def reference(q_bhtc: Tensor, k_bgtc: Tensor, v_bgtc: Tensor, window: int | None = None) -> Tensor:
    """Attention position by position: of each query over the keys of its window that are not later."""
    times = q_bhtc.shape[1] // k_bgtc.shape[1]
    k_bhtc, v_bhtc = k_bgtc.repeat_interleave(times, dim=1), v_bgtc.repeat_interleave(times, dim=1)
    rows = []
    for t in range(q_bhtc.shape[2]):
        seen = slice(max(0, t + 1 - (window or t + 1)), t + 1)
        scores_bht = (k_bhtc[:, :, seen] * q_bhtc[:, :, t : t + 1]).sum(-1) / q_bhtc.shape[3] ** 0.5
        rows.append((scores_bht.softmax(-1)[..., None] * v_bhtc[:, :, seen]).sum(2))
    return torch.stack(rows, dim=2)


def inputs(groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values with the strides that the network gives them."""
    generator = torch.Generator().manual_seed(groups)
    shapes = ((2, 13, heads, 8) for heads in (4, groups, groups))
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in made]


def value_and_gradients(
    kernel: AttentionKernel | None, tensors: list[Tensor], window: int | None = None
) -> list[Tensor]:
    q, k, v = tensors
    out_bhtc = reference(q, k, v, window) if kernel is None else causal_attention(q, k, v, kernel, window)
    weights = torch.linspace(-1, 1, out_bhtc.numel(), dtype=torch.float64).view(out_bhtc.shape)
    return [out_bhtc, *torch.autograd.grad((out_bhtc * weights).sum(), tensors)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
def test_every_kernel_gives_the_value_and_the_gradients_of_attention_position_by_position(
    kernel: AttentionKernel, groups: int, dtype: torch.dtype, tolerance: float
) -> None:
    expected = value_and_gradients(None, inputs(groups, torch.float64))
    found = value_and_gradients(kernel, inputs(groups, dtype))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", WINDOWS)
def test_every_kernel_computes_windows_of_any_size(kernel: AttentionKernel, window: int | None) -> None:
    expected = value_and_gradients(None, inputs(2, torch.float64), window)
    found = value_and_gradients(kernel, inputs(2, torch.float64), window)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("window", [3, 70, 100, 200])
def test_windows_over_several_blocks_of_queries_agree_in_all_kernels(window: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (150, 600):  # blocks of 64 and of 128 queries
        tensors = [
            torch.randn(1, heads, length, 4, generator=generator, dtype=torch.float64).requires_grad_()
            for heads in (4, 2, 2)
        ]
        both = [value_and_gradients(kernel, tensors, window) for kernel in KERNELS]
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_token_sees_a_later_one_even_if_that_is_not_finite(kernel: AttentionKernel) -> None:
    q, k, v = inputs(2, torch.float32)
    with torch.no_grad():
        before = causal_attention(q, k, v, kernel)[:, :, :9]
        k[:, :, 9:] = 1e30
        torch.testing.assert_close(causal_attention(q, k, v, kernel)[:, :, :9], before, atol=0, rtol=0)


def test_what_is_configured_wins_over_what_was_measured() -> None:
    for kernel in KERNELS:
        assert {Kernels(attention=kernel).attention_on(device, 128) for device in ("cpu", "cuda")} == {kernel}


def test_the_log_has_what_is_used_and_what_chose_it() -> None:
    assert Kernels(attention="explicit").describe("cpu", 128).startswith("attention explicit (configured")
    chosen = Kernels().attention_on("cuda", 1024)
    assert f"attention {chosen} (measured default for cuda, 1024 tokens" in Kernels().describe("cuda", 1024)
