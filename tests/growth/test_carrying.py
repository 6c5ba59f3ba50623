"""What a growth does not touch is in its target: positions, special tokens, settings; judged by transformers."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from aquilamoe.checkpoint.hf_config import read_checkpoint_config, read_config
from aquilamoe.checkpoint.state_dict import load_model
from aquilamoe.config.graph import grown_model
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig
from aquilamoe.config.rope import STRETCHED
from aquilamoe.growth import rules
from aquilamoe.growth.forward import StreamedDecoder, opened
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from small_checkpoints import growth, model, upcycling

transformers.utils.logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {**LLAMA3, "original_max_position_embeddings": 16},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn of its own": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0, "truncate": False, "mscale": 0.7},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [1.0, 2.0, 3.0, 4.0],
    },
}
# Name: model type, and what its config.json has besides the sizes.
WINDOWS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": 7}),
    "qwen2 by number": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "layer_types": None},
    ),
    "qwen3 by list": (
        "qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
LARGER = {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 6, "num_hidden_layers": 5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint as transformers saves it, whose config.json then has what is named; null takes a key away."""
    folder = tmp_path_factory.mktemp("sources")

    @cache
    def saved(model_type: str) -> Path:
        torch.manual_seed(0)
        sizes = SHAPE | ({"head_dim": 8} if model_type == "qwen3" else {})
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).float()
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            wide = parameter.dim() > 1 and "embed" not in name
            parameter.data = noise / parameter.shape[-1] ** 0.5 if wide else noise / 4 + ("norm" in name)
        model.save_pretrained(folder / model_type)
        (folder / model_type / "generation_config.json").unlink(missing_ok=True)
        return folder / model_type

    def made(directory: Path, model_type: str, **changes: Any) -> Path:
        directory.mkdir()
        (directory / "model.safetensors").symlink_to("weights")
        (directory / "weights").hardlink_to(saved(model_type) / "model.safetensors")
        values = json.loads((saved(model_type) / "config.json").read_text()) | changes
        values = {key: value for key, value in values.items() if value is not None}
        (directory / "config.json").write_text(json.dumps(values))
        return directory

    return made


def old_spelling(rope: dict[str, Any]) -> dict[str, Any]:
    """As transformers 4 wrote it."""
    return {"rope_parameters": None, "rope_theta": 5e4, "rope_scaling": rope}


def new_spelling(rope: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {**rope, "rope_theta": 5e4}}


def grow(source: Path, target: Path, **sizes: Any) -> Path:
    method = growth(new_layers="zero")
    scale_up(source, target, grown_model(read_checkpoint_config(source).model, sizes, "model", method), method, 0)
    return target


def upcycle(source: Path, target: Path, **sizes: Any) -> Path:
    model = grown_model(read_checkpoint_config(source).model, EXPERTS | sizes, "model")
    scale_out(source, target, model, upcycling(), 0)
    return target


def tokens(length: int) -> Tensor:
    return torch.arange(2 * length).view(2, length) * 5 % 64


@torch.no_grad()
def judged(directory: Path, length: int = 40) -> Tensor:
    """What transformers computes."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, experts_implementation="eager")
    return model.eval()(tokens(length)).logits


@torch.no_grad()
def certified(directory: Path, length: int = 40) -> Tensor:
    """What the network of the certificate computes."""
    with opened(directory) as (checkpoint,):
        decoder = StreamedDecoder(*checkpoint)
        x_btd = decoder.embed(tokens(length))
        for layer in range(decoder.config.num_hidden_layers):
            x_btd, _ = decoder.run_layer(layer, x_btd)
        logits = decoder.normalize(x_btd) @ decoder.head_rows(0, decoder.config.vocab_size).T
        return logits.view(2, length, -1)


@torch.no_grad()
def computed(directory: Path, length: int = 40) -> Tensor:
    """What the network that trains computes."""
    return load_model(directory)(tokens(length))[0]


def off(first: Tensor, second: Tensor) -> float:
    return ((first - second).abs().max() / second.std()).item()


@pytest.mark.parametrize("spell", [old_spelling, new_spelling])
@pytest.mark.parametrize("name", ROPES)
def test_every_scaled_rotary_embedding_is_kept_by_growth_and_upcycling(
    name: str, spell: Callable[[dict[str, Any]], dict[str, Any]], make: Make, tmp_path: Path
) -> None:
    source = make(tmp_path / "source", "llama", **spell(ROPES[name]))
    expected = judged(source)
    plain = make(tmp_path / "plain", "llama", rope_theta=5e4, rope_parameters=None)
    assert off(judged(plain, 70), judged(source, 70)) > 0.01, "the scaling matters"
    assert off(certified(source), expected) < 1e-5
    assert off(certified(source, 70), judged(source, 70)) < 1e-5, "beyond the context, where some types change"
    for target in (grow(source, tmp_path / "grown", **LARGER), upcycle(source, tmp_path / "upcycled")):
        assert off(judged(target), expected) < 1e-4
        assert off(certified(target), judged(target)) < 1e-5
        values = json.loads((target / "config.json").read_text())
        assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 5e4
        assert values["rope_scaling"].items() >= ROPES[name].items()
        assert "rope_theta" not in values["rope_scaling"]
        assert values["dtype"] == values["torch_dtype"] == "float32"
    if ROPES[name]["rope_type"] in ("dynamic", "longrope"):
        with pytest.raises(UserError, match=r"rope_scaling of rope_type .* is grown and upcycled .* not computed by"):
            read_config(source)
    else:
        assert off(computed(source), expected) < 1e-5


@pytest.mark.parametrize("name", WINDOWS)
def test_every_sliding_window_is_kept_layer_by_layer(name: str, make: Make, tmp_path: Path) -> None:
    model_type, changes = WINDOWS[name]
    source = make(tmp_path / "source", model_type, **changes)
    expected = judged(source)
    assert off(certified(source), expected) < 1e-5
    target = grow(source, tmp_path / "grown", **LARGER)
    assert off(judged(target), expected) < 1e-4
    assert off(certified(target), judged(target)) < 1e-5
    assert off(computed(source), expected) < 1e-5
    if name == "qwen3 by list":  # its sparse sibling has one window for all layers
        with pytest.raises(UserError, match=r"2 of 3 layers with sliding_window 5, with num_experts 4 and qk_norm"):
            upcycle(source, tmp_path / "upcycled")
    else:
        assert off(judged(upcycle(source, tmp_path / "upcycled")), expected) < 1e-4


def test_a_window_of_all_layers_is_kept_by_the_sparse_sibling_of_qwen3(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3", use_sliding_window=True, sliding_window=5, max_window_layers=0)
    source_values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(source_values | {"layer_types": ["sliding_attention"] * 3}))
    target = upcycle(source, tmp_path / "upcycled")
    assert off(judged(target), judged(source)) < 1e-4
    assert json.loads((target / "config.json").read_text())["sliding_window"] == 5


@pytest.mark.parametrize("name", ["default", *ROPES])
def test_a_larger_head_turns_as_before_or_is_refused_under_every_scaling(name: str, make: Make, tmp_path: Path) -> None:
    rope = ROPES.get(name, {"rope_type": "default"})
    source = make(tmp_path / "source", "llama", **new_spelling(rope))
    try:
        target = grow(source, tmp_path / "grown", head_dim=16)
    except UserError as error:
        assert str(error).startswith(f"head_dim: target 16, source 8; with rope_type '{rope['rope_type']}' other ")
        assert rope["rope_type"] in ("dynamic", "yarn")
        assert not (tmp_path / "grown").exists()
        return
    for length in (10, 70):
        assert off(judged(target, length), judged(source, length)) < 1e-4


MORE_ROPES = [
    {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 0.5, "high_freq_factor": 9.0},
    {"rope_type": "linear", "factor": 8.0},
    {"rope_type": "dynamic", "factor": 2.0},
    *({"rope_type": "yarn", "factor": 4.0, "truncate": truncate} for truncate in (True, False)),
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 2.0, "truncate": False},
    {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0] * 4},
]


@pytest.mark.parametrize("rope", MORE_ROPES, ids=str)
@pytest.mark.parametrize("ratio", [2, 3])
def test_a_larger_head_is_refused_where_transformers_would_turn_it_otherwise(rope: dict[str, Any], ratio: int) -> None:
    sizes = {"head_dim": 8, "max_position_embeddings": 4096, "rope_theta": 1e4, "original_max_position_embeddings": 256}
    trained = {"original_max_position_embeddings": sizes.pop("original_max_position_embeddings")}
    scaling = rope | (trained if rope["rope_type"] in STRETCHED else {})
    source = model(**sizes, rope_scaling=scaling)
    values: dict[str, Any] = {"model_type": "llama", "num_attention_heads": 8, "hidden_size": 64}

    def turns(config: ModelConfig, length: int) -> tuple[Tensor, float]:
        """Frequencies and attention factor, of transformers alone."""
        assert config.rope_scaling is not None
        parameters = {"rope_theta": config.rope_theta, **config.rope_scaling.model_dump(mode="json")}
        made = AutoConfig.for_model(
            **values,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=parameters,
        )
        found, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](made, torch.device("cpu"), seq_len=length)
        return found, float(factor)

    target = grown_model(source, {"head_dim": 8 * ratio}, "model", growth())
    is_same = True
    for length in (10, 9000):
        (old, old_factor), (new, new_factor) = turns(source, length), turns(target, length)
        is_same &= torch.allclose(old, new[::ratio], rtol=1e-5, atol=0) and old_factor == new_factor
    if is_same:
        rules.check(source, target, growth())
    else:
        with pytest.raises(UserError, match=f"head_dim: target {8 * ratio}, source 8; with rope_type"):
            rules.check(source, target, growth())
    assert is_same or rope["rope_type"] in ("dynamic", "yarn")


def test_a_longer_context_is_refused_where_frequencies_follow_from_it(make: Make, tmp_path: Path) -> None:
    for name in ("llama3", "linear", "yarn", "yarn of its own", "longrope"):
        source = make(tmp_path / name, "llama", **new_spelling(ROPES[name]))
        target = grow(source, tmp_path / f"{name} longer", max_position_embeddings=128)
        assert off(judged(target, 70), judged(source, 70)) < 1e-5
    source = make(tmp_path / "source", "llama", **new_spelling(ROPES["dynamic"]))
    with pytest.raises(UserError, match="max_position_embeddings: target 128, source 64; with rope_type 'dynamic'"):
        grow(source, tmp_path / "target", max_position_embeddings=128)


SETTINGS = {
    "bos_token_id": 1,
    "eos_token_id": [2, 8, 9],
    "pad_token_id": 4,
    "attention_dropout": 0.125,
    "use_cache": False,
    "router_aux_loss_coef": 0.02,
    "output_router_logits": True,
    "pretraining_tp": 2,
    "initializer_range": 0.01,
    "some_field_of_the_future": {"a": [1, None]},
    "temperature": 0.5,
    "no_rope_layers": [1, 0, 1],
}
ABOUT_SOURCE = {
    "transformers_version": "4.1.0",
    "_name_or_path": "/home/user/checkpoint",
    "auto_map": {"AutoModelForCausalLM": "modeling.X"},
    "unsloth_version": "1",
}


def test_fields_that_a_growth_neither_reads_nor_changes_are_kept(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "llama", **SETTINGS, **ABOUT_SOURCE)
    for target, layers in ((grow(source, tmp_path / "grown", **LARGER), 5), (upcycle(source, tmp_path / "sparse"), 3)):
        values = json.loads((target / "config.json").read_text())
        same = {key: value for key, value in SETTINGS.items() if key != "no_rope_layers"}
        assert {key: values[key] for key in same} == same
        assert len(values["no_rope_layers"]) == layers
        assert not values.keys() & ABOUT_SOURCE.keys()
        config = AutoConfig.from_pretrained(target)
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 8, 9], 4)
        assert config.dtype == torch.float32


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("stated", [{}, {"bos_token_id": 1, "eos_token_id": [2, 8, 9], "pad_token_id": 4}])
def test_a_target_generates_as_its_source_does_also_without_generation_settings(
    model_type: str, stated: dict[str, Any], make: Make, tmp_path: Path
) -> None:
    unsaid = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    source = make(tmp_path / "source", model_type, **(unsaid | stated))
    for target in (grow(source, tmp_path / "grown", hidden_size=64), upcycle(source, tmp_path / "sparse")):
        assert not (target / "generation_config.json").exists()
        had, has = (AutoModelForCausalLM.from_pretrained(path).generation_config for path in (source, target))
        assert has.to_diff_dict() == had.to_diff_dict()


def test_what_windows_would_be_if_they_were_on_grows_with_the_layers(make: Make, tmp_path: Path) -> None:
    off_now = {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 2}
    source = make(tmp_path / "source", "qwen2", **off_now, layer_types=["full_attention"] * 3)
    values = json.loads((grow(source, tmp_path / "grown", num_hidden_layers=6) / "config.json").read_text())
    assert {key: values[key] for key in off_now} == off_now | {"max_window_layers": 4}
    assert values["layer_types"] == ["full_attention"] * 6
    values = json.loads((upcycle(source, tmp_path / "sparse") / "config.json").read_text())
    assert {key: values[key] for key in off_now} == off_now


def test_a_mistral_stays_one(make: Make, tmp_path: Path) -> None:
    source = make(tmp_path / "source", "mistral", sliding_window=None)  # the class assumes 4096
    values = json.loads((grow(source, tmp_path / "grown", hidden_size=64) / "config.json").read_text())
    assert (values["architectures"], values["sliding_window"]) == (["MistralForCausalLM"], 4096)
    values = json.loads((upcycle(source, tmp_path / "sparse") / "config.json").read_text())
    assert (values["architectures"], values["sliding_window"]) == (["MixtralForCausalLM"], 4096)
