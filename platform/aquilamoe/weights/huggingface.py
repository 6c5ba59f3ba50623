"""Checkpoints as Hugging Face directories: config.json both ways, weights of a `Decoder`, and the files beside them.

Directories we write open in `transformers` without remote code; those we read are refused when our network would
compute something else.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from aquilamoe.config.messages import UserError, first_problem
from aquilamoe.config.schema import ModelConfig
from aquilamoe.model import Decoder
from aquilamoe.weights import names, store

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"

MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
}
WITH_QKV_BIAS = ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM")
# What the config classes of transformers assume when a file does not say.
DEFAULT_ROPE_THETA = {"MixtralForCausalLM": 1e6}
DEFAULT_WINDOW = {"MistralForCausalLM": 4096, "Qwen2ForCausalLM": 4096, "Qwen2MoeForCausalLM": 4096}

_SAME_SPELLING = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_WEIGHT_SUFFIXES = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".partial")


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
    """Keys that only one architecture has, set to what our network computes."""
    no_window = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_hidden_layers}
    experts = {
        "num_experts_per_tok": config.num_experts_per_tok,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    match architecture:
        case "LlamaForCausalLM":
            return {"attention_bias": False, "mlp_bias": False}
        case "MistralForCausalLM":
            return {"sliding_window": None}
        case "Qwen2ForCausalLM":
            return no_window
        case "MixtralForCausalLM":
            return {**experts, "num_local_experts": config.num_experts, "sliding_window": None}
        case _:
            return {
                **no_window,
                **experts,
                "num_experts": config.num_experts,
                "moe_intermediate_size": config.intermediate_size,
                "shared_expert_intermediate_size": names.SHARED_EXPERT_SIZE,
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "qkv_bias": True,
            }


def config_from_dict(values: Mapping[str, Any], where: str = CONFIG_FILE) -> ModelConfig:
    """Model of a config.json by this package or by transformers 4 or 5.

    Raises `UserError`, beginning with `where`, for a model that our network cannot compute exactly.
    """
    architecture = _architecture_of(values, where)
    moe = architecture in ("MixtralForCausalLM", "Qwen2MoeForCausalLM")
    keys = {key: key for key in _SAME_SPELLING}
    keys["intermediate_size"] = (
        "moe_intermediate_size" if architecture == "Qwen2MoeForCausalLM" else "intermediate_size"
    )
    if moe:
        keys["num_experts"] = "num_experts" if architecture == "Qwen2MoeForCausalLM" else "num_local_experts"
        keys["num_experts_per_tok"] = "num_experts_per_tok"
    if architecture != "LlamaForCausalLM":  # an old Llama without the key has as many as heads
        keys["num_key_value_heads"] = "num_key_value_heads"
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
        "head_dim": values.get("head_dim"),
        "rope_theta": _rope(values).get("rope_theta", DEFAULT_ROPE_THETA.get(architecture, 1e4)),
        "initializer_range": values.get("initializer_range", 0.02),
        "tie_word_embeddings": values.get("tie_word_embeddings", False),
        "qkv_bias": architecture in WITH_QKV_BIAS,
    }
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise first_problem(error, ModelConfig, fields, where) from error


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
        if architecture == "LlamaForCausalLM" and values.get(key):
            yield f"{key} true puts biases on o_proj or the MLP, only q, k and v can have them; {other}"
    window = values.get("sliding_window", DEFAULT_WINDOW.get(architecture))
    windowed = architecture not in WITH_QKV_BIAS or values.get("use_sliding_window", False)
    if windowed and window is not None and window < values["max_position_embeddings"]:
        yield (
            f"sliding_window {window} is smaller than max_position_embeddings {values['max_position_embeddings']} "
            f"tokens, only full attention is computed; {other}, or set max_position_embeddings to {window}"
        )
    if set(values.get("layer_types") or ()) - {"full_attention"}:
        yield f"layer_types has {sorted(set(values['layer_types']))}, only 'full_attention' is computed; {other}"
    if architecture == "Qwen2MoeForCausalLM":
        yield from _qwen2_moe_differences(values, other)


def _qwen2_moe_differences(values: Mapping[str, Any], other: str) -> Iterator[str]:
    if not values.get("norm_topk_prob", False):
        yield f"norm_topk_prob false, only expert weights that sum to 1 (true) are computed; {other}"
    shared = values.get("shared_expert_intermediate_size", 5632)
    if shared not in (0, names.SHARED_EXPERT_SIZE):
        yield f"shared_expert_intermediate_size {shared}, a shared expert is not computed; {other}"
    if values.get("decoder_sparse_step", 1) != 1:
        yield f"decoder_sparse_step {values['decoder_sparse_step']}, only 1 (all layers sparse) is computed; {other}"
    if values.get("mlp_only_layers"):
        yield f"mlp_only_layers {values['mlp_only_layers']}, only [] (all layers sparse) is computed; {other}"
    if not values.get("qkv_bias", True):
        yield f"qkv_bias false, an MoE without biases is read as MixtralForCausalLM only; {other}"


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
    """Model of a checkpoint directory."""
    path = directory / CONFIG_FILE
    return config_from_dict(_read_json(path), where=str(path))


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


@torch.no_grad()
def _views(model: Decoder) -> dict[str, Tensor]:
    """Every parameter of the model by on-disk name: of stacked experts, the slice of each."""
    config, parameters = model.config, dict(model.named_parameters())
    views: dict[str, Tensor] = {name: parameters[name] for name in names.outer_shapes(config)}
    fillers = set(names.filler_roles(config))
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        stacked: dict[str, Tensor] = {}
        if config.is_moe:
            for role in (names.GATE, names.UP, names.DOWN):
                projection = role.removeprefix("mlp.").removesuffix(".weight")
                experts = parameters[f"{prefix}mlp.experts.{projection}"].unbind()
                stacked |= {names.expert_role(index, role): expert for index, expert in enumerate(experts)}
        for role, name in names.layer_names(config, layer).items():
            if role not in fillers:
                views[name] = stacked[role] if role in stacked else parameters[prefix + role]
    return views


def save_model(
    model: Decoder, directory: Path, dtype: torch.dtype | None = None, eos_token_id: int | None = None
) -> None:
    """Write weights (in `dtype`, or the model's own) and config; tokenizer files come by `copy_companions`."""
    config, views = model.config, _views(model)
    dtype = dtype or model.lm_head.weight.dtype
    shapes = names.tensor_shapes(config)
    tensors = ((name, views[name] if name in views else torch.zeros(shape)) for name, shape in shapes.items())
    store.write(directory, shapes, dtype, tensors)
    write_config(directory, config, str(dtype).removeprefix("torch."), eos_token_id)


@torch.no_grad()
def load_state(model: Decoder, directory: Path) -> None:
    """Copy the weights of a checkpoint directory into the model, cast to the model's dtype.

    Raises `UserError` when the files lack a tensor, have one that the model does not have, or of another shape.
    """
    views = _views(model)
    with store.Reader(directory) as reader:
        _check_names(model.config, reader)
        for name, view in views.items():
            if reader.shape(name) != tuple(view.shape):
                raise UserError(
                    f"{directory}: tensor '{name}' has shape {reader.shape(name)}, the model {tuple(view.shape)}; "
                    f"take {CONFIG_FILE} and weights from the same checkpoint"
                )
            view.copy_(reader.get(name))


def _check_names(config: ModelConfig, reader: store.Reader) -> None:
    """Refuse tensors that the model would silently leave out; what is missing is refused when it is read."""
    expected = set(names.tensor_shapes(config))
    for name in reader.names:
        if name.endswith(".mlp.shared_expert.down_proj.weight") and reader.get(name).any():
            raise UserError(
                f"{reader.directory}: tensor '{name}' is not zero, a shared expert is not computed; "
                "choose a checkpoint without one"
            )
        # Older files repeat a tied head, and the fixed frequencies of the rotary embedding.
        redundant = (name == names.HEAD and config.tie_word_embeddings) or name.endswith(".rotary_emb.inv_freq")
        if name not in expected and not redundant:
            raise UserError(
                f"{reader.directory}: tensor '{name}' has no place in {names.architecture(config)} as configured; "
                f"take {CONFIG_FILE} and weights from the same checkpoint"
            )


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of a checkpoint directory, on the CPU in `dtype`. Raises `UserError` for what it cannot compute."""
    with torch.device("meta"):  # no time for initial values that the files replace
        model = Decoder(read_config(directory)).to(dtype)
    model.to_empty(device="cpu")
    if model.config.tie_word_embeddings:  # `to_empty` gives the two names a tensor each
        model.lm_head.weight = model.model.embed_tokens.weight
    load_state(model, directory)
    return model


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files beside weights and config.json: tokenizer, generation settings, licence, but not README."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        skipped = path.name in (CONFIG_FILE, "README.md") or path.name.startswith(".")
        if path.is_file() and not skipped and not path.name.endswith(_WEIGHT_SUFFIXES):
            shutil.copyfile(path, target / path.name)
