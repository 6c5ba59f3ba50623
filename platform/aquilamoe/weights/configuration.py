"""Checkpoints as Hugging Face directories: config.json both ways, and the files beside the weights. Torch-free.

Directories we write open in `transformers` without remote code; those we read are refused when our network would
compute something else.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aquilamoe.config.messages import UserError, first_problem
from aquilamoe.config.network import ABSENT_SHARED_EXPERT_SIZE
from aquilamoe.config.schema import ModelConfig
from aquilamoe.weights import names, tying

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "OlmoeForCausalLM": "olmoe",
}
QWEN = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
MOE = ("MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM")
QK_NORM = {"Qwen3ForCausalLM": "head", "Qwen3MoeForCausalLM": "head", "OlmoeForCausalLM": "projection"}
# Where layers may be dense and experts have a size of their own.
MIXED = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
# What the config classes of transformers assume when a file does not say.
DEFAULT_ROPE_THETA = {"MixtralForCausalLM": 1e6}
DEFAULT_WINDOW = {"MistralForCausalLM": 4096, **dict.fromkeys(QWEN, 4096)}
DEFAULT_HEAD_DIM = {"Qwen3ForCausalLM": 128}

_SAME_SPELLING = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".partial")
_CODE_SUFFIXES = (".py", ".pyc", ".so", ".sh")
_NOT_COPIED = (CONFIG_FILE, "README.md", "record.json", "run.json")  # each is about one checkpoint


def config_to_dict(config: ModelConfig, *, dtype: str, eos_token_id: int | None = None) -> dict[str, Any]:
    """Contents of config.json; `dtype` is that of the weights, e.g. `bfloat16`."""
    architecture = names.architecture(config)
    return {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        **{key: getattr(config, key) for key in _SAME_SPELLING},
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rope_theta": config.rope_theta,  # where transformers 4 looks
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},  # where transformers 5 does
        "attention_dropout": 0.0,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        # Said even when there is none: Llama's config class would make them 1 and 2.
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,
        "dtype": dtype,
        **_particulars(config, architecture),
    }


def _particulars(config: ModelConfig, architecture: str) -> dict[str, Any]:
    """Keys that only some architectures have, set to what our network computes."""
    values: dict[str, Any] = {}
    if architecture in QWEN:
        values |= {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_hidden_layers}
    elif architecture in ("MistralForCausalLM", "MixtralForCausalLM"):
        values["sliding_window"] = None
    if architecture == "LlamaForCausalLM":
        values["mlp_bias"] = False
    if architecture in ("LlamaForCausalLM", *QK_NORM):
        values["attention_bias"] = False
    if architecture == "OlmoeForCausalLM":
        values["clip_qkv"] = None
    if architecture == "Qwen2MoeForCausalLM":
        shared = config.shared_expert_intermediate_size or ABSENT_SHARED_EXPERT_SIZE
        values |= {"qkv_bias": config.qkv_bias, "shared_expert_intermediate_size": shared}
    if architecture in MIXED:
        values |= {
            "moe_intermediate_size": config.moe_intermediate_size,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(config.mlp_only_layers),
        }
    return values | (_experts(config, architecture) if config.is_moe else {})


def _experts(config: ModelConfig, architecture: str) -> dict[str, Any]:
    is_mixtral = architecture == "MixtralForCausalLM"
    return {
        "num_local_experts" if is_mixtral else "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        **({} if is_mixtral else {"norm_topk_prob": config.norm_topk_prob}),
    }


def config_from_dict(values: Mapping[str, Any], where: str = CONFIG_FILE) -> ModelConfig:
    """Model of a config.json by this package or by transformers 4 or 5.

    Raises `UserError`, beginning with `where`, for a model that our network cannot compute exactly.
    """
    architecture = _architecture_of(values, where)
    # Qwen3-MoE has the one spelling from transformers 4, the other from 5.
    experts = values.get("num_experts", values.get("num_local_experts"))
    if architecture in MOE and experts is not None:
        values = {"num_experts": experts, "num_local_experts": experts, **values}
    keys = _required_keys(architecture)
    missing = [key for key in keys.values() if key not in values]
    if missing:
        raise UserError(f"{where}: '{missing[0]}' is missing for {architecture}; use the config.json of the checkpoint")
    problem = next(_differences(values, architecture), None)
    if problem is not None:
        raise UserError(f"{where}: {problem}")
    fields = {
        "num_experts": 0,
        "num_experts_per_tok": 0,
        "num_key_value_heads": values.get("num_key_value_heads") or values["num_attention_heads"],
        **{field: values[key] for field, key in keys.items()},
        "head_dim": values.get("head_dim") or DEFAULT_HEAD_DIM.get(architecture),
        "rope_theta": _rope(values).get("rope_theta", DEFAULT_ROPE_THETA.get(architecture, 1e4)),
        "initializer_range": values.get("initializer_range", 0.02),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "qkv_bias": _has_qkv_bias(values, architecture),
        "qk_norm": QK_NORM.get(architecture, "none"),
        **(_sparsity(values, architecture) if architecture in MOE else {}),
    }
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise first_problem(error, ModelConfig, fields, where) from error


def _required_keys(architecture: str) -> dict[str, str]:
    """Keys of config.json by the field that they fill."""
    keys = {key: key for key in (*_SAME_SPELLING, "intermediate_size")}
    if architecture in MOE:
        keys["num_experts"] = "num_local_experts" if architecture == "MixtralForCausalLM" else "num_experts"
        keys["num_experts_per_tok"] = "num_experts_per_tok"
    if architecture in MIXED:
        keys["moe_intermediate_size"] = "moe_intermediate_size"
    if architecture not in ("LlamaForCausalLM", "OlmoeForCausalLM"):  # without the key, these have as many as heads
        keys["num_key_value_heads"] = "num_key_value_heads"
    return keys


def _has_qkv_bias(values: Mapping[str, Any], architecture: str) -> bool:
    return architecture == "Qwen2ForCausalLM" or (
        architecture == "Qwen2MoeForCausalLM" and values.get("qkv_bias", True)
    )


def _sparsity(values: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Fields that say which layers have experts, and how these are weighed."""
    step, layers = values.get("decoder_sparse_step", 1), values["num_hidden_layers"]
    named = set(values.get("mlp_only_layers") or ()) if architecture in MIXED else set()
    skipped = {layer for layer in range(layers) if architecture in MIXED and (layer + 1) % step}
    shared = values.get("shared_expert_intermediate_size", 5632) if architecture == "Qwen2MoeForCausalLM" else 0
    return {
        "mlp_only_layers": tuple(sorted(named | skipped)),
        "norm_topk_prob": architecture == "MixtralForCausalLM" or values.get("norm_topk_prob", False),
        "shared_expert_intermediate_size": 0 if shared == ABSENT_SHARED_EXPERT_SIZE else shared,
    }


def _architecture_of(values: Mapping[str, Any], where: str) -> str:
    stated = values.get("architectures") or [
        name for name, model_type in MODEL_TYPES.items() if model_type == values.get("model_type")
    ]
    if not (isinstance(stated, list) and len(stated) == 1 and stated[0] in MODEL_TYPES):
        raise UserError(
            f"{where}: architectures {stated} with model_type {values.get('model_type')!r} is not a model that can be "
            f"read; choose one of {', '.join(MODEL_TYPES)}"
        )
    return stated[0]


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the rotary embedding, from the spellings of transformers 4 (top level) and 5 (nested)."""
    top = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if values.get(key) is not None}
    return {**top, **(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}


def _differences(values: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """What the checkpoint computes and our network does not: value, ours, remedy."""
    other = "choose another checkpoint"
    rope = _rope(values)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        yield f"rotary embedding scaled by rope_type '{rope_type}', only 'default' is computed; {other}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor {rope['partial_rotary_factor']}, only 1.0 is computed; {other}"
    if values.get("hidden_act", "silu") != "silu":
        yield f"hidden_act '{values['hidden_act']}', only 'silu' is computed; {other}"
    if values.get("quantization_config"):
        yield "quantization_config is set, only plain weights are read; use the checkpoint before quantization"
    for key in ("attention_bias", "mlp_bias"):
        if architecture in ("LlamaForCausalLM", *QK_NORM) and values.get(key):
            yield f"{key} true puts biases on o_proj or the MLP, only q, k and v can have them; {other}"
    if values.get("clip_qkv") is not None:
        yield f"clip_qkv {values['clip_qkv']} cuts queries, keys and values, which is not computed; {other}"
    window = values.get("sliding_window", DEFAULT_WINDOW.get(architecture))
    windowed = architecture not in QWEN or values.get("use_sliding_window", False)
    if windowed and window is not None and window < values["max_position_embeddings"]:
        yield (
            f"sliding_window {window} is smaller than max_position_embeddings {values['max_position_embeddings']} "
            f"tokens, only full attention is computed; {other}, or set max_position_embeddings to {window}"
        )
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        yield f"layer_types has {sorted(set(values['layer_types']))}, only 'full_attention' is computed; {other}"
    step = values.get("decoder_sparse_step", 1)
    if architecture in MIXED and not (isinstance(step, int) and step > 0):
        yield f"decoder_sparse_step {step!r} is not a number of layers; use 1 for experts in every layer"


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; name a directory with a Hugging Face checkpoint")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, not an object; copy it again")
    return values


def read_config(directory: Path) -> ModelConfig:
    """Model of a checkpoint directory; a head with other numbers than the embedding is untied, whatever it says."""
    path = directory / CONFIG_FILE
    model = config_from_dict(_read_json(path), where=str(path))
    if model.tie_word_embeddings and tying.has_own_head(directory):
        return model.model_copy(update={"tie_word_embeddings": False})
    return model


@dataclass(frozen=True)
class Stated:
    """What config.json says where `read_config` need not follow it: the class in transformers, and a tied head."""

    architecture: str
    tied: bool


def read_stated(directory: Path) -> Stated:
    """What a checkpoint directory says of itself."""
    path = directory / CONFIG_FILE
    values = _read_json(path)
    return Stated(_architecture_of(values, str(path)), bool(values.get("tie_word_embeddings", False)))


def read_eos_token_id(directory: Path) -> int | None:
    """The end-of-text token of a checkpoint directory; of several, the first."""
    eos = _read_json(directory / CONFIG_FILE).get("eos_token_id")
    return next(iter(eos), None) if isinstance(eos, list) else eos


def write_config(directory: Path, config: ModelConfig, dtype: str, eos_token_id: int | None) -> None:
    """Write config.json and generation_config.json; `dtype` is that of the weights, e.g. `bfloat16`."""
    directory.mkdir(parents=True, exist_ok=True)
    values = config_to_dict(config, dtype=dtype, eos_token_id=eos_token_id)
    for file, content in ((CONFIG_FILE, values), (GENERATION_FILE, {"eos_token_id": eos_token_id})):
        (directory / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def companions(source: Path) -> list[Path]:
    """The files beside weights and config.json that a copy takes along: tokenizer, generation settings, licence.

    Neither the README, which is about the source, nor code, which a checkpoint here never has.
    """
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file()
        and path.name not in _NOT_COPIED
        and not path.name.startswith(".")
        and not path.name.endswith((*_WEIGHT_SUFFIXES, *_CODE_SUFFIXES))
    ]


def copy_companions(source: Path, target: Path) -> None:
    """Copy the `companions` of a checkpoint to another directory."""
    target.mkdir(parents=True, exist_ok=True)
    for path in companions(source):
        shutil.copyfile(path, target / path.name)
