"""Checkpoint directories: config.json both ways, weights of a model, and the files beside them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.companions import copy_companions
from aquilamoe.checkpoint.hf_config import (
    config_from_dict,
    config_to_dict,
    parse,
    read_config,
    read_eos_token_id,
    write_config,
)
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.checkpoint.state_dict import load_model, load_state, save_model
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from aquilamoe.model.transformer import Decoder

transformers.utils.logging.disable_progress_bar()

WEIGHTS = "model.safetensors"


Network = Callable[..., ModelConfig]


def random_model(config: ModelConfig, seed: int = 0) -> Decoder:
    """Every parameter random, gains and biases too."""
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5, 0.5, generator=generator)
    return model


def scalings(head_dim: int) -> st.SearchStrategy[dict[str, Any] | None]:
    """A rotary embedding of any type."""
    number = st.floats(0.5, 64)
    trained = {"original_max_position_embeddings": st.integers(1, 9000)}
    per_pair = st.lists(number, min_size=head_dim // 2, max_size=head_dim // 2)
    fields: dict[str, dict[str, Any]] = {
        "linear": {"factor": number},
        "dynamic": {"factor": number},
        "yarn": {"factor": number, "beta_fast": number, "truncate": st.booleans(), **trained},
        "llama3": {"factor": number, "low_freq_factor": st.just(1.0), "high_freq_factor": st.just(4.0), **trained},
        "longrope": {"factor": number, "short_factor": per_pair, "long_factor": per_pair, **trained},
    }
    kinds = [st.fixed_dictionaries({"rope_type": st.just(kind), **inner}) for kind, inner in fields.items()]
    return st.none() | st.one_of(kinds)


@st.composite
def windows(draw: st.DrawFn, layers: int, in_each: bool) -> dict[str, Any]:
    """A window of all layers, or of some."""
    types = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=layers, max_size=layers)
    return {"sliding_window": draw(st.integers(1, 9000)), "layer_types": draw(types) if in_each else []}


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv_heads, groups, head_dim = draw(st.integers(1, 4)), draw(st.integers(1, 3)), 2 * draw(st.integers(1, 9))
    layers, num_experts = draw(st.integers(1, 9)), draw(st.sampled_from([0, 2, 5]))
    qk_norm = draw(st.sampled_from(["none", "none", "head", "projection"] if num_experts else ["none", "head"]))
    has_hidden_heads, plain = qk_norm == "projection", qk_norm == "none"
    experts = {
        "num_experts_per_tok": draw(st.integers(1, max(1, num_experts))),
        "moe_intermediate_size": draw(st.none() | st.integers(1, 50)),
        "norm_topk_prob": draw(st.booleans()),
        "shared_expert_intermediate_size": draw(st.sampled_from([0, 1, 7, 9, 40])) if plain else 0,
        "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), unique=True, max_size=layers - 1).map(sorted))
        if not has_hidden_heads
        else [],
    }
    qkv_bias = plain and draw(st.booleans())
    in_each = plain if num_experts else qkv_bias or not plain
    return ModelConfig.model_validate(
        {
            "vocab_size": draw(st.integers(1, 300)),
            "hidden_size": kv_heads * groups * head_dim if has_hidden_heads else draw(st.integers(1, 50)),
            "intermediate_size": draw(st.integers(1, 50)),
            "num_hidden_layers": layers,
            "num_attention_heads": kv_heads * groups,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": draw(st.integers(1, 9000)),
            "rope_theta": draw(st.floats(2, 1e8)),
            "rope_scaling": draw(scalings(head_dim)),
            "rms_norm_eps": draw(st.floats(1e-8, 1e-2)),
            "initializer_range": draw(st.floats(1e-3, 1)),
            "qkv_bias": qkv_bias,
            "qk_norm": qk_norm,
            "tie_word_embeddings": draw(st.booleans()),
            "num_experts": num_experts,
            **(experts if num_experts else {"num_experts_per_tok": 0}),
            **(draw(windows(layers, in_each)) if not has_hidden_heads and draw(st.booleans()) else {}),
        }
    )


@settings(derandomize=True, deadline=None, max_examples=60)
@given(config=configs())
def test_every_config_survives_config_json(config: ModelConfig) -> None:
    text = json.dumps(config_to_dict(config, dtype="bfloat16", eos_token_id=3))
    assert parse(json.loads(text)).model == config


@settings(derandomize=True, deadline=None, max_examples=40)
@given(config=configs())
def test_transformers_reads_every_config_as_we_meant_it(config: ModelConfig) -> None:
    values = config_to_dict(config, dtype="bfloat16", eos_token_id=3)
    theirs = transformers.AutoConfig.for_model(**values)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (None, 3, None)
    assert theirs.dtype == torch.bfloat16
    assert parse(theirs.to_dict() | {"architectures": values["architectures"]}).model == config


def test_files_hold_the_names_shapes_and_types_that_transformers_would_write(
    kind: str, tmp_path: Path, network: Network
) -> None:
    save_model(random_model(network(kind)), tmp_path / "ours", dtype=torch.bfloat16)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    ours, theirs = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "theirs" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(ours[name], tensor), name
    with Reader(tmp_path / "ours") as reader:
        assert {name: reader.shape(name) for name in reader.names} == tensor_names.tensor_shapes(network(kind))


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_loaded_as_it_was_saved(kind: str, tied: bool, tmp_path: Path, network: Network) -> None:
    model = random_model(network(kind, tie_word_embeddings=tied))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    ours, theirs = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert torch.equal(parameter, ours[name]), name
        assert parameter.requires_grad


def test_weights_are_cast_on_the_way_out_and_on_the_way_in(tmp_path: Path, network: Network) -> None:
    model = random_model(network("qwen2_moe"))
    save_model(model, tmp_path, dtype=torch.bfloat16)
    with Reader(tmp_path) as reader:
        assert {reader.dtype(name) for name in reader.names} == {torch.bfloat16}
    wide, narrow = load_model(tmp_path), load_model(tmp_path, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(wide.get_parameter(name), parameter.bfloat16().float())
        assert torch.equal(narrow.get_parameter(name), parameter.bfloat16())
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_transformers_generates_what_we_would_without_a_warning(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, network: Network
) -> None:
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    model = random_model(network(kind))
    save_model(model, tmp_path, eos_token_id=49)
    tokens = torch.tensor([[1, 2, 3]])
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    generated = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False)
    while tokens.shape[1] < generated.shape[1]:
        tokens = torch.cat([tokens, model(tokens)[0][:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generated, tokens)
    assert tokens.shape[1] == 8 or tokens[0, -1] == 49
    assert caplog.records == []


def test_the_shared_expert_of_zeros_stays_zero_in_training_with_transformers(tmp_path: Path, network: Network) -> None:
    save_model(random_model(network("qwen2_moe")), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    theirs(torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    shared = [parameter for name, parameter in theirs.named_parameters() if ".shared_expert" in name]
    assert len(shared) == 3 * 4
    assert not any(parameter.any() for parameter in shared)
    assert not any(parameter.grad is None or parameter.grad.any() for parameter in shared)


def test_config_json_of_transformers_4_is_understood() -> None:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 7e4,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    config = config_from_dict(values)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta) == (4, 8, 7e4)
    assert not config.tie_word_embeddings
    mixtral = {"architectures": ["MixtralForCausalLM"], "num_key_value_heads": 2}
    mixtral |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    without_theta = {key: value for key, value in values.items() if key != "rope_theta"}
    assert config_from_dict(without_theta).rope_theta == 1e4
    assert config_from_dict(without_theta | mixtral).rope_theta == 1e6


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        "['GPT2LMHeadModel'] with model_type 'gpt2'",
    ),
    ("llama", {"architectures": None, "model_type": "gemma"}, "model_type 'gemma' is not a model that can be read"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "without 'low_freq"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "rope_type 'dynamic'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"attention_bias": True}, "attention_bias true"),
    ("llama", {"mlp_bias": True}, "mlp_bias true"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"hidden_size": "wide"}, "hidden_size: 'wide'"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 is not between 1 and num_experts 4"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "'sliding_attention'"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0"),
    ("qwen2_moe", {"mlp_only_layers": [0, 1, 2]}, "mlp_only_layers names all 3 layers"),
    ("qwen2_moe", {"mlp_only_layers": [3]}, "mlp_only_layers [3] is not a rising list of layers from 0 to 2"),
    ("qwen2_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size 0 leaves experts without neurons"),
    ("qwen3", {"attention_bias": True}, "attention_bias true"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ("olmoe", {"head_dim": 8}, "4 heads of 8 channels make the hidden_size 24"),
]


@pytest.mark.parametrize(("kind", "changes", "problem"), REFUSED, ids=[problem for *_, problem in REFUSED])
def test_a_model_that_we_would_compute_differently_is_refused_in_one_line(
    kind: str, changes: dict[str, Any], problem: str, network: Network
) -> None:
    values = config_to_dict(network(kind), dtype="float32")
    assert config_from_dict(values) == network(kind)
    with pytest.raises(UserError) as caught:
        config_from_dict(values | changes, where="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json")
    assert problem in message
    assert "\n" not in message


def test_a_config_without_its_sizes_is_refused_naming_the_first(kind: str, network: Network) -> None:
    values = config_to_dict(network(kind), dtype="float32")
    for key in ("vocab_size", "rms_norm_eps", "num_attention_heads"):
        with pytest.raises(UserError, match=f"config.json: '{key}' is missing"):
            config_from_dict({name: value for name, value in values.items() if name != key})


def test_every_other_layer_may_be_dense_by_step_or_by_list(network: Network) -> None:
    values = config_to_dict(network("qwen3_moe", num_hidden_layers=5, mlp_only_layers=()), dtype="float32")
    assert config_from_dict(values | {"decoder_sparse_step": 2}).mlp_only_layers == (0, 2, 4)
    assert config_from_dict(values | {"decoder_sparse_step": 2, "mlp_only_layers": [1]}).mlp_only_layers == (0, 1, 2, 4)
    assert config_from_dict(values | {"mlp_only_layers": [3]}).mlp_only_layers == (3,)


def test_a_sliding_window_that_is_off_is_none(network: Network) -> None:
    off = {"use_sliding_window": False, "sliding_window": 16, "layer_types": ["full_attention"] * 3}
    assert config_from_dict(config_to_dict(network("qwen2"), dtype="float32") | off) == network("qwen2")


def test_a_mistral_config_that_does_not_mention_its_window_has_one(network: Network) -> None:
    values = config_to_dict(network("llama", num_attention_heads=10, max_position_embeddings=8192), dtype="float32")
    assert config_from_dict(values).sliding_window is None
    del values["sliding_window"]
    assert config_from_dict(values).sliding_window == 4096


def refusal(directory: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_directory_without_or_with_a_broken_config_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert refusal(tmp_path).startswith(f"{path}: no such file")
    for text, problem in (("{", "is not JSON"), ("[1]", "holds list"), ("{}", "architectures")):
        path.write_text(text, encoding="utf-8")
        assert refusal(tmp_path).startswith(f"{path}: {problem}")


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the file with tensors replaced or added, or removed where the new one is None."""
    tensors: dict[str, torch.Tensor | None] = {**load_file(directory / WEIGHTS), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, directory / WEIGHTS)


def test_weights_that_do_not_fit_the_config_are_refused_by_name(tmp_path: Path, network: Network) -> None:
    save_model(random_model(network("llama")), tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    for tensor, problem in (
        (None, f"there is no tensor '{name}'"),
        (torch.zeros(40, 25), f"tensor '{name}' has shape (40, 25), config.json declares (40, 24)"),
    ):
        edit_weights(tmp_path, **{name: tensor})
        assert refusal(tmp_path).startswith(f"{tmp_path}: {problem}")
        (tmp_path / WEIGHTS).write_bytes(whole)
    extra = "model.layers.0.self_attn.q_norm.weight"
    edit_weights(tmp_path, **{extra: torch.ones(8)})
    assert refusal(tmp_path).startswith(f"{tmp_path}: tensor '{extra}' has no place in LlamaForCausalLM")


def test_a_shared_expert_that_does_something_is_refused(tmp_path: Path, network: Network) -> None:
    save_model(random_model(network("qwen2_moe")), tmp_path)
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    edit_weights(tmp_path, **{name: torch.eye(24)[:, :8].contiguous()})
    assert refusal(tmp_path).startswith(f"{tmp_path}: tensor '{name}' is not zero")


def test_what_older_files_repeat_is_passed_over(tmp_path: Path, network: Network) -> None:
    model = random_model(network("llama", tie_word_embeddings=True))
    save_model(model, tmp_path)
    embedding = model.model.embed_tokens.weight.detach()
    edit_weights(
        tmp_path,
        **{"lm_head.weight": embedding.clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    )
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.lm_head.weight, embedding)


def test_loading_into_a_model_of_another_shape_changes_nothing_silently(tmp_path: Path, network: Network) -> None:
    save_model(random_model(network("llama")), tmp_path)
    with pytest.raises(UserError, match=r"model\.layers\.1\..* has no place in LlamaForCausalLM"):
        load_state(Decoder(network("llama", num_hidden_layers=1)), tmp_path)


@pytest.mark.parametrize(("stored", "expected"), [(7, 7), (0, 0), (None, None), ([5, 6], 5), ([], None)])
def test_the_end_of_text_token_is_read_back(
    stored: Any, expected: int | None, tmp_path: Path, network: Network
) -> None:
    write_config(tmp_path, network("llama"), "float32", eos_token_id=stored)
    assert read_eos_token_id(tmp_path) == expected
    assert read_config(tmp_path) == network("llama")


def test_companions_are_the_files_that_are_neither_weights_nor_config(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "original").mkdir(parents=True)
    kept = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "LICENSE"}
    weights = {WEIGHTS, "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin"}
    for name in kept | weights | {"config.json", "README.md", ".gitattributes", "model.safetensors.partial"}:
        (source / name).write_text(name, encoding="utf-8")
    copy_companions(source, target)
    assert {path.name for path in target.iterdir()} == kept
    assert all((target / name).read_text(encoding="utf-8") == name for name in kept)
