"""What is minimised: by its formula, by its gradients, and the same on one rank and on two (real gloo processes)."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from aquilamoe.config.schema import ModelConfig, RouterConfig
from aquilamoe.model.kernels.experts import count_rows
from aquilamoe.model.transformer import Decoder, Routing
from aquilamoe.training import example
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.job import Rank
from aquilamoe.training.objective import RouterObjective, balance_loss, z_loss
from aquilamoe.training.parallel import ParallelContext
from aquilamoe.training.step import TrainStep

LENGTH, ROWS = 12, 8
ROUTER = RouterConfig(balance_loss_coeff=0.5, balance_scope="global_batch", z_loss_coeff=0.1)
SCOPES = ("global_batch", "running", "micro_batch")
MODELS = {"dense": 0, "moe": 4}
CLUSTER = example.cluster()
ALONE = ParallelContext(CLUSTER)


def of_scope(scope: str) -> RouterConfig:
    return ROUTER.model_copy(update={"balance_scope": scope})


def model_config(experts: int) -> ModelConfig:
    return example.model(num_experts=experts, initializer_range=0.2)


def stepper(
    experts: int,
    router: RouterConfig = ROUTER,
    micro_batch_rows: int = ROWS,
    rank: Rank | None = None,
    precision: str = "fp32",
) -> TrainStep:
    """A model, in float64 unless it is rounded, with everything that a step needs; the same weights each time."""
    config = model_config(experts)
    job = example.job(
        network=config,
        total_tokens=100 * ROWS * LENGTH,
        batch_tokens=ROWS * LENGTH,
        sequence_length=LENGTH,
        learning_rate=1e-2,
        precision=precision,
        router=router,
        validation_tokens=LENGTH,
        micro_batch_tokens=micro_batch_rows * LENGTH,
    )
    model = Decoder(config)
    model.initialize(7)
    if precision == "fp32":
        model.double()
    return TrainStep(
        job, model, optimizers.build(model, job.stage.optimizer, 1e-2), ParallelContext(job.cluster, rank or Rank())
    )


def batch(seed: int = 3, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, (rows, LENGTH + 1))


def accumulate(of: TrainStep, rows: np.ndarray) -> dict[str, float]:
    """The gradient of a batch, and its losses as the step reports them."""
    return of.measured(of.accumulate(rows, RouterObjective(of.job.stage.router, of.group)))


def gradients(of: TrainStep) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in of.model.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def assert_equal_gradients(ones: dict[str, Tensor], others: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert ones.keys() == others.keys() and ones
    for name, one in ones.items():
        torch.testing.assert_close(one, others[name], rtol=0, atol=tolerance, msg=(name + ": {}").format)


def routing(logits_ne: Tensor, k: int) -> Routing:
    experts_nk = logits_ne.topk(k, dim=-1).indices
    return Routing(logits_ne, experts_nk, count_rows(experts_nk, logits_ne.shape[1]))


def even_routing(experts: int, k: int, tokens_per_expert: int) -> Routing:
    """Every expert is chosen equally often, and every expert's mean probability is the same."""
    rolled = torch.stack([torch.arange(experts).roll(shift) for shift in range(experts)])
    return routing(rolled.double().repeat(tokens_per_expert, 1), k)


# The router's losses


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (8, 2), (6, 3)])
def test_the_balance_loss_is_one_at_perfect_balance(experts: int, k: int) -> None:
    even = even_routing(experts, k, 5)
    assert abs(balance_loss(even, even.counts_e).item() - 1) < 1e-12


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (8, 2), (6, 3)])
def test_the_balance_loss_is_experts_over_k_when_all_tokens_go_to_the_same_k(experts: int, k: int) -> None:
    logits_ne = torch.full((20, experts), -100.0, dtype=torch.float64)
    logits_ne[:, :k] = 100.0
    collapsed = routing(logits_ne, k)
    assert abs(balance_loss(collapsed, collapsed.counts_e).item() - experts / k) < 1e-12


@settings(derandomize=True, deadline=None, max_examples=40)
@given(tokens=st.integers(1, 30), experts=st.integers(2, 9), data=st.data())
def test_the_router_losses_equal_the_formulas_written_out(tokens: int, experts: int, data: Any) -> None:
    k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    found = routing(3 * torch.randn(tokens, experts, dtype=torch.float64, generator=generator), k)
    counts, probabilities, squares = [0] * experts, [0.0] * experts, 0.0
    for n in range(tokens):
        exponentials = [float(np.exp(x)) for x in found.logits_ne[n].tolist()]
        squares += float(np.log(sum(exponentials))) ** 2
        for e in range(experts):
            probabilities[e] += exponentials[e] / sum(exponentials) / tokens
        for chosen in found.experts_nk[n].tolist():
            counts[chosen] += 1
    balance = experts * sum(c / (tokens * k) * p for c, p in zip(counts, probabilities, strict=True))
    assert found.counts_e.tolist() == counts
    assert abs(balance_loss(found, found.counts_e).item() - balance) < 1e-12
    assert abs(z_loss(found).item() - squares / tokens) < 1e-10


def test_the_gradients_of_the_router_losses_are_right() -> None:
    logits_ne = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    experts_nk = logits_ne.detach().topk(2, dim=-1).indices
    counts_e = count_rows(experts_nk, 4)

    def balance(logits: Tensor) -> Tensor:
        return balance_loss(Routing(logits, experts_nk, counts_e), counts_e)

    assert torch.autograd.gradcheck(balance, logits_ne)
    assert torch.autograd.gradcheck(lambda logits: z_loss(Routing(logits, experts_nk, counts_e)), logits_ne)


def test_the_gradient_of_the_balance_loss_takes_probability_from_the_crowded_expert() -> None:
    logits_ne = torch.tensor([[2.0, 1.0, 0.0], [2.0, 0.0, 1.0], [3.0, 0.0, 0.0]], requires_grad=True)
    crowded = routing(logits_ne, 1)
    balance_loss(crowded, crowded.counts_e).backward()
    assert logits_ne.grad is not None
    assert (logits_ne.grad[:, 0] > 0).all() and (logits_ne.grad[:, 1:] < 0).all()


def test_layers_are_balanced_one_by_one_and_averaged() -> None:
    """Two collapsed layers that together look balanced are not balanced."""
    to_first, to_second = torch.tensor([[50.0, -50.0]]).repeat(6, 1), torch.tensor([[-50.0, 50.0]]).repeat(6, 1)
    objective = RouterObjective(ROUTER, ALONE)
    balance, _ = objective([routing(to_first, 1), routing(to_second, 1)])
    assert abs(balance.item() - 2) < 1e-6
    assert objective.load().tolist() == [[6, 0], [0, 6]]


def random_routings() -> list[Routing]:
    return [routing(torch.randn(9, 4, dtype=torch.float64), 2) for _ in range(2)]


@pytest.mark.parametrize("scope", SCOPES)
def test_the_load_counts_all_micro_batches_of_a_step(scope: str) -> None:
    first, second = random_routings()
    objective = RouterObjective(of_scope(scope), ALONE)
    if objective.counts_first(2):
        objective.count([[first], [second]])
    for each in (first, second):
        objective([each])
    assert torch.equal(objective.load(), (first.counts_e + second.counts_e)[None])


def test_a_micro_batch_is_weighed_by_the_shares_that_its_scope_names() -> None:
    first, second = random_routings()
    both = first.counts_e + second.counts_e
    shares = {
        "global_batch": (both, both),
        "running": (first.counts_e, both),
        "micro_batch": (first.counts_e, second.counts_e),
    }
    for scope, (of_first, of_second) in shares.items():
        objective = RouterObjective(of_scope(scope), ALONE)
        if objective.counts_first(2):
            objective.count([[first], [second]])
        assert torch.equal(objective([first])[0], balance_loss(first, of_first)), scope
        assert torch.equal(objective([second])[0], balance_loss(second, of_second)), scope


def test_only_an_exact_balance_loss_of_several_micro_batches_costs_another_pass() -> None:
    free = ROUTER.model_copy(update={"balance_loss_coeff": 0.0})
    reductions = {
        (scope, parts): RouterObjective(of_scope(scope), ALONE).counts_first(parts)
        for scope in SCOPES
        for parts in (1, 2)
    }
    assert [case for case, counts in reductions.items() if counts] == [("global_batch", 2)]
    assert not RouterObjective(free, ALONE).counts_first(2)


# Micro-batches


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_accumulated_micro_batches_give_the_losses_and_the_gradient_of_the_whole_batch(rows: int) -> None:
    """Also when the batch is no multiple of them."""
    for experts in MODELS.values():
        whole, parts = stepper(experts), stepper(experts, micro_batch_rows=rows)
        of_whole, of_parts = accumulate(whole, batch()), accumulate(parts, batch())
        assert of_whole.keys() == of_parts.keys()
        assert all(abs(of_whole[name] - of_parts[name]) < 1e-12 for name in of_whole)
        assert_equal_gradients(gradients(whole), gradients(parts))


@pytest.mark.parametrize("scope", ["running", "micro_batch"])
def test_the_other_scopes_change_the_balance_loss_unless_the_micro_batches_are_alike(scope: str) -> None:
    alike = np.concatenate([batch(rows=ROWS // 2)] * 2)
    for rows, is_same in ((alike, True), (batch(), False)):
        whole, parts = stepper(4), stepper(4, of_scope(scope), micro_batch_rows=ROWS // 2)
        difference = accumulate(whole, rows)["train/balance_loss"] - accumulate(parts, rows)["train/balance_loss"]
        assert (abs(difference) < 1e-12) == is_same
        assert abs(difference) < 0.05


# Ranks. Each process of a pair runs this very file as a script.

CASES = [(name, "global_batch", rows) for name in MODELS for rows in (ROWS, 2, 3)]
CASES.append(("moe", "micro_batch", ROWS))


def case_name(model: str, scope: str, micro_batch_rows: int) -> str:
    return f"{model} {scope} {micro_batch_rows}"


def run_rank(rank: int, folder: Path) -> None:
    """Step once through every case with half of the batch and write what came out."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    rows = batch()[rank * ROWS // 2 : (rank + 1) * ROWS // 2]
    found: dict[str, Tensor] = {}
    for model, scope, micro_batch_rows in CASES:
        trained = stepper(MODELS[model], of_scope(scope), micro_batch_rows, Rank(rank, 2, rank))
        values = accumulate(trained, rows)
        case = case_name(model, scope, micro_batch_rows)
        found |= {f"{case} value {name}": torch.tensor(value, dtype=torch.float64) for name, value in values.items()}
        found |= {f"{case} gradient {name}": gradient.clone() for name, gradient in gradients(trained).items()}
    trained = stepper(MODELS["moe"], rank=Rank(rank, 2, rank), precision="bf16_master")
    accumulate(trained, rows)
    found |= {f"rounded gradient {name}": gradient.clone() for name, gradient in gradients(trained).items()}
    save_file(found, folder / f"rank-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, __file__, str(folder)]
    started = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate()[1] for process in started]  # of both, so that none is left
    assert [process.returncode for process in started] == [0, 0], errors
    return [load_file(folder / f"rank-{rank}.safetensors") for rank in range(2)]


def of_case(values: dict[str, Tensor], case: str, kind: str) -> dict[str, Tensor]:
    prefix = f"{case} {kind} "
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


@pytest.mark.process
def test_both_ranks_end_with_the_same_losses_and_gradients(two_ranks: list[dict[str, Tensor]]) -> None:
    first, second = two_ranks
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.process
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("rows", [ROWS, 2, 3])
def test_two_ranks_give_the_losses_and_gradients_of_one_rank_on_the_whole_batch(
    model: str, rows: int, two_ranks: list[dict[str, Tensor]]
) -> None:
    """However their halves are cut into micro-batches."""
    whole = stepper(MODELS[model])
    values = accumulate(whole, batch())
    case = case_name(model, "global_batch", rows)
    found = of_case(two_ranks[0], case, "value")
    assert found.keys() == values.keys()
    assert all(abs(found[name].item() - values[name]) < 1e-12 for name in values)
    assert_equal_gradients(gradients(whole), of_case(two_ranks[0], case, "gradient"))


@pytest.mark.process
def test_two_ranks_sum_the_gradients_of_rounded_parameters_in_float32(two_ranks: list[dict[str, Tensor]]) -> None:
    """So do two micro-batches of one rank: the halves are rounded, their mean is not."""
    alone = stepper(MODELS["moe"], micro_batch_rows=ROWS // 2, precision="bf16_master")
    accumulate(alone, batch())
    assert_equal_gradients(gradients(alone), of_case(two_ranks[0], "rounded", "gradient"), 1e-7)


@pytest.mark.process
def test_the_classic_scope_balances_each_rank_by_itself(two_ranks: list[dict[str, Tensor]]) -> None:
    halves = [accumulate(stepper(MODELS["moe"], of_scope("micro_batch")), half) for half in np.split(batch(), 2)]
    mean = sum(values["train/balance_loss"] for values in halves) / 2
    found = of_case(two_ranks[0], case_name("moe", "micro_batch", ROWS), "value")["train/balance_loss"].item()
    whole = accumulate(stepper(MODELS["moe"]), batch())["train/balance_loss"]
    assert abs(found - mean) < 1e-12 < abs(found - whole)


if __name__ == "__main__":
    run_rank(int(sys.argv[2]), Path(sys.argv[1]))
