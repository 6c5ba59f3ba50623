from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.config import graph
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ExperimentConfig, ModelConfig

Compose = Callable[..., dict[str, Any]]
RAMPS = ("schedule.warmup_tokens=900_000_000", "schedule.decay_tokens=7")


@pytest.fixture
def experiment(compose: Compose) -> Callable[..., ExperimentConfig]:
    return lambda *overrides: graph.parse(compose(*overrides))


@pytest.fixture
def refusal(experiment: Callable[..., ExperimentConfig]) -> Callable[..., str]:
    def refused(*overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            experiment(*overrides)
        return str(caught.value)

    return refused


@pytest.fixture
def paper(compose: Compose) -> dict[str, Node]:
    return graph.build(graph.parse(compose("+experiment=7b")))


@pytest.mark.parametrize(
    ("stage", "total", "active"),
    [("prepare", 8.224, 8.224), ("scale_up", 16.655, 16.655), ("scale_out", 104.737, 29.240)],
)
def test_the_papers_models_have_the_papers_billions_of_parameters(
    paper: dict[str, Node], stage: str, total: float, active: float
) -> None:
    model = paper[stage].model
    assert model is not None
    assert (round(model.num_params / 1e9, 3), round(model.num_active_params / 1e9, 3)) == (total, active)


def test_the_papers_stages_have_the_papers_tokens(paper: dict[str, Node]) -> None:
    tokens = {name: node.tokens / 1e9 for name, node in paper.items() if node.tokens}
    assert tokens == {
        "prepare": pytest.approx(3600, rel=1e-4),
        "dense": pytest.approx(1200, rel=1e-4),
        "moe": pytest.approx(545, rel=1e-4),
    }


@settings(derandomize=True, deadline=None)
@given(
    hidden=st.integers(1, 8).map(lambda n: n * 32),
    layers=st.integers(1, 6),
    groups=st.integers(1, 3),
    heads_each=st.integers(1, 3),
    experts=st.sampled_from([0, 2, 8]),
    tied=st.booleans(),
    bias=st.booleans(),
)
def test_parameters_are_the_elements_of_the_tensors(
    hidden: int, layers: int, groups: int, heads_each: int, experts: int, tied: bool, bias: bool
) -> None:
    from aquilamoe.checkpoint.tensor_names import tensor_shapes

    values = {
        "vocab_size": 300,
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": groups * heads_each,
        "num_key_value_heads": groups,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "qkv_bias": bias,
        "tie_word_embeddings": tied,
        "num_experts": experts,
        "num_experts_per_tok": 2 if experts else 0,
    }
    config = ModelConfig.model_validate(values)
    one_expert = [
        elements(shape) for name, shape in tensor_shapes(config).items() if ".experts.0." in name
    ]  # gate, up and down of every layer
    # The file of an MoE with QKV bias may hold a zero shared expert that its format requires: it is not a parameter.
    own = {name: shape for name, shape in tensor_shapes(config).items() if "shared_expert" not in name}
    assert config.num_params == sum(map(elements, own.values()))
    assert config.num_params - config.num_active_params == sum(one_expert) * max(0, experts - 2)


def elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def test_flops_count_the_tokens_that_an_expert_meets_not_the_experts(paper: dict[str, Node]) -> None:
    dense, moe = paper["scale_up"].model, paper["scale_out"].model
    assert dense is not None
    assert moe is not None
    ffn, router = 3 * moe.hidden_size * moe.intermediate_size, moe.hidden_size * moe.num_experts
    assert moe.flops_per_token(4096) - dense.flops_per_token(4096) == 6 * moe.num_hidden_layers * (ffn + router)


def test_a_null_head_dim_is_the_hidden_size_over_the_heads(experiment: Callable[..., ExperimentConfig]) -> None:
    assert experiment("model.head_dim=null", "model.hidden_size=64", "model.num_attention_heads=8").model.head_dim == 8


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["model.hidden_size=64", "model.num_attention_heads=5"],
            "model: hidden_size 64 is not a multiple of num_attention_heads 5; set head_dim, or choose 5 heads for a "
            "hidden size of 60",
        ),
        (
            ["model.num_attention_heads=4", "model.num_key_value_heads=3"],
            "model: num_attention_heads 4 is not a multiple of num_key_value_heads 3; choose num_key_value_heads from "
            "[1, 2, 4]",
        ),
        (
            ["model.head_dim=15"],
            "model: head_dim 15 is odd, rotary embeddings need pairs; choose an even head_dim",
        ),
        (
            ["model.num_experts=1", "model.num_experts_per_tok=1"],
            "model: num_experts 1 is a dense model with a router; use 0 for dense, or at least 2",
        ),
        (
            ["model.num_experts=4", "model.num_experts_per_tok=5"],
            "model: num_experts_per_tok 5 is not between 1 and num_experts 4",
        ),
        (
            ["model.num_experts_per_tok=2"],
            "model: num_experts_per_tok 2 without experts; set num_experts, or both to 0",
        ),
        (
            ["growth.method=akipro"],
            "growth.method: 'akipro' is not in growth/methods; did you mean 'aki_pro'? (valid: ",
        ),
        (
            ["upcycling=copy", "upcycling.noise=0.1"],
            "upcycling: method copy with noise 0.1; noise is > 0 for 'noise' and 0 for ",
        ),
        (
            ["stages.prepare.batch_tokens=4096", "stages.prepare.total_tokens=4095"],
            "stages.prepare: total_tokens 4095 is smaller than one batch (batch_tokens 4096); raise total_tokens or "
            "lower batch_tokens",
        ),
        (
            ["stages.prepare.sequence_length=128", "stages.prepare.batch_tokens=1000"],
            "stages.prepare: batch_tokens 1000 is not a multiple of sequence_length 128; choose e.g. 896",
        ),
        (
            [f"stages.dense.{word}" for word in ("total_tokens=614400", *RAMPS)],
            "stages.dense: warmup_tokens + decay_tokens = 900000007 exceed total_tokens 614400; shorten the schedule",
        ),
        (
            [f"stages.control.{word}" for word in RAMPS],
            "stages.control: warmup_tokens + decay_tokens = 900000007 exceed total_tokens ",
        ),
        (
            ["stages.prepare.total_tokens=null"],
            "stages.prepare: set one of total_tokens (tokens) and equal_flops (a stage name), and null the other",
        ),
        (
            ["stages.prepare.model=null"],
            "stages.prepare: set either model (train from scratch) or inputs.source (continue a checkpoint)",
        ),
        (
            ["+stages.prepare.inputs.source=moe"],
            "stages.prepare: set either model (train from scratch) or inputs.source (continue a checkpoint)",
        ),
        (
            ["cluster.shard_size=4"],
            "cluster: parallel ddp with shard_size 4; ",
        ),
        (
            ["cluster.parallel=hsdp"],
            "cluster: parallel hsdp with shard_size None; ",
        ),
        (
            ["cluster.parallel=hsdp", "cluster.shard_size=4", "cluster.workers=6"],
            "cluster: 6 workers are no multiple of shard_size 4; ",
        ),
        (
            ["cluster.workers=2", "cluster.expert_parallel=2"],
            "cluster: expert_parallel 2 with parallel ddp",
        ),
        (
            ["cluster.workers=2", "cluster.parallel=fsdp", "cluster.expert_parallel=4"],
            "cluster: 2 workers that share one copy ",
        ),
    ],
)
def test_what_cannot_be_built_or_trained_is_refused_with_both_values_and_a_remedy(
    compose: Compose, words: list[str], line: str
) -> None:
    with pytest.raises(UserError) as caught:
        graph.build(graph.parse(compose(*words)))
    assert str(caught.value).startswith(line)


def test_configuration_cannot_be_changed_once_it_is_validated(experiment: Callable[..., ExperimentConfig]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        experiment().model.hidden_size = 3


@pytest.mark.parametrize("name", ["a/b", "", "..", "-x", "a b"])
def test_a_name_that_cannot_be_a_file_name_is_refused(refusal: Callable[..., str], name: str) -> None:
    assert refusal(f"name='{name}'").startswith(f"name: '{name}' is refused: ")


@pytest.mark.parametrize("value", ["true", "false"])
@pytest.mark.parametrize("key", ["seed", "stages.prepare.learning_rate", "growth.noise", "optimizer.max_grad_norm"])
def test_true_and_false_are_not_numbers(refusal: Callable[..., str], key: str, value: str) -> None:
    assert refusal(f"{key}={value}").startswith(f"{key}: {value} is not a number; give it one")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_not_a_number(refusal: Callable[..., str], value: str) -> None:
    assert refusal(f"stages.prepare.learning_rate={value}").startswith("stages.prepare.learning_rate: ")


@pytest.mark.parametrize(
    ("word", "stages"),
    [
        ("optimizer.weight_decay=0.25", ["prepare", "dense", "moe", "control"]),
        ("schedule.min_lr_ratio=0.25", ["prepare", "dense", "moe", "control"]),
        ("growth.noise=0.25", ["scale_up"]),
        ("upcycling.router_std=0.25", ["scale_out"]),
    ],
)
def test_a_key_of_a_group_reaches_every_stage_that_uses_the_group(
    experiment: Callable[..., ExperimentConfig], word: str, stages: list[str]
) -> None:
    group, key = word.partition("=")[0].split(".")
    values = experiment(word).model_dump()
    assert [name for name, stage in values["stages"].items() if group in stage] == stages
    assert [values["stages"][name][group][key] for name in stages] == [0.25] * len(stages)


@pytest.mark.parametrize(
    "path",
    [
        "stages.prepare.schedule.min_lr_ratio",
        "stages.prepare.optimizer.weight_decay",
        "stages.scale_up.growth.noise",
        "stages.scale_out.upcycling.router_std",
    ],
)
def test_one_stage_can_differ_from_the_group_that_it_uses(
    experiment: Callable[..., ExperimentConfig], path: str
) -> None:
    _, stage, group, key = path.split(".")
    values = experiment(f"{path}=0.25").model_dump()
    assert values["stages"][stage][group][key] == 0.25
    assert values[group][key] != 0.25
