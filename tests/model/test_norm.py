"""The norm in few passes is torch's, value and gradients, in every precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.model.kernels.norm import rms_norm

EPS = 0.1  # large enough to be seen


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), torch.randn(8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def value_and_gradients(out: Tensor, *by: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), by)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_value_and_gradients_are_those_of_torchs_function(dtype: torch.dtype, tolerance: float) -> None:
    x, weight_d = inputs(dtype)
    wide, wide_weight_d = (each.detach().double().requires_grad_() for each in (x, weight_d))
    expected = value_and_gradients(F.rms_norm(wide, (8,), wide_weight_d, EPS), wide, wide_weight_d)
    found = value_and_gradients(rms_norm(x, weight_d, EPS), x, weight_d)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


def test_under_autocast_only_what_is_returned_is_rounded() -> None:
    x, weight_d = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        normed = rms_norm(x, weight_d, EPS)
    assert torch.equal(normed, rms_norm(x, weight_d, EPS).bfloat16())
    assert [each.dtype for each in value_and_gradients(normed, x, weight_d)] == [
        torch.bfloat16,
        torch.float32,
        torch.float32,
    ]


def test_a_row_of_zeros_stays_zeros_and_has_a_finite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    value, gradient = value_and_gradients(rms_norm(x, torch.ones(8), 1e-5), x)
    assert not value.any()
    assert gradient.isfinite().all()
