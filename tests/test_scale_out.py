"""Scale-Out on files: experts that equal the dense model, experts with noise, and what is refused."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig, UpcyclingConfig
from aquilamoe.growth import rules
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.model import Decoder
from aquilamoe.weights import names
from aquilamoe.weights.huggingface import load_model, read_config, read_eos_token_id, save_model
from aquilamoe.weights.store import Reader

ROOT = Path(__file__).resolve().parents[1]
COPY = UpcyclingConfig(method="copy", noise=0.0, router_std=0.02)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 32,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "qkv_bias": True,
        "tie_word_embeddings": False,
        "num_experts": 0,
        "num_experts_per_tok": 0,
    }
    return ModelConfig.model_validate(sizes | changes)


def experts(number: int = 4, chosen: int = 2, **changes: Any) -> ModelConfig:
    return model(num_experts=number, num_experts_per_tok=chosen, **changes)


@torch.no_grad()
def write_source(directory: Path, config: ModelConfig, dtype: torch.dtype = torch.float64) -> Path:
    """A checkpoint as training leaves it: no gain is one, no bias zero, and every part of the network matters."""
    decoder = Decoder(config).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_matrix = parameter.dim() >= 2 and "embed" not in name
        parameter.copy_(
            noise / parameter.shape[-1] ** 0.5 if is_matrix else noise * 0.5 + (1.0 if "norm" in name else 0.0)
        )
    save_model(decoder, directory, dtype, eos_token_id=3)
    return directory


def upcycle(
    directory: Path, target: ModelConfig, how: UpcyclingConfig = COPY, seed: int = 0, name: str = "target"
) -> Path:
    scale_out(directory / "source", directory / name, target, how, seed)
    return directory / name


@torch.no_grad()
def difference(source: Path, target: Path) -> float:
    tokens_bt = torch.arange(24).view(2, 12) * 5 % 32
    before, after = (load_model(directory, torch.float64)(tokens_bt)[0] for directory in (source, target))
    assert before.abs().max() > 0.5
    return (before - after).abs().max().item()


def tensors(directory: Path) -> dict[str, Tensor]:
    with Reader(directory) as reader:
        return {name: reader.get(name).clone() for name in reader.names}


@given(
    number=st.integers(2, 6),
    chosen=st.integers(1, 6),
    qkv_bias=st.booleans(),
    tied=st.booleans(),
    router_std=st.sampled_from([0.0, 0.02, 0.141, 2.0]),
)
@settings(derandomize=True, deadline=None, max_examples=30)
def test_copied_experts_compute_what_the_dense_model_does(
    number: int, chosen: int, qkv_bias: bool, tied: bool, router_std: float
) -> None:
    source = model(qkv_bias=qkv_bias, tie_word_embeddings=tied)
    target = experts(number, min(number, chosen), qkv_bias=qkv_bias, tie_word_embeddings=tied)
    how = UpcyclingConfig(method="copy", noise=0.0, router_std=router_std)
    assert rules.preserves(how, source, target)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_source(directory / "source", source)
        assert difference(directory / "source", upcycle(directory, target, how)) < 1e-10


@pytest.mark.parametrize("qkv_bias", [False, True], ids=["Mixtral", "Qwen2-MoE"])
def test_transformers_agrees_that_dense_and_upcycled_checkpoint_are_one_function(
    qkv_bias: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    write_source(tmp_path / "source", model(qkv_bias=qkv_bias), torch.float32)
    upcycle(tmp_path, experts(qkv_bias=qkv_bias))
    tokens_bt = torch.arange(24).view(2, 12) * 5 % 32
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(tokens_bt).logits
            for name in ("source", "target")
        )
    assert before.abs().max() > 0.5
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_noise_makes_every_expert_different_by_that_fraction(noise: float, tmp_path: Path) -> None:
    source, target = model(hidden_size=48, intermediate_size=64), experts(hidden_size=48, intermediate_size=64)
    how = UpcyclingConfig(method="noise", noise=noise, router_std=0.02)
    write_source(tmp_path / "source", source)
    upcycle(tmp_path, target, how)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    for role in (names.GATE, names.UP, names.DOWN):
        dense = before[names.layer_name(source, 1, role)]
        grown = [after[names.layer_name(target, 1, names.expert_role(expert, role))] for expert in range(4)]
        for expert in grown:
            assert (expert - dense).std() / dense.std() == pytest.approx(noise, rel=0.1)
        assert all(grown[i].ne(grown[j]).any() for i in range(4) for j in range(i))
    assert not rules.preserves(how, source, target)
    assert difference(tmp_path / "source", tmp_path / "target") > 1e-4


def test_routers_are_drawn_and_everything_but_the_feed_forward_is_copied(tmp_path: Path) -> None:
    source, target = model(hidden_size=64), experts(8, hidden_size=64)
    write_source(tmp_path / "source", source)
    how = UpcyclingConfig(method="noise", noise=0.5, router_std=0.141)
    upcycle(tmp_path, target, how)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    assert set(after) == set(names.tensor_shapes(target))
    routers = [after[names.layer_name(target, layer, names.ROUTER)] for layer in range(2)]
    assert torch.stack(routers).std().item() == pytest.approx(0.141, rel=0.1)
    assert routers[0].ne(routers[1]).all()
    kept = set(before) & set(after)
    assert {name for name in before if name not in kept} == {
        names.layer_name(source, layer, role) for layer in range(2) for role in (names.GATE, names.UP, names.DOWN)
    }
    for name in kept:
        assert torch.equal(before[name], after[name])


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    how = UpcyclingConfig(method="noise", noise=0.1, router_std=0.02)
    directories = [upcycle(tmp_path, experts(), how, seed, name) for seed, name in ((1, "a"), (1, "b"), (2, "c"))]
    first, second, other = ((directory / "model.safetensors").read_bytes() for directory in directories)
    assert first == second
    assert first != other


def test_upcycling_keeps_the_dtype_the_bytes_and_the_files_beside_the_weights(tmp_path: Path) -> None:
    source, target = model(), experts(max_position_embeddings=64)
    write_source(tmp_path / "source", source, torch.bfloat16)
    (tmp_path / "source/tokenizer.json").write_text("{}")
    upcycle(tmp_path, target)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "target")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    for expert in range(4):
        name = names.layer_name(target, 0, names.expert_role(expert, names.DOWN))
        assert torch.equal(after[name], before[names.layer_name(source, 0, names.DOWN)])
    assert (tmp_path / "target/tokenizer.json").read_text() == "{}"
    assert read_config(tmp_path / "target") == target
    assert read_eos_token_id(tmp_path / "target") == 3


def test_progress_counts_every_tensor_once(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    seen: list[tuple[int, int]] = []
    scale_out(tmp_path / "source", tmp_path / "target", experts(), COPY, 0, lambda done, of: seen.append((done, of)))
    total = len(names.tensor_shapes(experts()))
    assert seen == [(done, total) for done in range(total + 1)]


def test_every_upcycling_has_a_yaml_that_says_all_of_it() -> None:
    files = {path.stem: path for path in (ROOT / "conf/upcycling").glob("*.yaml")}
    assert sorted(files) == ["copy", "noise"]
    for name, path in files.items():
        how = UpcyclingConfig.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
        assert how.method == name
        keys = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert [line.partition(":")[0] for line in keys] == list(UpcyclingConfig.model_fields)
        assert all(" # " in line for line in keys)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (model(), "num_experts: target 0, source 0; .* set num_experts to at least 2"),
        (experts(hidden_size=32), "hidden_size: target 32, source 16; .* change them in a scale_up stage before it"),
        (experts(intermediate_size=6), "intermediate_size: target 6, source 12; a scale-out keeps the sizes"),
        (experts(num_hidden_layers=3), "num_hidden_layers: target 3, source 2; "),
        (experts(num_attention_heads=8), "num_attention_heads: target 8, source 4; "),
        (experts(num_key_value_heads=4), "num_key_value_heads: target 4, source 2; "),
        (experts(head_dim=8), "head_dim: target 8, source 4; a scale-out cannot change it, keep the source's"),
        (experts(vocab_size=33), "vocab_size: target 33, source 32; "),
        (experts(qkv_bias=False), "qkv_bias: target False, source True; "),
        (experts(max_position_embeddings=8), "max_position_embeddings: target 8 is smaller than the source's 32; "),
    ],
)
def test_an_upcycling_that_cannot_be_done_is_refused_before_anything_is_written(
    target: ModelConfig, message: str, tmp_path: Path
) -> None:
    write_source(tmp_path / "source", model())
    with pytest.raises(UserError, match=message) as error:
        upcycle(tmp_path, target)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "target").exists()


def test_a_mixture_of_experts_is_not_upcycled_again(tmp_path: Path) -> None:
    write_source(tmp_path / "source", experts())
    with pytest.raises(UserError, match="num_experts: target 8, but the source already has 4 experts; "):
        upcycle(tmp_path, experts(8))
