"""What can be grown into what: the refusals that need no checkpoint."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth import rules

ROOT = Path(__file__).resolve().parents[1]


def model(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 32,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "qkv_bias": True,
        "tie_word_embeddings": False,
        "num_experts": 0,
        "num_experts_per_tok": 0,
    }
    return ModelConfig.model_validate(sizes | changes)


def growth(**changes: Any) -> GrowthConfig:
    plain = {"method": "fpi", "scope": "all", "norm": "exact", "maps": "circular", "noise": 0.0}
    return GrowthConfig.model_validate(plain | {"depth": "interpolate", "new_layers": "copy"} | changes)


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


def test_rules_and_methods_answer_without_torch() -> None:
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
