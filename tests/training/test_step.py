"""What a step does besides minimising: what routers are biased by and counted, and parameters that are rounded."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aquilamoe.config.schema import ModelConfig, RouterConfig
from aquilamoe.model.kernels.experts import count_rows
from aquilamoe.model.transformer import Decoder, MixtureOfExperts, Routing
from aquilamoe.training import example
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.expert_bias import ExpertBias
from aquilamoe.training.objective import RouterObjective
from aquilamoe.training.parallel import ParallelContext
from aquilamoe.training.router_load import RouterLoad
from aquilamoe.training.step import TrainStep

LENGTH, ROWS = 8, 4
CLUSTER = example.cluster()
ROUTER = RouterConfig(balance_loss_coeff=0.1, balance_scope="global_batch", z_loss_coeff=0.1)
Network = Callable[..., ModelConfig]


def stepper(config: ModelConfig, micro_batch_rows: int = ROWS, **changes: Any) -> TrainStep:
    """Everything that a step needs; `changes` are fields of the stage."""
    defaults: dict[str, Any] = {
        "total_tokens": 100 * ROWS * LENGTH,
        "batch_tokens": ROWS * LENGTH,
        "sequence_length": LENGTH,
        "learning_rate": 1e-2,
        "optimizer": {"max_grad_norm": 1e9},
        "router": {"balance_loss_coeff": 0.0, "z_loss_coeff": 0.0},
        "validation_tokens": LENGTH,
        "micro_batch_tokens": micro_batch_rows * LENGTH,
    }
    job = example.job(network=config, **defaults | changes)
    model = Decoder(config)
    model.initialize(7)
    return TrainStep(job, model, optimizers.build(model, job.stage.optimizer, 1e-2), ParallelContext(job.cluster))


def batch(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50, (ROWS, LENGTH + 1))


def routing(logits_ne: Tensor, k: int) -> Routing:
    experts_nk = logits_ne.topk(k, dim=-1).indices
    return Routing(logits_ne, experts_nk, count_rows(experts_nk, logits_ne.shape[1]))


# The selection bias


def test_a_bias_changes_which_experts_are_chosen_and_not_what_they_are_worth(network: Network) -> None:
    layer = MixtureOfExperts(network("mixtral"))
    logits_ne = torch.randn(20, 4)
    chosen_nk = layer._choose(logits_ne)[1]
    layer.selection_bias_e = torch.zeros(4)
    top_nk, same_nk = layer._choose(logits_ne)
    assert torch.equal(same_nk, chosen_nk) and torch.equal(top_nk, logits_ne.topk(2).values)
    layer.selection_bias_e = torch.tensor([0.0, 0.0, 1.0, 0.0])  # more than any probability
    top_nk, biased_nk = layer._choose(logits_ne)
    assert (biased_nk[:, 0] == 2).all()
    assert torch.equal(top_nk, logits_ne.gather(1, biased_nk))


def test_a_bias_moves_against_the_load_by_its_rate_in_each_layer(network: Network) -> None:
    model = Decoder(network("qwen3_moe"))
    bias = ExpertBias(model, 0.25)
    assert bias.bias_le.shape == (2, 4)  # of three layers the first is dense
    bias.update(torch.tensor([[4, 0, 2, 2], [1, 1, 1, 1]]))
    bias.update(torch.tensor([[3, 1, 2, 2], [0, 4, 0, 0]]))
    assert bias.bias_le.tolist() == [[-0.5, 0.5, 0, 0], [0.25, -0.25, 0.25, 0.25]]
    layers = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    assert [layer.selection_bias_e.tolist() for layer in layers if layer.selection_bias_e is not None] == (
        bias.bias_le.tolist()
    )


def test_a_bias_is_no_part_of_what_is_published(network: Network) -> None:
    model = Decoder(network("mixtral"))
    names = set(model.state_dict())
    bias = ExpertBias(model, 0.1)
    assert set(model.state_dict()) == names
    layer = next(module for module in model.modules() if isinstance(module, MixtureOfExperts))
    with pytest.raises(ZeroDivisionError), bias.off():
        assert layer.selection_bias_e is None
        raise ZeroDivisionError
    assert layer.selection_bias_e is not None


@pytest.mark.parametrize("scope", ["global_batch", "running", "micro_batch"])
@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_a_step_moves_the_bias_by_the_load_of_its_whole_batch(network: Network, scope: str, coefficient: float) -> None:
    router = {
        "balance_loss_coeff": coefficient,
        "balance_scope": scope,
        "z_loss_coeff": 0.0,
        "bias_update_rate": 0.01,
    }
    trained = stepper(network("mixtral"), micro_batch_rows=1, router=router)
    with torch.no_grad():
        routings = trained.model.route(torch.from_numpy(batch(1)[:, :-1]))
    counts_le = torch.stack([routing.counts_e for routing in routings]).float()
    trained.step(1, batch(1))
    assert trained.selection_bias is not None
    expected_le = 0.01 * (counts_le.mean(dim=1, keepdim=True) - counts_le).sign()
    assert torch.equal(trained.selection_bias.bias_le, expected_le)


# Load


def test_the_load_of_an_interval_is_that_of_all_its_passes() -> None:
    load = RouterLoad(2, 4, ParallelContext(CLUSTER))
    passes = [[routing(torch.randn(n, 4), 2) for _ in range(2)] for n in (5, 9)]
    for routings in passes:
        load.add(routings)
    means, table = load.read_and_reset()
    counts = [torch.stack([routings[layer].counts_e for routings in passes]).sum(0) for layer in range(2)]
    assert torch.allclose(torch.tensor(table["load"]), torch.stack([c / 28 for c in counts]), atol=1e-6)
    entropies = [
        torch.cat([torch.distributions.Categorical(logits=r[layer].logits_ne).entropy() for r in passes]).mean().item()
        for layer in range(2)
    ]
    assert table["entropy"] == pytest.approx(entropies, abs=2e-6) and table["dropped"] == [0, 0]
    assert means["router/entropy"] == pytest.approx(sum(entropies) / 2)
    assert means["router/load_max_over_mean"] == pytest.approx(sum(c.max().item() / 7 for c in counts) / 2)
    assert means["router/load_min_over_mean"] == pytest.approx(sum(c.min().item() / 7 for c in counts) / 2)
    assert load.is_empty and not load.sums_lc.any()


def test_a_router_that_does_not_care_has_the_entropy_of_all_experts() -> None:
    load = RouterLoad(1, 8, ParallelContext(CLUSTER))
    load.add([routing(torch.zeros(6, 8), 1)])
    means, _ = load.read_and_reset()
    assert means["router/entropy"] == pytest.approx(math.log(8))
    assert means["router/load_max_over_mean"] == 8 and means["router/load_min_over_mean"] == 0


def test_a_choice_that_no_expert_got_is_counted_as_dropped() -> None:
    load = RouterLoad(1, 4, ParallelContext(CLUSTER))
    routed = routing(torch.randn(6, 4), 2)
    load.add([replace(routed, counts_e=routed.counts_e - torch.tensor([0, 0, 3, 0]))])
    assert load.read_and_reset()[0]["router/dropped_tokens"] == 3


def test_routers_are_weighed_and_counted_without_a_value_that_the_host_could_wait_for() -> None:
    """Tensors on the meta device have none."""
    with torch.device("meta"):
        routings = [routing(torch.randn(6, 4), 2) for _ in range(2)]
        load = RouterLoad(2, 4, ParallelContext(CLUSTER))
        load.sums_lc = torch.zeros(2, 7)
    load.add(routings)
    objective = RouterObjective(ROUTER, ParallelContext(CLUSTER))
    objective.count([routings, routings])
    objective(routings)
    objective.load()


# Rounded parameters


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_with_rounded_parameters_moves_their_float32_originals(network: Network, name: str) -> None:
    """By the bf16 gradients of the rounded ones, and rounds the result again."""
    config, optimizer = network("mixtral"), {"max_grad_norm": 1e9, "name": name}
    trained = stepper(config, precision="bf16_master", optimizer=optimizer)
    twin = stepper(config, optimizer=optimizer)
    rounded = Decoder(config).to(torch.bfloat16)
    for step in (1, 2):
        rounded.load_state_dict(twin.model.state_dict())
        loss, _ = rounded(torch.from_numpy(batch(step)[:, :-1]), torch.from_numpy(batch(step)[:, 1:]))
        loss.backward()
        for parameter, source in zip(twin.model.parameters(), rounded.parameters(), strict=True):
            assert source.grad is not None and source.grad.dtype == torch.bfloat16
            parameter.grad, source.grad = source.grad.float(), None
        twin.optimizer.step()
        trained.step(step, batch(step))
    for key, parameter in trained.model.named_parameters():
        assert parameter.dtype == torch.float32
        torch.testing.assert_close(parameter, twin.model.get_parameter(key), rtol=0, atol=1e-6, msg=key)
    for parameter, copy in zip(trained.model.parameters(), trained.decoder.parameters(), strict=True):
        assert copy.dtype == torch.bfloat16 and torch.equal(parameter.bfloat16(), copy)


def test_what_bf16_would_round_away_is_not_lost_to_the_originals(network: Network) -> None:
    trained = stepper(network("llama"), precision="bf16_master", learning_rate=1e-6)
    before = trained.model.lm_head.weight.detach().clone()
    for step in range(1, 4):
        trained.step(step, batch(step))
    moved = (trained.model.lm_head.weight.detach() - before).abs()
    assert 1e-6 < moved.mean() < 4e-6
    assert (trained.decoder.lm_head.weight == before.bfloat16()).float().mean() > 0.9


def test_gradients_of_rounded_parameters_are_summed_in_float32(network: Network) -> None:
    config = network("llama")
    trained = stepper(config, micro_batch_rows=1, precision="bf16_master")
    router = RouterObjective(trained.job.stage.router, trained.group)
    trained.accumulate(batch(1), router)
    one_by_one = [stepper(config, precision="bf16_master") for _ in range(ROWS)]
    for each, row in zip(one_by_one, batch(1), strict=True):
        each.accumulate(row[None], router)
    for key, parameter in trained.model.named_parameters():
        parts = [each.model.get_parameter(key).grad for each in one_by_one]
        expected = torch.stack([part for part in parts if part is not None]).mean(dim=0)
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-7, msg=key)
