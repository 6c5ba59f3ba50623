"""Names and shapes of tensors on disk."""

import subprocess
import sys

import pytest

from aquilamoe.config.schema import ModelConfig
from aquilamoe.weights import names

KINDS = {"llama": (False, 0), "qwen2": (True, 0), "mixtral": (False, 4), "qwen2_moe": (True, 4)}


def tiny(kind: str, **changes: object) -> ModelConfig:
    """Every size differs from every other, so that no shape is right by accident."""
    qkv_bias, num_experts = KINDS[kind]
    values: dict[str, object] = {
        "vocab_size": 50,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "qkv_bias": qkv_bias,
        "tie_word_embeddings": False,
        "num_experts": num_experts,
        "num_experts_per_tok": 2 if num_experts else 0,
    }
    return ModelConfig.model_validate(values | changes)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shapes_sum_to_the_parameters_of_the_config(kind: str, tied: bool) -> None:
    config = tiny(kind, tie_word_embeddings=tied)
    shapes = names.tensor_shapes(config)
    fillers = {
        names.layer_name(config, layer, role)
        for layer in range(config.num_hidden_layers)
        for role in names.filler_roles(config)
    }
    assert fillers <= shapes.keys()
    sizes = {name: shape[0] * (shape[1] if len(shape) == 2 else 1) for name, shape in shapes.items()}
    assert sum(size for name, size in sizes.items() if name not in fillers) == config.num_params
    assert (names.HEAD in shapes) == (not tied)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_embedding_then_layers_then_norm_then_head(kind: str) -> None:
    config = tiny(kind)
    layers = [name for layer in range(3) for name in names.layer_names(config, layer).values()]
    assert list(names.tensor_shapes(config)) == [names.EMBEDDING, *layers, names.FINAL_NORM, names.HEAD]
    assert list(names.layer_names(config, 0)) == list(names.role_shapes(config))


def test_only_qwen2_moe_has_fillers() -> None:
    assert [kind for kind in KINDS if names.filler_roles(tiny(kind))] == ["qwen2_moe"]


def test_dense_names_are_the_roles_after_the_layer() -> None:
    layer = names.layer_names(tiny("qwen2"), 2)
    assert layer["self_attn.q_proj.bias"] == "model.layers.2.self_attn.q_proj.bias"
    assert all(name == f"model.layers.2.{role}" for role, name in layer.items())


def test_mixtral_spells_router_and_experts_its_own_way() -> None:
    layer = names.layer_names(tiny("mixtral"), 1)
    assert layer[names.ROUTER] == "model.layers.1.block_sparse_moe.gate.weight"
    assert [layer[names.expert_role(3, role)] for role in (names.GATE, names.UP, names.DOWN)] == [
        f"model.layers.1.block_sparse_moe.experts.3.{spelling}.weight" for spelling in ("w1", "w3", "w2")
    ]
    assert layer[names.Q_WEIGHT] == "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_all_copies_of_one_dense_tensor_are_neighbours(kind: str) -> None:
    roles = [role for role in names.role_shapes(tiny(kind)) if ".experts." in role]
    assert roles == [names.expert_role(i, role) for role in (names.GATE, names.UP, names.DOWN) for i in range(4)]


def test_the_architecture_follows_bias_and_experts() -> None:
    assert [names.architecture(tiny(kind)) for kind in KINDS] == [
        "LlamaForCausalLM",
        "Qwen2ForCausalLM",
        "MixtralForCausalLM",
        "Qwen2MoeForCausalLM",
    ]
    assert names.architecture(tiny("llama", num_attention_heads=10)) == "MistralForCausalLM"


def test_planning_with_names_does_not_import_torch() -> None:
    code = "import sys, aquilamoe.weights.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
