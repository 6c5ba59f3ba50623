"""Scaled rotary embeddings and sliding windows: what training computes is what transformers computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aquilamoe.checkpoint.hf_config import config_from_dict, config_to_dict
from aquilamoe.checkpoint.state_dict import load_model, save_model
from aquilamoe.config import graph
from aquilamoe.config.evaluation import GenerationConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig
from aquilamoe.evaluation.generation import continuations
from aquilamoe.model.kernels.choice import Kernels
from aquilamoe.model.transformer import Decoder
from aquilamoe.training import example
from aquilamoe.training.parallel import ParallelContext
from judge import open_with_transformers, randomize

Network = Callable[..., ModelConfig]
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0},
}
UNCOMPUTED: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
}
SOME = {"sliding_window": 7, "layer_types": ("sliding_attention", "full_attention", "sliding_attention")}
# What every family computes; the others have no windows.
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 7},
    "qwen2": SOME,
    "qwen3": SOME,
    "mixtral": {"sliding_window": 7},
    "qwen2_moe": SOME,
    "qwen2_moe shared": {"sliding_window": 7},
    "qwen3_moe": {"sliding_window": 7},
}
LENGTH = 40


def decoder(config: ModelConfig) -> Decoder:
    model = Decoder(config)
    randomize(model)
    return model


def tokens_of(config: ModelConfig) -> Tensor:
    return torch.randint(config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def off(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.std()).item()


@pytest.mark.parametrize("rope", [None, *ROPES])
def test_logits_and_loss_are_those_of_transformers_in_every_family(
    kind: str, rope: str | None, network: Network, tmp_path: Path
) -> None:
    changes = WINDOWS.get(kind, {}) | ({"rope_scaling": ROPES[rope]} if rope else {})
    if not changes:
        return
    config = network(kind, **changes)
    model, tokens_bt = decoder(config), tokens_of(config)
    save_model(model, tmp_path / "ours")
    theirs = open_with_transformers(tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(tokens_bt, labels=tokens_bt)
        logits_btv, _ = model(tokens_bt)
        loss, _ = model(tokens_bt[:, :-1], tokens_bt[:, 1:])
        plain = Decoder(network(kind))
        plain.load_state_dict(model.state_dict())
        assert off(plain(tokens_bt)[0], logits_btv) > 1e-2, "what is set matters"
    assert off(logits_btv, expected.logits) < 1e-5
    if not config.is_moe:  # theirs adds the router's loss
        assert abs(loss.item() - expected.loss.item()) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_model(tmp_path / "theirs")
    assert read.config == config
    assert torch.equal(read(tokens_bt)[0], logits_btv)


@pytest.mark.parametrize("rope", ROPES)
def test_config_json_is_the_same_model_in_the_spelling_of_transformers_4(rope: str, network: Network) -> None:
    for kind, windows in WINDOWS.items():
        config = network(kind, rope_scaling=ROPES[rope], **windows)
        values = json.loads(json.dumps(config_to_dict(config, dtype="float32")))
        assert config_from_dict(values) == config
        old = {key: value for key, value in values.items() if key != "rope_parameters"}
        assert config_from_dict(old) == config
        old["rope_scaling"] = {"type" if key == "rope_type" else key: value for key, value in ROPES[rope].items()}
        assert config_from_dict(old) == config
        new = {key: value for key, value in values.items() if key not in ("rope_scaling", "rope_theta")}
        assert config_from_dict(new) == config


def test_windows_are_read_as_each_family_derives_them(network: Network) -> None:
    on = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "layer_types": None}
    for kind, windows in (
        ("qwen2", [None, 7, 7]),
        ("qwen3", [None, 7, 7]),
        ("qwen2_moe", [7, None, None]),
        ("qwen3_moe", [7, 7, 7]),
        ("mixtral", [7, 7, 7]),
        ("llama", [None, None, None]),
    ):
        config = config_from_dict(config_to_dict(network(kind), dtype="float32") | on)
        assert [config.window(layer) for layer in range(3)] == windows, kind


def gradients(model: Decoder, tokens_bt: Tensor) -> dict[str, Tensor]:
    loss, _ = model(tokens_bt[:, :-1], tokens_bt[:, 1:])
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_gradients_are_those_of_transformers_also_recomputed_and_in_either_kernel(
    network: Network, tmp_path: Path
) -> None:
    config = network("qwen3", rope_scaling=ROPES["yarn"], **SOME)
    model, tokens_bt = decoder(config), tokens_of(config)
    save_model(model, tmp_path)
    theirs = open_with_transformers(tmp_path)
    logits_btv = theirs(tokens_bt).logits
    F.cross_entropy(logits_btv[:, :-1].flatten(0, 1), tokens_bt[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for attention in ("sdpa", "explicit"):
        group = ParallelContext(example.cluster(activation_checkpointing=True, attention=attention))
        recomputed = group.build(config, "fp32")
        recomputed.load_state_dict(model.state_dict())
        model.use(Kernels(attention=attention))
        model.zero_grad()
        found = gradients(model, tokens_bt)
        again = gradients(recomputed, tokens_bt)
        assert found.keys() == expected.keys() == again.keys()
        for name, gradient in expected.items():
            assert gradient is not None
            assert (found[name] - gradient).abs().max() < 1e-5 * gradient.abs().max() + 1e-6, name
            assert torch.equal(found[name], again[name]), name


@pytest.mark.parametrize(("kind", "rope"), [("mistral", "yarn"), ("qwen3", "llama3")])
def test_greedy_continuations_are_those_of_transformers_with_its_cache(
    kind: str, rope: str, network: Network, tmp_path: Path
) -> None:
    config = network(kind, rope_scaling=ROPES[rope], **WINDOWS[kind])
    model, prompt = decoder(config), tokens_of(config)[:1, :20]
    save_model(model, tmp_path)
    theirs: Any = open_with_transformers(tmp_path)
    generated = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    settings = GenerationConfig(max_new_tokens=12, temperature=0.0)
    assert continuations(model, prompt.tolist(), settings, None)[0] == generated[0, 20:].tolist()


@pytest.mark.parametrize("name", UNCOMPUTED)
def test_what_training_does_not_compute_is_refused_with_what_does(
    name: str, network: Network, compose: Callable[..., dict[str, Any]]
) -> None:
    scaling = UNCOMPUTED[name]
    values = config_to_dict(network("llama", rope_scaling=scaling), dtype="float32")
    experiment = compose("model.head_dim=8")
    experiment["stages"]["prepare"]["model"]["rope_scaling"] = scaling
    for refused in (
        lambda: config_from_dict(values, "some/config.json"),
        lambda: graph.build(graph.parse(experiment)),
    ):
        with pytest.raises(UserError, match=f"rope_type '{name}', which is grown and upcycled") as caught:
            refused()
        assert "\n" not in str(caught.value)


def test_flops_count_the_keys_that_windows_see(network: Network) -> None:
    length, full = 32, network("qwen2")
    per_key = 6 * full.num_attention_heads * full.head_dim
    for window, types in ((8, ()), (8, SOME["layer_types"]), (length, ()), (length + 1, ())):
        config = network("qwen2", sliding_window=window, layer_types=types)
        saved = 0.0
        for layer in range(3):
            seen = min(length, config.window(layer) or length)
            saved += length - (2 * sum(min(t + 1, seen) for t in range(length)) - seen) / length
        assert full.flops_per_token(length) - config.flops_per_token(length) == per_key * saved
