"""Names and shapes of tensors on disk."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from aquilamoe.checkpoint import tensor_names
from aquilamoe.config.schema import ModelConfig

Network = Callable[..., ModelConfig]


@pytest.mark.parametrize("tied", [False, True])
def test_the_shapes_sum_to_the_parameters_of_the_config(kind: str, tied: bool, network: Network) -> None:
    config = network(kind, tie_word_embeddings=tied)
    shapes = tensor_names.tensor_shapes(config)
    fillers = {
        tensor_names.layer_name(config, layer, role)
        for layer in range(config.num_hidden_layers)
        for role in tensor_names.filler_roles(config)
    }
    assert fillers <= shapes.keys()
    sizes = {name: shape[0] * (shape[1] if len(shape) == 2 else 1) for name, shape in shapes.items()}
    assert sum(size for name, size in sizes.items() if name not in fillers) == config.num_params
    assert (tensor_names.HEAD in shapes) == (not tied)


def test_a_file_is_embedding_then_layers_then_norm_then_head(kind: str, network: Network) -> None:
    config = network(kind)
    layers = [name for layer in range(3) for name in tensor_names.layer_names(config, layer).values()]
    assert list(tensor_names.tensor_shapes(config)) == [
        tensor_names.EMBEDDING,
        *layers,
        tensor_names.FINAL_NORM,
        tensor_names.HEAD,
    ]
    assert list(tensor_names.layer_names(config, 0)) == list(tensor_names.role_shapes(config, 0))


def test_only_a_qwen2_moe_without_a_shared_expert_has_fillers(kind: str, network: Network) -> None:
    assert bool(tensor_names.filler_roles(network(kind))) == (kind == "qwen2_moe")


def test_experts_and_router_are_in_the_sparse_layers_alone(network: Network) -> None:
    config = network("qwen3_moe")
    assert [tensor_names.ROUTER in tensor_names.role_shapes(config, layer) for layer in range(3)] == [False, True, True]
    assert tensor_names.role_shapes(config, 0)[tensor_names.UP] == (40, 24)
    assert tensor_names.role_shapes(config, 1)[tensor_names.expert_role(3, tensor_names.UP)] == (16, 24)


def test_a_norm_of_queries_and_keys_is_as_long_as_a_head_or_as_all_of_them(network: Network) -> None:
    for kind, sizes in (("qwen3", (8, 8)), ("olmoe", (24, 12))):
        shapes = tensor_names.role_shapes(network(kind), 0)
        assert (shapes[tensor_names.Q_NORM], shapes[tensor_names.K_NORM]) == ((sizes[0],), (sizes[1],))


def test_dense_names_are_the_roles_after_the_layer(network: Network) -> None:
    layer = tensor_names.layer_names(network("qwen2"), 2)
    assert layer["self_attn.q_proj.bias"] == "model.layers.2.self_attn.q_proj.bias"
    assert all(name == f"model.layers.2.{role}" for role, name in layer.items())


def test_mixtral_spells_router_and_experts_its_own_way(network: Network) -> None:
    layer = tensor_names.layer_names(network("mixtral"), 1)
    assert layer[tensor_names.ROUTER] == "model.layers.1.block_sparse_moe.gate.weight"
    assert [
        layer[tensor_names.expert_role(3, role)] for role in (tensor_names.GATE, tensor_names.UP, tensor_names.DOWN)
    ] == [f"model.layers.1.block_sparse_moe.experts.3.{spelling}.weight" for spelling in ("w1", "w3", "w2")]
    assert layer[tensor_names.Q_WEIGHT] == "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_all_copies_of_one_dense_tensor_are_neighbours(kind: str, network: Network) -> None:
    roles = [role for role in tensor_names.role_shapes(network(kind), 1) if ".experts." in role]
    assert roles == [
        tensor_names.expert_role(i, role)
        for role in (tensor_names.GATE, tensor_names.UP, tensor_names.DOWN)
        for i in range(4)
    ]


def test_the_architecture_follows_what_only_it_has(kind: str, network: Network) -> None:
    expected = kind.partition(" ")[0].replace("_", "") + "forcausallm"
    assert tensor_names.architecture(network(kind)).lower() == expected


def test_planning_with_names_does_not_import_torch() -> None:
    code = "import sys, aquilamoe.checkpoint.tensor_names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
