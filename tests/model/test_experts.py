"""A layer's experts: both implementations against a plain loop, their gradients, padding, compilation, no waiting."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.config.network import ModelConfig
from aquilamoe.model.kernels import experts
from aquilamoe.model.kernels.choice import ExpertsKernel, Kernels
from aquilamoe.model.transformer import MixtureOfExperts

Network = Callable[..., ModelConfig]
KERNELS: tuple[ExpertsKernel, ...] = ("loop", "grouped")
COUNTS = {
    "uneven": (5, 17, 2, 40),
    "empty experts": (0, 33, 0, 16),
    "all rows to one": (0, 0, 50, 0),
    "the last alone": (0, 0, 0, 70),
    "one row": (0, 1, 0, 0),
    "full paddings": (16, 32, 16, 48),
    "few at the end": (60, 1, 1, 1),
}


def draw(counts: tuple[int, ...], dtype: torch.dtype, hidden: int = 24, size: int = 40) -> list[Tensor]:
    """Rows, and the gate, up and down matrices of so many experts."""
    generator = torch.Generator().manual_seed(len(counts) + sum(counts))
    shapes = [(sum(counts), hidden), *[(len(counts), size, hidden)] * 2, (len(counts), hidden, size)]
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5 for shape in shapes)
    return [tensor.to(dtype).requires_grad_() for tensor in drawn]


def feed_forwards(kernel: ExpertsKernel, counts: tuple[int, ...], rows_sd: Tensor, *weights: Tensor) -> Tensor:
    gate_efd, up_efd, down_edf = weights
    return experts.expert_feed_forwards(rows_sd, torch.tensor(counts), gate_efd, up_efd, down_edf, kernel=kernel)


def naive(rows_sd: Tensor, counts: tuple[int, ...], gate_efd: Tensor, up_efd: Tensor, down_edf: Tensor) -> Tensor:
    """Row by row, each through the matrices of its expert."""
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    out = [
        down_edf[e] @ (F.silu(gate_efd[e] @ row) * (up_efd[e] @ row)) for e, row in zip(owners, rows_sd, strict=True)
    ]
    return torch.stack(out)


def both(counts: tuple[int, ...], kernel: ExpertsKernel, inputs: list[Tensor]) -> list[list[Tensor]]:
    """The output and the gradients of rows and weights: what the kernel finds, and the plain loop in float64."""
    results = []
    for wide in (False, True):
        rows_sd, *weights = given = [tensor.detach().double().requires_grad_() if wide else tensor for tensor in inputs]
        out = naive(rows_sd, counts, *weights) if wide else feed_forwards(kernel, counts, *given)
        factors = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad((out * factors).sum(), given)])
    return results


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_experts_are_the_plain_loop_in_output_and_every_gradient(
    counts: tuple[int, ...], kernel: ExpertsKernel, dtype: torch.dtype, tolerance: float
) -> None:
    for found, expected in zip(*both(counts, kernel, draw(counts, dtype)), strict=True):
        assert found.dtype == dtype
        assert expected.abs().max() > 0.1
        assert (found - expected).abs().max() < tolerance


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_bfloat16_experts_are_as_near_as_rounding_and_weights_keep_their_own_precision(
    counts: tuple[int, ...], kernel: ExpertsKernel
) -> None:
    rows_sd, *weights = draw(counts, torch.float32)
    with torch.no_grad():
        rounded = [tensor.bfloat16().to(tensor.dtype).requires_grad_() for tensor in weights]
    found, expected = both(counts, kernel, [rows_sd.detach().bfloat16().requires_grad_(), *rounded])
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.bfloat16, *[torch.float32] * 3]
    for mine, exact in zip(found, expected, strict=True):
        assert (mine - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_expert_without_rows_gets_a_gradient_of_zeros(kernel: ExpertsKernel) -> None:
    (_, _, *gradients), _ = both(COUNTS["empty experts"], kernel, draw(COUNTS["empty experts"], torch.float32))
    for gradient in gradients:
        assert not gradient[[0, 2]].any()
        assert gradient[1].any() and gradient[3].any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_gradient_of_a_sum_which_has_no_strides_goes_through(kernel: ExpertsKernel) -> None:
    inputs = draw((20, 12), torch.bfloat16)
    feed_forwards(kernel, (20, 12), *inputs).sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in inputs)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 255, 257, 511, 513, 4097, 100_000])
def test_padding_wastes_little_and_leaves_few_shapes(count: int) -> None:
    padded = count + -count % experts._multiple(count)
    assert count <= padded < count + max(16, count / 15)
    octave = {n + -n % experts._multiple(n) for n in range(512, 1024)}
    assert len(octave) <= 17


def test_rows_are_sorted_by_expert_and_found_again() -> None:
    experts_nk = torch.tensor([[3, 0], [0, 1], [3, 1], [0, 3]])
    token_s, slots_nk = experts.sort_rows(experts_nk)
    assert token_s.tolist() == [0, 1, 3, 1, 2, 0, 2, 3]
    assert slots_nk.tolist() == [[5, 0], [1, 3], [6, 4], [2, 7]]
    assert experts.count_rows(experts_nk, 5).tolist() == [3, 2, 0, 3, 0]


def test_gathering_and_weighing_rows_have_the_gradients_of_finite_differences() -> None:
    token_s, slots_nk = experts.sort_rows(torch.tensor([[2, 0, 1], [0, 1, 3], [3, 1, 0], [0, 3, 2]]))
    x_nd = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    rows_sd = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    gates_nk = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(experts.gather_rows(x_nd, token_s, slots_nk), x_nd[token_s])
    assert torch.autograd.gradcheck(lambda x: experts.gather_rows(x, token_s, slots_nk), x_nd)
    assert torch.autograd.gradcheck(lambda r, g: experts.weigh_rows(r, g, token_s, slots_nk), (rows_sd, gates_nk))
    expected = (rows_sd[slots_nk] * gates_nk[..., None]).sum(dim=1)
    assert torch.allclose(experts.weigh_rows(rows_sd, gates_nk, token_s, slots_nk), expected, rtol=0, atol=1e-14)


def test_weighing_adds_in_the_precision_of_the_gates() -> None:
    token_s, slots_nk = experts.sort_rows(torch.tensor([[0, 1]]))
    rows_sd = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    assert experts.weigh_rows(rows_sd, torch.ones(1, 2), token_s, slots_nk).item() == 257.0


def mixture(network: Network, kernel: ExpertsKernel, **changes: Any) -> MixtureOfExperts:
    moe = MixtureOfExperts(network("qwen2_moe shared", num_experts=8, num_experts_per_tok=3, **changes))
    moe.experts.kernels = Kernels(experts=kernel)
    for index, parameter in enumerate(moe.parameters()):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(index))
    return moe


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, when it traces
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_mixture_is_one_graph_that_serves_whatever_the_router_chooses(
    kernel: ExpertsKernel, network: Network
) -> None:
    """The graph holds no value that the host would have to wait for."""
    torch._dynamo.reset()
    moe = mixture(network, kernel)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    counts = set()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.autocast("cpu", torch.bfloat16):
        for seed in range(3):
            x_btd = torch.randn(2, 16, 24, generator=torch.Generator().manual_seed(seed))
            gradients = []
            for forward in (compiled, moe):
                out, routing = forward(x_btd)
                gradients.append(torch.autograd.grad(out.square().sum(), moe.experts.gate_proj)[0])
            assert (gradients[0] - gradients[1]).norm() < 0.01 * gradients[1].norm()
            counts.add(tuple(experts.count_rows(routing.experts_nk, 8).tolist()))
    assert len(counts) == 3


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_are_summed_alike_on_every_device(weighted: bool) -> None:
    _, slots_nk = experts.sort_rows(torch.randint(5, (20, 3)))
    rows_sd, weights_nk = torch.randn(60, 7, dtype=torch.float64), torch.rand(20, 3, dtype=torch.float64)
    in_bags, gathered = (
        way(rows_sd, slots_nk, weights_nk if weighted else None) for way in (experts._sum_bags, experts._sum_gathered)
    )
    assert torch.allclose(in_bags, gathered, rtol=0, atol=1e-14)


def test_the_loop_keeps_what_torch_requires_of_its_operations() -> None:
    inputs = draw((20, 12), torch.float32)
    torch.library.opcheck(experts._loop_product, (inputs[0], torch.tensor((20, 12)), inputs[1]))


def test_experts_are_chosen_by_device_unless_the_configuration_chooses() -> None:
    assert [Kernels().experts_on(device) for device in ("cpu", "cuda")] == ["loop", "grouped"]
    assert Kernels(experts="grouped").experts_on("cpu") == "grouped"
    assert "experts grouped (configured for cpu)" in Kernels(experts="grouped").describe("cpu", 128, is_moe=True)
    assert "experts loop (measured default for cpu)" in Kernels().describe("cpu", 128, is_moe=True)
    assert "experts" not in Kernels().describe("cpu", 128)
