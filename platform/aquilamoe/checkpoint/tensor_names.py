"""Names and shapes of the tensors of a checkpoint: the one place for how Hugging Face spells them.

Inside a layer a tensor is known by its role, e.g. `self_attn.q_proj.weight`: its name after `model.layers.N.`
in the spelling of Llama, Qwen2 and Qwen2-MoE. `families` has what others call it on disk.
"""

from aquilamoe.checkpoint.families import registry
from aquilamoe.checkpoint.sharding import Joined
from aquilamoe.config.network import ABSENT_SHARED_EXPERT_SIZE
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
Q_NORM, K_NORM = "self_attn.q_norm.weight", "self_attn.k_norm.weight"
# Of norms that add one.
FINAL_NORM_BIAS = "model.norm.bias"
INPUT_NORM_BIAS, POST_ATTENTION_NORM_BIAS = "input_layernorm.bias", "post_attention_layernorm.bias"
# Of a dense layer.
GATE = "mlp.gate_proj.weight"
UP = "mlp.up_proj.weight"
DOWN = "mlp.down_proj.weight"
ROUTER = "mlp.gate.weight"

# A shared expert and the row that scores it.
SHARED_GATE, SHARED_UP = "mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"
SHARED_DOWN, SHARED_ROUTER = "mlp.shared_expert.down_proj.weight", "mlp.shared_expert_gate.weight"

# Of every expert, its number left out.
EXPERT_GATE, EXPERT_UP = "mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight"
EXPERT_DOWN = "mlp.experts.down_proj.weight"

_WRITERS = (O_WEIGHT, DOWN, EXPERT_DOWN, SHARED_DOWN)


def architecture(config: ModelConfig) -> str:
    """Name of the class in `transformers` that computes this model."""
    return registry.of(config).architecture


def expert_role(expert: int, role: str) -> str:
    """Role of `GATE`, `UP` or `DOWN` in an expert, e.g. `mlp.experts.3.up_proj.weight`."""
    assert role in (GATE, UP, DOWN), role
    return f"mlp.experts.{expert}.{role.removeprefix('mlp.')}"


def general(role: str) -> str:
    """A role without the number of its expert: `mlp.experts.3.up_proj.weight` is `EXPERT_UP`."""
    if not role.startswith("mlp.experts."):
        return role
    number, _, projection = role.removeprefix("mlp.experts.").partition(".")
    return f"mlp.experts.{projection}" if number.isdigit() else role


def dense_role(role: str) -> str:
    """The role in a dense feed-forward of what an expert has: `mlp.experts.3.up_proj.weight` is `UP`."""
    projection = general(role).rpartition("expert.")[2].rpartition("experts.")[2]
    return f"mlp.{projection}" if general(role) != role or ".shared_expert." in role else role


def writes_residual(role: str) -> bool:
    """Whether the rows of a matrix are what a layer adds to the residual stream."""
    return general(role) in _WRITERS


def role_shapes(config: ModelConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of one layer by role, in file order.

    A dense layer has `GATE`, `UP`, `DOWN`; a sparse layer has `ROUTER`, then the gate of every expert, then every up,
    then every down, so that all copies of one dense tensor are neighbours, then the shared expert, if there is one.
    Fillers (see `filler_roles`) come last.
    """
    hidden = config.hidden_size
    q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {INPUT_NORM: (hidden,)}
    if config.has_layer_norm:
        shapes[INPUT_NORM_BIAS] = (hidden,)
    for weight, bias, size in ((Q_WEIGHT, Q_BIAS, q), (K_WEIGHT, K_BIAS, kv), (V_WEIGHT, V_BIAS, kv)):
        shapes[weight] = (size, hidden)
        if config.qkv_bias:
            shapes[bias] = (size,)
    if config.qk_norm != "none":
        per_head = config.qk_norm == "head"
        shapes |= {Q_NORM: (config.head_dim if per_head else q,), K_NORM: (config.head_dim if per_head else kv,)}
    shapes |= {O_WEIGHT: (hidden, q), POST_ATTENTION_NORM: (hidden,)}
    if config.has_layer_norm:
        shapes[POST_ATTENTION_NORM_BIAS] = (hidden,)
    if not config.is_sparse(layer):
        return shapes | _feed_forward(hidden, config.intermediate_size)
    shapes[ROUTER] = (config.num_experts, hidden)
    for role, shape in _feed_forward(hidden, config.moe_intermediate_size).items():
        shapes |= {expert_role(expert, role): shape for expert in range(config.num_experts)}
    return shapes | _shared_expert(hidden, config.shared_expert_intermediate_size) | _filler_shapes(config)


def _feed_forward(hidden: int, neurons: int) -> dict[str, tuple[int, ...]]:
    return {GATE: (neurons, hidden), UP: (neurons, hidden), DOWN: (hidden, neurons)}


def _shared_expert(hidden: int, neurons: int) -> dict[str, tuple[int, ...]]:
    if not neurons:
        return {}
    projections = zip((SHARED_GATE, SHARED_UP, SHARED_DOWN), _feed_forward(hidden, neurons).values(), strict=True)
    return {**dict(projections), SHARED_ROUTER: (1, hidden)}


def filler_roles(config: ModelConfig) -> list[str]:
    """Roles of a sparse layer that the format demands and the model does not have: zeros in a file. Mostly none."""
    return list(_filler_shapes(config))


def _filler_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    if not registry.of(config).has_shared_expert or config.shared_expert_intermediate_size:
        return {}
    return _shared_expert(config.hidden_size, ABSENT_SHARED_EXPERT_SIZE)


def layer_name(config: ModelConfig, layer: int, role: str) -> str:
    """On-disk name of a role in a layer, e.g. `model.layers.3.self_attn.q_proj.weight`."""
    return f"model.layers.{layer}.{registry.of(config).spell(role)}"


def layer_names(config: ModelConfig, layer: int) -> dict[str, str]:
    """On-disk names of one layer by role, in file order."""
    return {role: layer_name(config, layer, role) for role in role_shapes(config, layer)}


def joined(config: ModelConfig) -> dict[str, Joined]:
    """Tensors that files have as one and that are known here by their parts, by on-disk name. Mostly none."""
    family = registry.of(config)
    found = {}
    for layer in range(config.num_hidden_layers) if family.joined or family.joined_experts else ():
        shapes = role_shapes(config, layer)
        for name, roles in family.joined.items():
            if roles[0] in shapes:
                rows = sum(shapes[role][0] for role in roles)
                parts = tuple(layer_name(config, layer, role) for role in roles)
                found[f"model.layers.{layer}.{name}"] = Joined((rows, *shapes[roles[0]][1:]), parts)
        for name, roles in family.joined_experts.items() if config.is_sparse(layer) else ():
            each = [expert_role(expert, role) for expert in range(config.num_experts) for role in roles]
            rows = sum(shapes[role][0] for role in each[: len(roles)])
            parts = tuple(layer_name(config, layer, role) for role in each)
            found[f"model.layers.{layer}.{name}"] = Joined((config.num_experts, rows, *shapes[each[0]][1:]), parts)
    return found


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors outside the layers: embedding, final norm, and the head unless it is tied."""
    vocabulary = (config.vocab_size, config.hidden_size)
    head = {} if config.tie_word_embeddings else {HEAD: vocabulary}
    bias = {FINAL_NORM_BIAS: (config.hidden_size,)} if config.has_layer_norm else {}
    return {EMBEDDING: vocabulary, FINAL_NORM: (config.hidden_size,), **bias, **head}


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a checkpoint by on-disk name, in file order: embedding, layers, final norm, head."""
    outer = outer_shapes(config)
    shapes = {EMBEDDING: outer.pop(EMBEDDING)}
    for layer in range(config.num_hidden_layers):
        shapes |= {layer_name(config, layer, role): shape for role, shape in role_shapes(config, layer).items()}
    return shapes | outer
