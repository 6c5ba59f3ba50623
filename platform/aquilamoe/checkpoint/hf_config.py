"""config.json both ways: the network that a checkpoint describes, and the checkpoint of a network. Torch-free.

Directories we write open in `transformers` without remote code; those we read are refused when our network would
compute something else.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aquilamoe.checkpoint import jsonfile, positions, spelling, tying
from aquilamoe.checkpoint.families import registry
from aquilamoe.checkpoint.families.family import Family
from aquilamoe.checkpoint.families.registry import FAMILIES
from aquilamoe.config.messages import UserError, first_problem
from aquilamoe.config.network import ABSENT_SHARED_EXPERT_SIZE
from aquilamoe.config.schema import ModelConfig

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

_SAME_SPELLING = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


@dataclass(frozen=True)
class CheckpointConfig:
    """The contents of a config.json: all of it, as spelled there, and what it is parsed into."""

    values: Mapping[str, Any]
    architecture: str
    model: ModelConfig


def config_to_dict(
    config: ModelConfig, *, dtype: str, eos_token_id: int | None = None, architecture: str | None = None
) -> dict[str, Any]:
    """Contents of config.json; `dtype` is that of the weights, e.g. `bfloat16`."""
    family = FAMILIES[architecture] if architecture else registry.of(config)
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        **{family.norm_key if key == "rms_norm_eps" else key: getattr(config, key) for key in _SAME_SPELLING},
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        **positions.spelled_rope(config),
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        # Written even when there is none: Llama's config class would make them 1 and 2.
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "dtype": dtype,
        "torch_dtype": dtype,  # where transformers 4 looks
        **_particulars(config, family),
    }


def _particulars(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Keys that only some architectures have, set to what our network computes."""
    values = {**positions.spelled_windows(config, family), **family.fixed, **family.spell_particulars(config)}
    if family.qkv_bias_key is not None:
        values[family.qkv_bias_key] = config.qkv_bias
    if family.has_shared_expert:
        shared = config.shared_expert_intermediate_size or ABSENT_SHARED_EXPERT_SIZE
        values["shared_expert_intermediate_size"] = shared
    if family.is_mixed:
        values |= {
            "moe_intermediate_size": config.moe_intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.mlp_only_layers),
        }
    return values | _experts(config, family)


def _experts(config: ModelConfig, family: Family) -> dict[str, Any]:
    if family.experts_key is None:
        return {}
    return {
        family.experts_key: config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "output_router_logits": False,
        "router_aux_loss_coef": family.default_balance,
        **({} if family.norm_topk_prob else {"norm_topk_prob": config.norm_topk_prob}),
    }


def config_from_dict(values: Mapping[str, Any], where: str = CONFIG_FILE) -> ModelConfig:
    """Model of a config.json by this package or by transformers 4 or 5.

    Raises `UserError`, beginning with `where`, for a model that our network cannot compute exactly.
    """
    return _computed(parse(values, where), where)


def _computed(checkpoint: CheckpointConfig, where: str) -> ModelConfig:
    """The model, unless only growth supports it."""
    if checkpoint.model.uncomputed:
        raise UserError(f"{where}: {checkpoint.model.uncomputed}; choose another checkpoint for these")
    return checkpoint.model


def parse(values: Mapping[str, Any], where: str = CONFIG_FILE) -> CheckpointConfig:
    """Parse a config.json by this package or by transformers 4 or 5, for a growth.

    Args:
        values: of the file.
        where: begins messages.

    Raises:
        UserError: the model cannot be grown.
    """
    spelling.check(values, where)
    family = _family_of(values, where)
    return CheckpointConfig(values, family.architecture, _model(values, family, where))


def _model(values: Mapping[str, Any], family: Family, where: str) -> ModelConfig:
    # Qwen3-MoE has the one spelling from transformers 4, the other from 5.
    experts = values.get("num_experts", values.get("num_local_experts"))
    if family.is_moe and experts is not None:
        values = {"num_experts": experts, "num_local_experts": experts, **values}
    keys = _required_keys(family)
    missing = [key for key in keys.values() if values.get(key) is None]
    if missing:
        raise UserError(
            f"{where}: '{missing[0]}' is missing for {family.architecture}; use the config.json of the checkpoint"
        )
    problem = next(_differences(values, family), None)
    if problem is not None:
        raise UserError(f"{where}: {problem}")
    fields = {
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "num_key_value_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        **{field: values[key] for field, key in keys.items()},
        "head_dim": values.get("head_dim") or family.default_head_dim,
        **positions.read(values, family, where),
        "initializer_range": _stated(values, "initializer_range", 0.02),
        "tie_word_embeddings": _stated(values, "tie_word_embeddings", family.default_tied),
        "qkv_bias": _stated(values, family.qkv_bias_key or "", family.qkv_bias),
        "qk_norm": family.qk_norm,
        **(_sparsity(values, family) if family.is_moe else {}),
        "particulars": family.read_particulars(values) or None,
    }
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise first_problem(error, ModelConfig, fields, where) from error


def _stated(values: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value, or what the config class assumes where there is none."""
    found = values.get(key)
    return default if found is None else found


def _required_keys(family: Family) -> dict[str, str]:
    """Keys of config.json by the field that they fill."""
    keys = {key: key for key in (*_SAME_SPELLING, "intermediate_size")} | {"rms_norm_eps": family.norm_key}
    if family.experts_key is not None:
        keys |= {"num_experts": family.experts_key, "num_experts_per_tok": "num_experts_per_tok"}
    if family.is_mixed:
        keys["moe_intermediate_size"] = "moe_intermediate_size"
    if not family.default_kv_heads:
        keys["num_key_value_heads"] = "num_key_value_heads"
    return keys


def _sparsity(values: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Fields that define which layers have experts, and how these are weighed."""
    step, layers = _stated(values, "decoder_sparse_step", 1), values["num_hidden_layers"]
    named = set(values.get("mlp_only_layers") or ()) if family.is_mixed else set()
    skipped = {layer for layer in range(layers) if family.is_mixed and (layer + 1) % step}
    shared = _stated(values, "shared_expert_intermediate_size", 5632) if family.has_shared_expert else 0
    return {
        "mlp_only_layers": tuple(sorted(named | skipped)),
        "norm_topk_prob": family.norm_topk_prob or bool(values.get("norm_topk_prob")),
        "shared_expert_intermediate_size": 0 if shared == ABSENT_SHARED_EXPERT_SIZE else shared,
    }


def _family_of(values: Mapping[str, Any], where: str) -> Family:
    family = registry.stated(values)
    if family is None:
        raise UserError(
            f"{where}: architectures {values.get('architectures') or []} with model_type {values.get('model_type')!r} "
            f"is not a model that can be read; choose one of {', '.join(FAMILIES)}"
        )
    return family


def _differences(values: Mapping[str, Any], family: Family) -> Iterator[str]:
    """What the checkpoint computes and our network does not: value, ours, remedy."""
    other = "choose another checkpoint"
    if _stated(values, "hidden_act", "silu") != "silu":
        yield f"hidden_act '{values['hidden_act']}', only 'silu' is computed; {other}"
    if values.get("quantization_config"):
        yield "quantization_config is set, only plain weights are read; use the checkpoint before quantization"
    for key in ("attention_bias", "mlp_bias"):
        if "attention_bias" in family.fixed and values.get(key):
            yield f"{key} true puts biases on o_proj or the MLP, only q, k and v can have them; {other}"
    for key in ("use_parallel_residual", "qk_layernorm"):
        if key in family.fixed and values.get(key):
            yield f"{key} true is another network, which is not computed; {other}"
    rotated, layers = values.get("no_rope_layers"), values["num_hidden_layers"]
    if "nope_layers" in family.particulars and rotated is not None and len(rotated) < layers:
        yield (
            f"no_rope_layers has {len(rotated)} entries, num_hidden_layers is {layers}; use the checkpoint's own "
            "config.json"
        )
    if values.get("clip_qkv") is not None:
        yield f"clip_qkv {values['clip_qkv']} cuts queries, keys and values, which is not computed; {other}"
    step = _stated(values, "decoder_sparse_step", 1)
    if family.is_mixed and step < 1:
        yield f"decoder_sparse_step {step!r} is not a number of layers; use 1 for experts in every layer"


def read_checkpoint_config(directory: Path) -> CheckpointConfig:
    """Parse the config.json of a checkpoint directory, for a growth.

    A head with other values than the embedding is untied, whatever the file declares.

    Raises:
        UserError: the file is missing or damaged, or the model cannot be grown.
    """
    path = directory / CONFIG_FILE
    found = parse(jsonfile.read(path, directory), where=str(path))
    if found.model.tie_word_embeddings and tying.has_own_head(directory):
        return replace(found, model=found.model.model_copy(update={"tie_word_embeddings": False}))
    return found


def read_config(directory: Path) -> ModelConfig:
    """Model of a checkpoint directory, to be computed."""
    return _computed(read_checkpoint_config(directory), str(directory / CONFIG_FILE))


def read_eos_token_id(directory: Path) -> int | None:
    """The end-of-text token of a checkpoint directory; of several, the first."""
    eos = jsonfile.read(directory / CONFIG_FILE, directory).get("eos_token_id")
    return next(iter(eos), None) if isinstance(eos, list) else eos


def write_config(directory: Path, config: ModelConfig, dtype: str, eos_token_id: int | None) -> None:
    """Write config.json and generation_config.json; `dtype` is that of the weights, e.g. `bfloat16`."""
    write_json(directory / CONFIG_FILE, config_to_dict(config, dtype=dtype, eos_token_id=eos_token_id))
    write_json(directory / GENERATION_FILE, {"eos_token_id": eos_token_id})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of a checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
