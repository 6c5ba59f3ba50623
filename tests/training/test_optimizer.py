"""Which parameters AdamW decays, and that a step is the one that its configuration describes."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.optim import Optimizer

from aquilamoe.config.messages import first_problem
from aquilamoe.config.schema import ModelConfig, OptimizerConfig
from aquilamoe.model.transformer import Decoder
from aquilamoe.training import optimizer as optimizers

ADAMW = OptimizerConfig(name="adamw", momentum=0.95, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1, max_grad_norm=1.0)
LEARNING_RATE = 0.01


def adamw_of(model: Decoder) -> torch.optim.Optimizer:
    optimizer = optimizers.build(model, ADAMW, LEARNING_RATE)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def decoder(experts: int = 0, tied: bool = False) -> Decoder:
    model = Decoder(
        ModelConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            max_position_embeddings=32,
            rope_theta=1e4,
            rms_norm_eps=1e-5,
            initializer_range=0.2,
            qkv_bias=True,
            tie_word_embeddings=tied,
            num_experts=experts,
            num_experts_per_tok=2 if experts else 0,
            moe_intermediate_size=24 if experts else 0,
        )
    )
    model.initialize(3)
    return model


def decays(model: Decoder, optimizer: Optimizer) -> dict[str, float]:
    """The weight decay of every parameter by name; each is in one group exactly."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = [(names[p], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


@pytest.mark.parametrize(("experts", "tied"), [(0, False), (0, True), (4, False)])
def test_exactly_the_matrices_are_decayed(experts: int, tied: bool) -> None:
    model = decoder(experts, tied)
    decayed = {name for name, decay in decays(model, adamw_of(model)).items() if decay}
    assert decayed == {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    spared = {name for name, _ in model.named_parameters()} - decayed
    assert all(name.endswith((".bias", "norm.weight")) for name in spared)
    assert len(spared) == 2 * (2 + 3) + 1  # of each layer two norms and three biases, and the final norm


def test_stacked_experts_the_router_the_embedding_and_the_head_are_decayed() -> None:
    model = decoder(experts=4)
    found = decays(model, adamw_of(model))
    for name in ("mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.down_proj", "mlp.gate.weight"):
        assert found[f"model.layers.1.{name}"] == 0.1
    assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == 0.1


def test_a_step_without_gradients_of_the_loss_shrinks_the_matrices_and_leaves_gains_and_biases() -> None:
    model = decoder(experts=4)
    optimizer = optimizers.build(model, ADAMW, LEARNING_RATE)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - LEARNING_RATE * 0.1 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_a_step_is_adamw_written_out() -> None:
    model = decoder().double()
    optimizer = optimizers.build(model, ADAMW, LEARNING_RATE)
    parameter = model.lm_head.weight
    expected, m, v = parameter.detach().clone(), torch.zeros_like(parameter), torch.zeros_like(parameter)
    for step, scale in enumerate((1.0, -0.5, 0.1), start=1):
        gradient = scale * torch.linspace(-1, 1, parameter.numel(), dtype=torch.float64).view_as(parameter)
        parameter.grad = gradient.clone()
        optimizers.set_learning_rate(optimizer, LEARNING_RATE / step)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        corrected = (v / (1 - 0.9**step)).sqrt() + 1e-7
        rate = LEARNING_RATE / step
        expected = expected * (1 - rate * 0.1) - rate * (m / (1 - 0.8**step)) / corrected
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-12)


MUON = ADAMW.model_copy(update={"name": "muon", "momentum": 0.9})


def give_gradients(model: Decoder, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("experts", [0, 4])
def test_muon_moves_hidden_matrices_and_experts_one_by_one_and_adamw_the_rest(experts: int) -> None:
    model, twin = decoder(experts), decoder(experts)
    optimizer, adamw = optimizers.build(model, MUON, LEARNING_RATE), optimizers.build(twin, ADAMW, LEARNING_RATE)
    alone = {
        (name, index): torch.nn.Parameter(matrix.clone())
        for name, parameter in model.named_parameters()
        if name.startswith("model.layers.") and "norm" not in name and "mlp.gate.weight" not in name
        for index, matrix in enumerate(parameter.detach()[None] if parameter.ndim == 2 else parameter.detach())
        if parameter.ndim > 1
    }
    muon = torch.optim.Muon(
        alone.values(), lr=LEARNING_RATE, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(twin, seed)
        gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
        for (name, index), matrix in alone.items():
            gradient = gradients[name]
            assert gradient is not None
            matrix.grad = gradient.clone() if gradient.ndim == 2 else gradient[index].clone()
        for each in (optimizer, adamw, muon):
            each.step()
            each.zero_grad(set_to_none=True)
    assert all(parameter.grad is None for parameter in model.parameters())
    others = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        found = parameter.detach()
        if (name, 0) in alone:
            matrices = [matrix.detach() for (other, _), matrix in alone.items() if other == name]
            assert torch.equal(found, matrices[0] if found.ndim == 2 else torch.stack(matrices)), name
        else:
            assert torch.equal(found, others[name].detach()), name
    assert len(alone) == 2 * (4 + 3 * max(1, experts))


def test_the_scores_of_experts_and_of_tokens_are_not_orthogonalised() -> None:
    model = decoder(experts=4)
    optimizer = optimizers.MuonAndAdamW(model, MUON, LEARNING_RATE)
    by_muon = {name for name, parameter in model.named_parameters() if parameter in optimizer.matrices}
    assert not any("mlp.gate." in name or "embed" in name or "lm_head" in name for name in by_muon)
    assert "model.layers.0.mlp.experts.up_proj" in by_muon


def test_muon_is_given_the_learning_rate_and_its_groups_are_decayed_as_adamws() -> None:
    model = decoder(experts=4)
    optimizer = optimizers.build(model, MUON, LEARNING_RATE)
    optimizers.set_learning_rate(optimizer, 0.125)
    assert {group["lr"] for group in optimizer.param_groups} == {0.125}
    vectors = {id(parameter) for parameter in model.parameters() if parameter.ndim < 2}
    for group in optimizer.param_groups:
        assert all((id(parameter) in vectors) == (group["weight_decay"] == 0) for parameter in group["params"])


def test_the_learning_rate_is_set_for_both_groups() -> None:
    optimizer = optimizers.build(decoder(), ADAMW, LEARNING_RATE)
    optimizers.set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
    assert math.isclose(optimizer.param_groups[0]["betas"][1], 0.9)


# Roles


def test_every_parameter_of_every_architecture_has_the_role_of_its_place(
    network: Callable[..., ModelConfig], kind: str
) -> None:
    found: dict[str, set[str]] = {}
    for name, _ in Decoder(network(kind)).named_parameters():
        found.setdefault(optimizers.role_of(name), set()).add(re.sub(r"model\.layers\.\d+\.", "", name))
    assert found.pop("embedding") == {"model.embed_tokens.weight"} and found.pop("head") == {"lm_head.weight"}
    assert all("norm" in name for name in found["norm"]) and {"model.norm.weight"} <= found.pop("norm")
    assert all(re.fullmatch(r"self_attn\.[qkvo]_proj\.(weight|bias)", name) for name in found.pop("attention"))
    is_moe, has_dense = "moe" in kind or kind == "mixtral", kind not in ("mixtral", "qwen2_moe", "olmoe")
    projections = {"gate_proj", "up_proj", "down_proj"}
    if is_moe or kind == "olmoe":
        assert found.pop("expert") == {f"mlp.experts.{name}" for name in projections}
        assert {"mlp.gate.weight"} <= found.pop("router") <= {"mlp.gate.weight", "mlp.shared_expert_gate.weight"}
    if has_dense:
        assert {name.split(".")[-2] for name in found.pop("feed_forward")} == projections
    assert not found


ROLES = {
    "router": {"learning_rate_ratio": 0.1, "weight_decay": 0.0},
    "embedding": {"weight_decay": 0.3},
    "expert": {"learning_rate_ratio": 2.0},
    "norm": {"learning_rate_ratio": 0.5},
}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_role_has_its_own_rate_and_decay_and_no_role_decays_a_vector(name: str) -> None:
    config = OptimizerConfig.model_validate(ADAMW.model_dump() | {"name": name, "roles": ROLES})
    model = decoder(experts=4)
    optimizer = optimizers.build(model, config, 1.0)
    optimizers.set_learning_rate(optimizer, 0.5)
    groups = {id(tensor): group for group in optimizer.param_groups for tensor in group["params"]}
    for key, parameter in model.named_parameters():
        role = ROLES.get(optimizers.role_of(key), {})
        matrices = optimizer.matrices if isinstance(optimizer, optimizers.MuonAndAdamW) else {}
        assert bool(matrices) == (name == "muon")
        parts = matrices.get(parameter, [parameter])
        for part in parts:
            group = groups.pop(id(part))
            assert group["lr"] == 0.5 * role.get("learning_rate_ratio", 1.0), key
            assert group["weight_decay"] == (role.get("weight_decay", 0.1) if parameter.ndim > 1 else 0.0), key
    assert not groups


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_role_learns_at_its_own_rate(name: str) -> None:
    """Half of the rate is half of the way, for one step."""
    halved = {"router": {"learning_rate_ratio": 0.5}, "attention": {"learning_rate_ratio": 0.5}}
    way: list[dict[str, torch.Tensor]] = []
    for roles in ({}, halved):
        model = decoder(experts=4)
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        optimizer = optimizers.build(
            model, OptimizerConfig.model_validate(ADAMW.model_dump() | {"name": name, "roles": roles}), LEARNING_RATE
        )
        give_gradients(model, 1)
        optimizer.step()
        way.append({key: parameter.detach() - before[key] for key, parameter in model.named_parameters()})
    for key, whole in way[0].items():
        share = 0.5 if optimizers.role_of(key) in halved else 1.0
        torch.testing.assert_close(way[1][key], whole * share, rtol=1e-3, atol=1e-7, msg=key)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ({"experts": {}}, r"roles\.experts: 'experts' is not a choice; did you mean 'expert'\? \(valid: .*\)"),
        ({"norm": {"weight_decay": 0.1}}, r".*roles\.norm\.weight_decay 0\.1, but only matrices are decayed, .*"),
        ({"head": {"learning_rate_ratio": 0}}, r"roles\.head\.learning_rate_ratio: 0 is refused: .*"),
    ],
)
def test_a_role_that_is_none_or_requires_what_is_none_is_one_line(roles: dict[str, Any], message: str) -> None:
    values = ADAMW.model_dump() | {"roles": roles}
    with pytest.raises(ValidationError) as raised:
        OptimizerConfig.model_validate(values)
    assert re.fullmatch(message, str(first_problem(raised.value, OptimizerConfig, values)))
