"""A scaled experiment is the same at another size: its ratios stay, and what cannot be divided is refused."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.config import graph
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.scaling import scaled
from aquilamoe.config.schema import PretrainStage

Compose = Callable[..., dict[str, Any]]
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@pytest.fixture
def nodes(compose: Compose) -> Callable[..., dict[str, Node]]:
    return lambda *overrides: graph.build(graph.parse(compose(*overrides)))


def model(nodes: Mapping[str, Node], stage: str) -> ModelConfig:
    found = nodes[stage].model
    assert found is not None
    return found


def growth(nodes: Mapping[str, Node], before: str, after: str) -> dict[str, float]:
    """By what factor each size grows."""
    small, large = model(nodes, before), model(nodes, after)
    return {field: getattr(large, field) / getattr(small, field) for field in (*SIZES, "head_dim")}


def trained(nodes: Mapping[str, Node]) -> dict[str, PretrainStage]:
    return {name: node.stage for name, node in nodes.items() if isinstance(node.stage, PretrainStage)}


def test_the_small_7b_is_the_7b_in_all_that_a_growth_is_about(nodes: Callable[..., dict[str, Node]]) -> None:
    large, small = nodes("+experiment=7b"), nodes("+experiment=7b_mini")
    assert set(large) == set(small)
    for name in ("prepare", "dense", "moe"):
        ours, papers = model(small, name), model(large, name)
        groups = [each.num_attention_heads // each.num_key_value_heads for each in (ours, papers)]
        assert groups[0] == groups[1] == (4 if name == "prepare" else 5)
        assert ours.hidden_size * 64 == papers.hidden_size
        assert (ours.num_experts, ours.num_experts_per_tok) == (papers.num_experts, papers.num_experts_per_tok)
    assert growth(small, "prepare", "scale_up") == growth(large, "prepare", "scale_up")
    assert growth(small, "prepare", "scale_up")["hidden_size"] == 1.25
    assert growth(small, "prepare", "scale_up")["num_hidden_layers"] == 1.25


def test_the_small_7b_has_the_7bs_shares_of_tokens_and_of_rates(nodes: Callable[..., dict[str, Node]]) -> None:
    large, small = trained(nodes("+experiment=7b")), trained(nodes("+experiment=7b_mini"))
    for name, stage in large.items():
        mini = small[name]
        assert mini.total_tokens == stage.total_tokens // 2_000_000 if stage.total_tokens else False
        assert mini.schedule.warmup_tokens == stage.schedule.warmup_tokens // 2_000_000
        assert mini.schedule.decay_tokens == stage.schedule.decay_tokens // 2_000_000
        assert (mini.batch_tokens, mini.sequence_length) == (stage.batch_tokens // 3072, stage.sequence_length // 32)
        assert mini.learning_rate == pytest.approx(2.5 * stage.learning_rate)
        assert (mini.optimizer, mini.router) == (stage.optimizer, stage.router)


def test_the_growths_of_the_1_8b_are_the_papers(nodes: Callable[..., dict[str, Node]]) -> None:
    found = nodes("+experiment=1_8b")
    shapes = {name: model(found, name) for name in ("prepare", "dense", "moe")}
    assert {n: (m.num_hidden_layers, m.hidden_size, m.num_experts) for n, m in shapes.items()} == {
        "prepare": (24, 2048, 0),
        "dense": (32, 4096, 0),
        "moe": (24, 2048, 8),
    }
    assert round(shapes["prepare"].num_params / 1e9, 1) == 1.8
    assert (shapes["prepare"].head_dim, shapes["dense"].head_dim) == (64, 128)
    tokens = {name: stage.total_tokens for name, stage in trained(found).items()}
    assert (tokens["prepare"], tokens["moe"]) == (3_600_000_000_000, 400_000_000_000)


@settings(derandomize=True, deadline=None)
@given(
    heads=st.integers(1, 6).map(lambda n: 2**n),
    groups=st.integers(1, 4).map(lambda n: 2**n),
    width=st.integers(0, 5).map(lambda n: 2**n),
)
def test_a_width_is_divided_once_whatever_falls_on_heads_and_what_on_their_channels(
    heads: int, groups: int, width: int
) -> None:
    before = {"hidden_size": 64 * heads, "num_attention_heads": heads * groups, "num_key_value_heads": groups}
    after = scaled({"model": {**before, "head_dim": 64}, "scale": {"width": width}})["model"]
    assert after["hidden_size"] == before["hidden_size"] // width
    assert after["num_attention_heads"] * after["head_dim"] * width == before["num_attention_heads"] * 64
    assert after["num_attention_heads"] // after["num_key_value_heads"] == heads
    assert after["num_key_value_heads"] >= min(2, groups)


def test_an_experiment_that_is_not_scaled_is_left_as_it_is(compose: Compose) -> None:
    values = compose()
    assert scaled(values) == {key: value for key, value in values.items() if key != "scale"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("scale.width=3",), "model.hidden_size: 64 is not divided by scale.width 3; choose a divisor of 64"),
        (
            ("scale.width=32", "model.head_dim=24"),
            "model.intermediate_size: 176 is not divided by scale.width 32; choose a divisor of 176",
        ),
        (("scale.layers=3",), "model.num_hidden_layers: 4 is not divided by scale.layers 3; choose a divisor of 4"),
        (("+scale.depth=2",), "scale.depth: unknown key; "),
        (("scale.tokens=0",), "scale.tokens: 0 is refused: "),
        (("scale=2",), "scale: 2 is refused: "),
        (
            ("+model.mlp_only_layers=[0]", "scale.layers=2"),
            "model.mlp_only_layers: names layers, which scale.layers would divide; set that to 1",
        ),
    ],
)
def test_what_cannot_be_divided_is_one_line(compose: Compose, words: tuple[str, ...], line: str) -> None:
    words = tuple(word.removeprefix("+") if "mlp_only" in word else word for word in words)
    with pytest.raises(UserError) as caught:
        graph.parse(compose(*words))
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)
