"""What can be grown into what: the refusals that need no checkpoint."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth import rules
from small_checkpoints import growth, model, upcycling

ROOT = Path(__file__).resolve().parents[2]


def experts(number: int = 4, chosen: int = 2, **changes: Any) -> ModelConfig:
    return model(num_experts=number, num_experts_per_tok=chosen, **changes)


@pytest.mark.parametrize(
    ("method", "changes", "sizes", "message"),
    [
        ("lemon", {}, {}, "growth: method lemon with norm exact and new_layers copy, .* set both, or method fpi"),
        ("hypercloning", {}, {"hidden_size": 12}, "hidden_size: target 12, source 8; .* use 8 or 16, or method fpi"),
        ("hypercloning", {}, {"intermediate_size": 13}, "intermediate_size: target 13, source 12; .* use 12 or 24"),
        (
            "fpi",
            {"depth": [0, 1]},
            {"num_hidden_layers": 3},
            "growth.depth: 2 layers in the list, num_hidden_layers is",
        ),
        ("fpi", {"depth": [0, 2]}, {}, "growth.depth: layer 2 in the list, the source has 2 layers; .* from 0 to 1"),
    ],
)
def test_what_a_method_or_a_list_of_layers_cannot_do_is_refused(
    method: str, changes: dict[str, Any], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rules.check(model(), model(**sizes), growth(method=method, **changes))


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ("stak", "'stak' is not a choice; did you mean 'stack'"),
        ([0, "1"], "is not a list of layers counted from 0"),
        ([0, -1], "is not a list of layers counted from 0"),
        (3, "3 is not a list of layers counted from 0"),
    ],
)
def test_a_depth_that_is_neither_a_rule_nor_a_list_is_one_problem(depth: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as error:
        growth(depth=depth)
    assert error.value.error_count() == 1


def test_rules_and_methods_need_no_torch() -> None:
    code = (
        "import sys\n"
        "from aquilamoe.config import plugins\n"
        "from aquilamoe.growth import rules\n"
        "for name in plugins.names('growth/methods'): plugins.load('growth/methods', name).keeps_function\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "platform", check=True)


def test_the_heads_that_a_refusal_proposes_are_accepted() -> None:
    rules.check(model(), model(num_attention_heads=12, num_key_value_heads=3), growth())
    rules.check(model(), model(num_attention_heads=10, num_key_value_heads=2), growth())


def test_what_is_not_a_size_of_the_function_may_change() -> None:
    target = model(max_position_embeddings=64, initializer_range=0.01)
    rules.check(model(), target, growth())
    assert rules.preserves(growth(), model(), target)


@pytest.mark.parametrize("changes", [{"router_init": "zero"}, {"router_std": 0.0}])
def test_a_router_without_opinion_cannot_keep_parts_together(changes: dict[str, Any]) -> None:
    rules.check(model(), experts(), upcycling(**changes))
    rules.check(model(), experts(4, 4, intermediate_size=6), upcycling(**changes))
    with pytest.raises(
        UserError, match=r"upcycling.router_init: .* 2 parts of a feed-forward are routed separately; use "
    ):
        rules.check(model(), experts(4, 2, intermediate_size=6), upcycling(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "noise"}, "method noise with noise 0.0; noise is > 0 for 'noise' and 0 for the others"),
        ({"noise": 0.1}, "method copy with noise 0.1; "),
        ({"method": "drop"}, "method drop with drop_ratio 0.0; "),
        ({"method": "noise", "noise": 0.1, "drop_ratio": 0.5}, "method noise with drop_ratio 0.5; drop_ratio is > 0"),
        ({"method": "drop", "drop_ratio": 1.5}, "less than or equal to 1"),
    ],
)
def test_amounts_belong_to_their_methods(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        upcycling(**changes)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (experts(6), "num_experts: target 6, source 4; .* use a multiple of 4, e.g. 8"),
        (experts(2), "num_experts: target 2, source 4; .* use a multiple of 4, e.g. 4"),
        (experts(8, 1), "num_experts_per_tok: target 1 is smaller than the source's 2; "),
        (
            experts(8, 4, intermediate_size=6),
            "intermediate_size: target 6, source 12; a scale-out of experts copies whole ones",
        ),
        (experts(8, mlp_only_layers=(1,)), "mlp_only_layers: target .1,., source ..; "),
        (experts(8, shared_expert_intermediate_size=12), "shared_expert_intermediate_size: target 12, source 0; "),
        (model(), "num_experts: target 0; "),
    ],
)
def test_experts_of_experts_that_cannot_be_made_are_refused(target: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rules.check(experts(), target, upcycling())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (experts(shared_expert_intermediate_size=10), "shared_expert_intermediate_size: target 10, .* use 12 or 0"),
        (
            experts(mlp_only_layers=(0,), intermediate_size=6, moe_intermediate_size=6),
            "intermediate_size: target 6, source 12; dense layers are copied, set moe_intermediate_size instead",
        ),
        (experts(moe_intermediate_size=5), "moe_intermediate_size: target 5, source 12; .* use 12 or a divisor"),
        (
            experts(6, 2, moe_intermediate_size=4),
            "num_experts_per_tok: 2 experts, .* 12 into 3 parts, .* multiple of 3",
        ),
    ],
)
def test_experts_of_a_dense_model_that_cannot_be_made_are_refused(target: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rules.check(model(), target, upcycling())


def test_a_norm_over_heads_forbids_longer_heads() -> None:
    source = model(qkv_bias=False, qk_norm="head")
    rules.check(source, model(qkv_bias=False, qk_norm="head", hidden_size=16), growth())
    with pytest.raises(UserError, match=r"head_dim: target 8, source 4; a norm over each head .* keep 4"):
        rules.check(source, model(qkv_bias=False, qk_norm="head", head_dim=8), growth())


@pytest.mark.parametrize(
    ("source", "target", "preserves"),
    [
        (model(), experts(), True),
        (model(), experts(norm_topk_prob=False), False),
        (model(), experts(4, 4, norm_topk_prob=False), True),
        (model(), experts(shared_expert_intermediate_size=12, mlp_only_layers=(0,)), True),
        (experts(norm_topk_prob=False), experts(8, 4, norm_topk_prob=False), True),
        (experts(norm_topk_prob=False), experts(8, 2, norm_topk_prob=False), False),
        (experts(4, 1, norm_topk_prob=False), experts(8, 1, norm_topk_prob=False), False),
        (experts(4, 1), experts(8, 1), True),
    ],
)
def test_an_upcycling_claims_the_function_by_how_shares_are_counted(
    source: ModelConfig, target: ModelConfig, preserves: bool
) -> None:
    rules.check(source, target, upcycling())
    assert rules.preserves(upcycling(), source, target) == preserves
