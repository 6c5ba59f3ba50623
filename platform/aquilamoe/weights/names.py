"""Names and shapes of the tensors of a checkpoint: the one place that knows how Hugging Face spells them.

Inside a layer a tensor is known by its role, e.g. `self_attn.q_proj.weight`: its name after `model.layers.N.`
in the spelling of Llama, Qwen2 and Qwen2-MoE. Only Mixtral spells its router and experts differently on disk.
"""

from aquilamoe.config.schema import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"

INPUT_NORM = "input_layernorm.weight"
POST_ATTENTION_NORM = "post_attention_layernorm.weight"
Q_WEIGHT, Q_BIAS = "self_attn.q_proj.weight", "self_attn.q_proj.bias"
K_WEIGHT, K_BIAS = "self_attn.k_proj.weight", "self_attn.k_proj.bias"
V_WEIGHT, V_BIAS = "self_attn.v_proj.weight", "self_attn.v_proj.bias"
O_WEIGHT = "self_attn.o_proj.weight"
GATE, UP, DOWN = "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"  # of a dense layer
ROUTER = "mlp.gate.weight"

# Qwen2-MoE, the MoE architecture with QKV bias that transformers and vLLM both open, always has a shared expert. Ours
# is all zeros: it adds nothing to the output, gets no gradient, and is no part of our model. Size 0 does not do:
# transformers then wants empty tensors in the file (and torch warns about them), for which vLLM has no place and stops.
# Size 1 would do, but not for tensor-parallel serving; 8 is the smallest size that 2, 4 and 8 devices can share.
SHARED_EXPERT_SIZE = 8

_MIXTRAL_PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def architecture(config: ModelConfig) -> str:
    """Name of the class in `transformers` that computes this model."""
    if config.is_moe:
        return "Qwen2MoeForCausalLM" if config.qkv_bias else "MixtralForCausalLM"
    if config.qkv_bias:
        return "Qwen2ForCausalLM"
    # The same network as Llama, but Llama's config class refuses heads that do not divide the hidden size.
    return "MistralForCausalLM" if config.hidden_size % config.num_attention_heads else "LlamaForCausalLM"


def expert_role(expert: int, role: str) -> str:
    """Role of `GATE`, `UP` or `DOWN` in an expert, e.g. `mlp.experts.3.up_proj.weight`."""
    assert role in (GATE, UP, DOWN), role
    return f"mlp.experts.{expert}.{role.removeprefix('mlp.')}"


def role_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one layer by role, in file order; every layer has the same.

    A dense layer has `GATE`, `UP`, `DOWN`; an MoE layer has `ROUTER`, then the gate of every expert, then every up,
    then every down, so that all copies of one dense tensor are neighbours. Fillers (see `filler_roles`) come last.
    """
    hidden, ffn = config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {INPUT_NORM: (hidden,)}
    for weight, bias, size in ((Q_WEIGHT, Q_BIAS, q), (K_WEIGHT, K_BIAS, kv), (V_WEIGHT, V_BIAS, kv)):
        shapes[weight] = (size, hidden)
        if config.qkv_bias:
            shapes[bias] = (size,)
    shapes |= {O_WEIGHT: (hidden, q), POST_ATTENTION_NORM: (hidden,)}
    feed_forward = {GATE: (ffn, hidden), UP: (ffn, hidden), DOWN: (hidden, ffn)}
    if not config.is_moe:
        return shapes | feed_forward
    shapes[ROUTER] = (config.num_experts, hidden)
    for role, shape in feed_forward.items():
        shapes |= {expert_role(expert, role): shape for expert in range(config.num_experts)}
    return shapes | _filler_shapes(config)


def filler_roles(config: ModelConfig) -> list[str]:
    """Roles that the format demands and the model does not have: a writer fills them with zeros. Mostly none."""
    return list(_filler_shapes(config))


def _filler_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if architecture(config) != "Qwen2MoeForCausalLM":
        return {}
    hidden, size = config.hidden_size, SHARED_EXPERT_SIZE
    return {
        "mlp.shared_expert.gate_proj.weight": (size, hidden),
        "mlp.shared_expert.up_proj.weight": (size, hidden),
        "mlp.shared_expert.down_proj.weight": (hidden, size),
        "mlp.shared_expert_gate.weight": (1, hidden),
    }


def layer_name(config: ModelConfig, layer: int, role: str) -> str:
    """On-disk name of a role in a layer, e.g. `model.layers.3.self_attn.q_proj.weight`."""
    if architecture(config) == "MixtralForCausalLM" and role.startswith("mlp."):
        role = role.replace("mlp.", "block_sparse_moe.", 1)
        for ours, mixtral in _MIXTRAL_PROJECTIONS.items():
            role = role.replace(f".{ours}.", f".{mixtral}.")
    return f"model.layers.{layer}.{role}"


def layer_names(config: ModelConfig, layer: int) -> dict[str, str]:
    """On-disk names of one layer by role, in file order."""
    return {role: layer_name(config, layer, role) for role in role_shapes(config)}


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside the layers: embedding, final norm, and the head unless it is tied."""
    vocabulary = (config.vocab_size, config.hidden_size)
    head = {} if config.tie_word_embeddings else {HEAD: vocabulary}
    return {EMBEDDING: vocabulary, FINAL_NORM: (config.hidden_size,), **head}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a checkpoint by on-disk name, in file order: embedding, layers, final norm, head."""
    outer, roles = outer_shapes(config), role_shapes(config)
    shapes = {EMBEDDING: outer.pop(EMBEDDING)}
    for layer in range(config.num_hidden_layers):
        shapes |= {layer_name(config, layer, role): shape for role, shape in roles.items()}
    return shapes | outer
