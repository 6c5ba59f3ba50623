"""config.json of what is grown: computed fields are written, others carried, those about the source alone left out.

A growth changes sizes, layers and experts. How long the model looks back, how its heads turn, its special tokens, what
its training weighed: all that the growth neither reads nor changes is in the target, as transformers 4 and 5 read it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from aquilamoe.checkpoint import hf_config, positions, tensor_names
from aquilamoe.checkpoint.hf_config import CheckpointConfig
from aquilamoe.checkpoint.positions import EACH_LAYER, SWITCHED
from aquilamoe.config.network import FULL, ModelConfig

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
    """
    architecture = target_architecture(source, target)
    computed = hf_config.config_to_dict(target, dtype=dtype, architecture=architecture)
    kept = {key: value for key, value in source.values.items() if _is_kept(key)}
    settings = {key: value for key, value in computed.items() if key not in TOKENS}
    tokens = _assumed_tokens(source.architecture, architecture)
    values = {**settings, **tokens, **_mapped(kept, source.model, layers), **_rope(source, target)}
    values |= _unused_windows(source, target, architecture, layers) | _unused_size(source, target, architecture)
    assert hf_config.parse(values, "target").model == target, "what was written is read back"
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


def _unused_size(source: CheckpointConfig, target: ModelConfig, architecture: str) -> dict[str, Any]:
    """The size that dense layers would have in a mixture without any, where experts have a key of their own."""
    sparse = [model for model in (source.model, target) if model.is_moe and not model.mlp_only_layers]
    if architecture != source.architecture or architecture not in hf_config.MIXED or len(sparse) < 2:
        return {}
    return {"intermediate_size": source.values["intermediate_size"]}


def _mapped(kept: Mapping[str, Any], source: ModelConfig, layers: Sequence[int]) -> dict[str, Any]:
    """Fields with an entry for every layer, by whatever name, have one for every layer of the target."""
    return {
        key: [value[layer] for layer in layers]
        if isinstance(value, list) and "layer" in key and len(value) == source.num_hidden_layers
        else value
        for key, value in kept.items()
    }


def _rope(source: CheckpointConfig, target: ModelConfig) -> dict[str, Any]:
    """The scaling with all that the source states of it, also what nothing here reads."""
    if target.rope_scaling is None:
        return {}
    stated = positions.rope_parameters(source.values, source.architecture)
    parameters = {**stated, **target.rope_scaling.model_dump(mode="json")}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {"rope_scaling": scaling, "rope_parameters": parameters}


def _unused_windows(
    source: CheckpointConfig, target: ModelConfig, architecture: str, layers: Sequence[int]
) -> dict[str, Any]:
    """A source's fields of windows that are off stay, too."""
    if target.sliding_window is not None or architecture not in SWITCHED:
        return {}
    is_listed = architecture in EACH_LAYER and source.values.get("layer_types") is not None
    values: dict[str, Any] = {"layer_types": [FULL] * target.num_hidden_layers} if is_listed else {}
    if source.architecture in SWITCHED:
        values |= {key: source.values[key] for key in ("sliding_window",) if key in source.values}
        values |= {"use_sliding_window": False, "max_window_layers": _first_window(source, layers)}
    return values


def _first_window(source: CheckpointConfig, layers: Sequence[int]) -> int:
    """`max_window_layers` of a source whose windows are off, for the target's layers."""
    first = source.values.get("max_window_layers")
    first = positions.DEFAULT_WINDOW_LAYERS if first is None else int(first)
    if len(layers) == source.model.num_hidden_layers:
        return first
    below = sum(layer < first for layer in layers)
    return below if first < source.model.num_hidden_layers else max(first, len(layers))
