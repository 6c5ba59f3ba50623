"""Learning rates of matrices whose fan-in grew: a step changes what they compute as it did before the growth."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aquilamoe.config import graph
from aquilamoe.config.messages import UserError
from aquilamoe.model.transformer import Decoder
from aquilamoe.training import example, fan_in
from aquilamoe.training import optimizer as optimizers

SMALL = example.model(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1)


def test_rates_are_divided_by_how_often_the_inputs_of_a_matrix_grew() -> None:
    wide = Decoder(example.model())
    found = fan_in.scales(wide, SMALL)
    layer = "model.layers.0."
    expected = {"self_attn.q_proj.weight": 1 / 2, "self_attn.o_proj.weight": 1 / 2, "mlp.up_proj.weight": 1 / 2}
    assert {name: found[layer + name] for name in expected} == expected
    assert found[f"{layer}mlp.down_proj.weight"] == pytest.approx(1 / 3)
    assert found["lm_head.weight"] == 1 / 2
    matrices = {name for name, each in wide.named_parameters() if each.ndim > 1}
    assert set(found) == matrices - {"model.embed_tokens.weight"}


def test_more_experts_more_layers_and_smaller_experts_change_no_rate() -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 3}
    for neurons in (24, 12):
        assert fan_in.scales(Decoder(example.model(**sizes, moe_intermediate_size=neurons)), example.model()) == {}


def test_a_first_step_moves_a_grown_matrix_by_its_share_of_the_rate() -> None:
    model = Decoder(example.model())
    model.initialize(1)
    adamw = example.job(optimizer={"weight_decay": 0.0}).stage.optimizer
    optimizer = optimizers.build(model, adamw, 0.01, {}, fan_in.scales(model, SMALL))
    optimizers.set_learning_rate(optimizer, 0.02)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, share in (("lm_head.weight", 1 / 2), ("model.norm.weight", 1), ("model.embed_tokens.weight", 1)):
        moved = before[name] - model.get_parameter(name).detach()
        torch.testing.assert_close(moved, torch.full_like(moved, 0.02 * share), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("optimizer=muon",),
            "stages.dense.optimizer: learning_rate_scale fan_in is a rule of AdamW, name is muon",
        ),
        (
            ("stages.dense.optimizer.groups.new=1.3",),
            "stages.dense.optimizer: learning_rate_scale fan_in lowers learning rates after a growth, groups.new.",
        ),
    ],
)
def test_what_contradicts_it_is_one_line(
    compose: Callable[..., dict[str, Any]], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError) as raised:
        graph.parse(compose("stages.dense.optimizer.learning_rate_scale=fan_in", *words))
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)
