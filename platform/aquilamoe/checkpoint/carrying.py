"""config.json of what is grown: computed fields are written, others carried, those about the source alone left out.

A growth changes sizes, layers and experts. How long the model looks back, how its heads turn, its special tokens, what
its training weighed: all that the growth neither reads nor changes is in the target, as transformers 4 and 5 read it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from aquilamoe.checkpoint import hf_config, positions, tensor_names
from aquilamoe.checkpoint.hf_config import CheckpointConfig
from aquilamoe.checkpoint.positions import ALL_LAYERS, EACH_LAYER, FULL, SLIDING, SWITCHED, Positions
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig

# About the source's files, its code or the program that wrote it. So is whatever begins with an underscore.
ABOUT_SOURCE = (
    *("auto_map", "custom_pipelines", "transformers_version", "quantization_config", "quantization"),
    *("compression_config", "pruned_heads", "finetuning_task", "adapter_config", "unsloth_version", "unsloth_fixed"),
)
# Written for the target by `configuration.config_to_dict` or below, and never taken from the source.
COMPUTED = (
    *ModelConfig.model_fields,
    *("architectures", "model_type", "dtype", "torch_dtype", "num_local_experts", "decoder_sparse_step"),
    *("attention_bias", "mlp_bias", "clip_qkv", "partial_rotary_factor"),
    *("rope_scaling", "rope_parameters", "layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
)
# Special tokens (begin, end, padding) that the config classes of transformers assume where a file has no such key.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DEFAULT_TOKENS: Mapping[str, tuple[int | None, ...]] = {
    **dict.fromkeys(("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"), (1, 2, None)),
    "OlmoeForCausalLM": (None, 50279, 1),
}


def carried(source: CheckpointConfig, target: ModelConfig, layers: Sequence[int], dtype: str) -> dict[str, Any]:
    """Contents of the config.json of a target that was grown from `source`.

    layers: of the source, for every layer of the target. dtype: of the weights, e.g. `bfloat16`.
    Raises UserError, beginning with the field, where the target would compute something else than the source.
    """
    architecture = target_architecture(source, target)
    computed = hf_config.config_to_dict(target, dtype=dtype, architecture=architecture)
    kept = {key: value for key, value in source.values.items() if _is_kept(key)}
    grown = source.positions.on(layers)
    settings = {key: value for key, value in computed.items() if key not in TOKENS}
    tokens = _assumed_tokens(source.architecture, architecture)
    values = {**settings, **tokens, **_mapped(kept, source.model, layers), **_rope(source)}
    values |= _windows(grown, source, architecture, layers)
    _check(source, grown, values, architecture, target)
    return values


def _is_kept(key: str) -> bool:
    return key not in COMPUTED and key not in ABOUT_SOURCE and not key.startswith("_")


def target_architecture(source: CheckpointConfig, target: ModelConfig) -> str:
    """The class in transformers that computes the target.

    A Mistral stays one, although without windows it is the network of a Llama.
    """
    architecture = tensor_names.architecture(target)
    stays = source.architecture == "MistralForCausalLM" and architecture == "LlamaForCausalLM"
    return source.architecture if stays else architecture


def _assumed_tokens(source: str, target: str) -> dict[str, int | None]:
    """Special tokens that only a config class states, where the target's class does not state the same."""
    none = (None,) * len(TOKENS)
    assumed = zip(TOKENS, DEFAULT_TOKENS.get(source, none), DEFAULT_TOKENS.get(target, none), strict=True)
    return {key: token for key, token, other in assumed if token != other}


def _mapped(kept: Mapping[str, Any], source: ModelConfig, layers: Sequence[int]) -> dict[str, Any]:
    """Fields with an entry for every layer, by whatever name, have one for every layer of the target."""
    return {
        key: [value[layer] for layer in layers]
        if isinstance(value, list) and "layer" in key and len(value) == source.num_hidden_layers
        else value
        for key, value in kept.items()
    }


def _rope(source: CheckpointConfig) -> dict[str, Any]:
    """The rotary embedding for transformers 4 (theta outside of the scaling) and for 5 (all in one)."""
    parameters = positions.rope_parameters(source.values, source.architecture)
    if parameters["rope_type"] == "default":
        return {}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {"rope_scaling": scaling, "rope_parameters": parameters}


def _windows(grown: Positions, source: CheckpointConfig, architecture: str, layers: Sequence[int]) -> dict[str, Any]:
    """How far layers look back, as the architecture spells it; a source's fields of windows that are off stay too."""
    kinds = [FULL if window is None else SLIDING for window in grown.windows]
    stated = architecture in EACH_LAYER and source.values.get("layer_types") is not None
    if SLIDING not in kinds:
        values: dict[str, Any] = {"layer_types": kinds} if stated else {}
        if architecture in SWITCHED and source.architecture in SWITCHED:
            values |= {key: source.values[key] for key in ("sliding_window",) if key in source.values}
            values |= {"use_sliding_window": False, "max_window_layers": _first_window(source, layers)}
        return values
    size = next(window for window in grown.windows if window is not None)
    if architecture in EACH_LAYER:
        of_layers = {"layer_types": kinds, "max_window_layers": _leading(kinds)}
        return {"use_sliding_window": True, "sliding_window": size, **of_layers}
    if architecture not in ALL_LAYERS or FULL in kinds:
        raise UserError(
            f"architecture: {source.architecture} with sliding_window {size} in {kinds.count(SLIDING)} of {len(kinds)} "
            f"layers would become {architecture}, which computes "
            f"{'one window for all layers' if architecture in ALL_LAYERS else 'no windows'}; a growth in width or "
            "depth keeps them"
        )
    switch = {"use_sliding_window": True, "max_window_layers": 0} if architecture in SWITCHED else {}
    return {"sliding_window": size, **switch}


def _leading(kinds: Sequence[str]) -> int:
    """How many layers are full before the first window: what versions before `layer_types` look at."""
    return next((layer for layer, kind in enumerate(kinds) if kind == SLIDING), len(kinds))


def _first_window(source: CheckpointConfig, layers: Sequence[int]) -> int:
    """`max_window_layers` of a source whose windows are off, for the target's layers."""
    first = source.values.get("max_window_layers")
    first = positions.DEFAULT_WINDOW_LAYERS if first is None else int(first)
    if len(layers) == source.model.num_hidden_layers:
        return first
    below = sum(layer < first for layer in layers)
    return below if first < source.model.num_hidden_layers else max(first, len(layers))


def _check(
    source: CheckpointConfig, grown: Positions, values: Mapping[str, Any], architecture: str, target: ModelConfig
) -> None:
    """What was written is read back: it must be the target, and treat positions as the source does."""
    rope_type = source.positions.rope.rope_type
    if rope_type == "longrope" and target.head_dim != source.model.head_dim:  # it has a factor for each pair
        raise positions.refuse("head_dim", source.model, target, rope_type)
    found = positions.read(values, architecture, target, "target")
    assert found.windows == grown.windows
    positions.check_same((source.positions, source.model), (found, target))
