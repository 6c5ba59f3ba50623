"""config.json of what is grown: computed fields are written, others carried, those about the source alone left out.

A growth changes sizes, layers and experts. How long the model looks back, how its heads turn, its special tokens, what
its training weighed: all that the growth neither reads nor changes is in the target, as transformers 4 and 5 read it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from aquilamoe.checkpoint import hf_config, positions
from aquilamoe.checkpoint.families import registry
from aquilamoe.checkpoint.families.family import Family
from aquilamoe.checkpoint.families.registry import FAMILIES
from aquilamoe.checkpoint.hf_config import CheckpointConfig
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
    *("layer_norm_eps", "use_qkv_bias"),
)
# Special tokens (begin, end, padding) that the config classes of transformers assume where a file has no such key.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def carried(source: CheckpointConfig, target: ModelConfig, layers: Sequence[int], dtype: str) -> dict[str, Any]:
    """Contents of the config.json of a target that was grown from `source`.

    layers: of the source, for every layer of the target. dtype: of the weights, e.g. `bfloat16`.
    """
    family, old = FAMILIES[target_architecture(source, target)], FAMILIES[source.architecture]
    computed = hf_config.config_to_dict(target, dtype=dtype, architecture=family.architecture)
    own = old.spell_particulars(source.model)
    kept = {key: value for key, value in source.values.items() if _is_kept(key) and key not in own}
    settings = {key: value for key, value in computed.items() if key not in TOKENS}
    tokens = _assumed_tokens(old, family)
    values = {**settings, **tokens, **_mapped(kept, source.model, layers), **_rope(source, target)}
    values |= _unused_windows(source, target, family, layers) | _unused_size(source, target, family)
    assert hf_config.parse(values, "target").model == target, "what was written is read back"
    return values


def _is_kept(key: str) -> bool:
    return key not in COMPUTED and key not in ABOUT_SOURCE and not key.startswith("_")


def target_architecture(source: CheckpointConfig, target: ModelConfig) -> str:
    """The class in transformers that computes the target.

    A Mistral stays one, although without windows it is the network of a Llama.
    """
    architecture = registry.of(target).architecture
    return source.architecture if FAMILIES[source.architecture].same_as == architecture else architecture


def _assumed_tokens(source: Family, target: Family) -> dict[str, int | None]:
    """Special tokens that only a config class states, where the target's class does not state the same."""
    assumed = zip(TOKENS, source.default_tokens, target.default_tokens, strict=True)
    return {key: token for key, token, other in assumed if token != other}


def _unused_size(source: CheckpointConfig, target: ModelConfig, family: Family) -> dict[str, Any]:
    """The size that dense layers would have in a mixture without any, where experts have a key of their own."""
    sparse = [model for model in (source.model, target) if model.is_moe and not model.mlp_only_layers]
    if family.architecture != source.architecture or not family.is_mixed or len(sparse) < 2:
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
    stated = positions.rope_parameters(source.values, FAMILIES[source.architecture])
    # What is beside the scaling in the source's file stays there.
    nested = source.values.get("rope_scaling") or source.values.get("rope_parameters") or {}
    beside = {key for key in source.values if key not in nested}
    parameters = {**stated, **target.rope_scaling.model_dump(mode="json")}
    parameters = {key: value for key, value in parameters.items() if key == "rope_theta" or key not in beside}
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    return {"rope_scaling": scaling, "rope_parameters": parameters}


def _unused_windows(
    source: CheckpointConfig, target: ModelConfig, family: Family, layers: Sequence[int]
) -> dict[str, Any]:
    """A source's fields of windows that are off stay, too."""
    if target.sliding_window is not None or not family.window_switch:
        return {}
    is_listed = family.windows == "each" and source.values.get("layer_types") is not None
    values: dict[str, Any] = {"layer_types": [FULL] * target.num_hidden_layers} if is_listed else {}
    if FAMILIES[source.architecture].window_switch:
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
