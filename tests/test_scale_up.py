"""Scale-Up on files: which growths keep the function, which do not, and where every row comes from."""

import math
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pydantic import ValidationError
from torch import Tensor

import aquilamoe.growth.methods
from aquilamoe.config import plugins
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth import rules
from aquilamoe.growth.depth import RULES
from aquilamoe.growth.methods import hypercloning
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.model import Decoder
from aquilamoe.weights import names
from aquilamoe.weights.huggingface import load_model, read_config, read_eos_token_id, save_model
from aquilamoe.weights.store import Reader

ROOT = Path(__file__).resolve().parents[1]
METHODS = plugins.names("growth/methods")
SAME, DIFFERENT = 1e-10, 1e-6  # of logits around 1, in float64


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model(**changes: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
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


def growth(**changes: Any) -> GrowthConfig:
    plain = {"method": "fpi", "scope": "all", "norm": "exact", "maps": "circular", "noise": 0.0}
    return GrowthConfig.model_validate(plain | {"depth": "interpolate", "new_layers": "copy"} | changes)


def padded(source: ModelConfig, how: GrowthConfig, **sizes: Any) -> ModelConfig:
    """The source with other sizes, and the epsilon that goes with them."""
    target = source.model_copy(update=sizes)
    return target.model_copy(update={"rms_norm_eps": how.grown_eps(source, target.hidden_size)})


@torch.no_grad()
def write_source(directory: Path, config: ModelConfig, dtype: torch.dtype = torch.float64) -> Path:
    """A checkpoint as training leaves it: no gain is one, no bias zero, and every part of the network matters."""
    decoder = Decoder(config).double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_matrix = parameter.dim() == 2 and "embed" not in name
        parameter.copy_(
            noise / parameter.shape[1] ** 0.5 if is_matrix else noise * 0.5 + (1.0 if "norm" in name else 0.0)
        )
    save_model(decoder, directory, dtype, eos_token_id=3)
    return directory


def grow(directory: Path, target: ModelConfig, how: GrowthConfig, seed: int = 0, name: str = "target") -> Path:
    scale_up(directory / "source", directory / name, target, how, seed)
    return directory / name


@torch.no_grad()
def logits(directory: Path, dtype: torch.dtype = torch.float64) -> Tensor:
    tokens_bt = torch.arange(24).view(2, 12) * 5 % 32
    return load_model(directory, dtype)(tokens_bt)[0]


def difference(source: Path, target: Path) -> float:
    """Of the logits of the source's tokens."""
    before, after = logits(source), logits(target)
    return (before - after[..., : before.shape[-1]]).abs().max().item()


def tensor(directory: Path, name: str) -> Tensor:
    with Reader(directory) as reader:
        return reader.get(name).clone()


@st.composite
def growths(draw: st.DrawFn) -> tuple[ModelConfig, ModelConfig, GrowthConfig]:
    """Small sources with targets that can be made of them, by every method and with every option."""
    number, one_of = st.integers, st.sampled_from
    groups, slots, more_groups = draw(number(1, 2)), draw(number(1, 3)), draw(number(0, 3))
    new_groups = groups + more_groups
    fewest = -(-slots // (new_groups // groups))
    new_slots = draw(number(fewest, fewest + 3))
    hidden, ffn, layers = draw(number(2, 7)), draw(number(2, 7)), draw(number(1, 3))
    source = model(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=groups * slots,
        num_key_value_heads=groups,
        head_dim=draw(one_of([2, 4])),
        rms_norm_eps=draw(one_of([1e-5, 0.1])),  # the larger one is missed when it is wrong
        qkv_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )
    sizes = {
        "vocab_size": 32 + draw(one_of([0, 0, 5])),
        "hidden_size": draw(one_of([hidden, 2 * hidden, hidden + draw(number(0, 2 * hidden))])),
        "intermediate_size": ffn + draw(number(0, 2 * ffn)),
        "num_hidden_layers": layers + draw(number(0, 4)),
        "num_attention_heads": new_groups * new_slots,
        "num_key_value_heads": new_groups,
        "head_dim": source.head_dim * draw(one_of([1, 1, 2, 3])),
    }
    # One in three keeps its width, and as many their depth: the claims differ there.
    kept = draw(one_of(["width", "depth", "nothing"]))
    if kept == "width":
        sizes = {"num_hidden_layers": sizes["num_hidden_layers"]}
    elif kept == "depth":
        del sizes["num_hidden_layers"]
    deep = sizes.get("num_hidden_layers", layers)
    listed = draw(st.lists(number(0, layers - 1), min_size=deep, max_size=deep))
    how = growth(
        method=draw(one_of(["fpi", "fpi", *METHODS])),
        scope=draw(one_of(["all", "inner", "transplant"])),
        norm=draw(one_of(["exact", "copy", "zero_pad"])),
        maps=draw(one_of(["circular", "sampled"])),
        noise=draw(one_of([0.0, 0.5])),
        depth=draw(one_of([*RULES, listed, sorted(listed)])),
        new_layers=draw(one_of(["copy", "zero", "zero", "scaled"])),
    )
    if how.method == "lemon":
        how = how.model_copy(update={"norm": "zero_pad", "new_layers": "zero"})
    if how.method == "hypercloning":
        sizes |= {field: draw(number(1, 3)) * getattr(source, field) for field in hypercloning.SIZES}
        sizes["num_attention_heads"] *= sizes["num_key_value_heads"] // groups
    return source, padded(source, how, **sizes), how


@given(growths())
@settings(derandomize=True, deadline=None, max_examples=300)
def test_a_growth_keeps_the_function_exactly_when_it_claims_to(
    case: tuple[ModelConfig, ModelConfig, GrowthConfig],
) -> None:
    source, target, how = case
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_source(directory / "source", source)
        measured = difference(directory / "source", grow(directory, target, how))
    if rules.preserves(how, source, target):
        assert measured < SAME
    else:
        assert measured > DIFFERENT


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 16},
        {"hidden_size": 10, "intermediate_size": 15, "num_attention_heads": 10},  # 4 -> 5 heads per group
        {"hidden_size": 10, "intermediate_size": 15, "num_attention_heads": 12, "num_key_value_heads": 3},
        {"hidden_size": 10, "num_attention_heads": 10, "num_hidden_layers": 5},
    ],
    ids=["x2", "x1.25", "x1.25 with a third KV group", "x1.25 and deeper"],
)
def test_function_preserving_growth_keeps_the_logits(
    sizes: dict[str, int], noise: float, qkv_bias: bool, tied: bool, tmp_path: Path
) -> None:
    source = model(qkv_bias=qkv_bias, tie_word_embeddings=tied)
    target, how = source.model_copy(update=sizes), growth(noise=noise, new_layers="zero")
    write_source(tmp_path / "source", source)
    assert rules.preserves(how, source, target)
    assert difference(tmp_path / "source", grow(tmp_path, target, how)) < SAME


def test_plain_copies_of_norms_are_exact_at_integer_ratios_only(tmp_path: Path) -> None:
    source, how = model(), growth(norm="copy")
    write_source(tmp_path / "source", source)
    double, quarter = model(hidden_size=16), model(hidden_size=10)
    assert rules.preserves(how, source, double)
    assert difference(tmp_path / "source", grow(tmp_path, double, how, name="double")) < SAME
    assert not rules.preserves(how, source, quarter)
    assert difference(tmp_path / "source", grow(tmp_path, quarter, how, name="quarter")) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_only_methods_that_copy_survive_a_growth_in_width(method: str, tmp_path: Path) -> None:
    source, how = model(), growth(method=method)
    if method == "lemon":
        how = growth(method=method, norm="zero_pad", new_layers="zero")
    sizes = {"hidden_size": 16, "num_attention_heads": 16} if method == "hypercloning" else {"hidden_size": 10}
    target = padded(source, how, **{"num_attention_heads": 10, **sizes})
    write_source(tmp_path / "source", source)
    preserving = method in ("fpi", "lemon", "hypercloning")
    assert rules.preserves(how, source, target) == preserving
    assert (difference(tmp_path / "source", grow(tmp_path, target, how)) < 1e-3) == preserving


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("hidden", [9, 16, 21], ids=["x1.125", "x2", "x2.625"])
def test_zero_padding_is_exact_at_any_ratio_with_the_epsilon_that_goes_with_it(
    hidden: int, tied: bool, tmp_path: Path
) -> None:
    source, how = model(rms_norm_eps=0.1, tie_word_embeddings=tied), growth(norm="zero_pad", noise=0.5)
    target = padded(source, how, hidden_size=hidden)
    assert target.rms_norm_eps == 0.1 * (hidden // 8 * 8) / hidden
    write_source(tmp_path / "source", source)
    assert difference(tmp_path / "source", grow(tmp_path, target, how)) < SAME
    if hidden % 8:
        with pytest.raises(UserError, match=f"rms_norm_eps: target 0.1, .* set rms_norm_eps to {target.rms_norm_eps}"):
            rules.check(source, source.model_copy(update={"hidden_size": hidden}), how)


def test_padding_is_zero_where_it_is_written_and_random_where_it_is_read(tmp_path: Path) -> None:
    source, how = model(hidden_size=32, intermediate_size=64), growth(norm="zero_pad")
    write_source(tmp_path / "source", source)
    target = padded(source, how, hidden_size=32 + 16)
    grow(tmp_path, target, how)
    down = tensor(tmp_path / "target", names.layer_name(target, 1, names.DOWN))
    assert not down[32:].any()
    assert down[:32].all()
    assert not tensor(tmp_path / "target", names.EMBEDDING)[:, 32:].any()
    for role in (names.UP, names.Q_WEIGHT):
        read = tensor(tmp_path / "target", names.layer_name(target, 1, role))
        assert read[:, 32:].std().item() == pytest.approx(read[:, :32].std().item(), rel=0.2)
    assert torch.linalg.matrix_rank(tensor(tmp_path / "target", names.layer_name(target, 1, names.UP))) == 48


@pytest.mark.parametrize("ratio", [2, 3])
def test_heads_grow_by_an_integer_and_old_pairs_turn_as_before(ratio: int, tmp_path: Path) -> None:
    source, how = model(), growth()
    target = source.model_copy(update={"head_dim": 4 * ratio})
    write_source(tmp_path / "source", source)
    assert difference(tmp_path / "source", grow(tmp_path, target, how)) < SAME
    before, after = (
        tensor(tmp_path / name, "model.layers.0.self_attn.q_proj.bias").view(8, 2, -1) for name in ("source", "target")
    )
    torch.testing.assert_close(after[..., ::ratio], before * ratio**0.5, atol=0, rtol=1e-12)
    assert not after[..., 1::ratio].any()
    keys = tensor(tmp_path / "target", "model.layers.0.self_attn.k_proj.bias")
    assert keys.all()  # queries that are silent at first learn from keys that are not


def test_new_tokens_get_the_mean_embedding_and_take_no_more_than_a_mean_token(tmp_path: Path) -> None:
    for tied in (False, True):
        directory = tmp_path / str(tied)
        source = model(tie_word_embeddings=tied)
        write_source(directory / "source", source)
        grow(directory, source.model_copy(update={"vocab_size": 40, "hidden_size": 10}), growth(noise=0.5))
        before, after = logits(directory / "source"), logits(directory / "target")
        torch.testing.assert_close(after[..., :32], before, atol=SAME, rtol=0)
        torch.testing.assert_close(after[..., 32:], before.mean(-1, keepdim=True).expand(-1, -1, 8))
        divergence = after.logsumexp(-1) - before.logsumexp(-1)
        assert 0 < divergence.max() <= math.log(1 + 8 / 32)


@pytest.mark.parametrize(
    ("method", "changes", "sizes", "message"),
    [
        ("lemon", {}, {}, "growth: method lemon with norm exact and new_layers copy, .* set both, or method fpi"),
        ("hypercloning", {}, {"hidden_size": 12}, "hidden_size: target 12, source 8; .* use 8 or 16, or method fpi"),
        ("hypercloning", {}, {"intermediate_size": 13}, "intermediate_size: target 13, source 12; .* use 12 or 24"),
        (
            "fpi",
            {"depth": [0, 1]},
            {"num_hidden_layers": 3},
            "growth.depth: 2 layers in the list, num_hidden_layers is",
        ),
        ("fpi", {"depth": [0, 2]}, {}, "growth.depth: layer 2 in the list, the source has 2 layers; .* from 0 to 1"),
    ],
)
def test_what_a_method_or_a_list_of_layers_cannot_do_is_refused(
    method: str, changes: dict[str, Any], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rules.check(model(), model(**sizes), growth(method=method, **changes))


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ("stak", "'stak' is not a choice; did you mean 'stack'"),
        ([0, "1"], "is not a list of layers counted from 0"),
        ([0, -1], "is not a list of layers counted from 0"),
        (3, "3 is not a list of layers counted from 0"),
    ],
)
def test_a_depth_that_is_neither_a_rule_nor_a_list_is_one_problem(depth: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as error:
        growth(depth=depth)
    assert error.value.error_count() == 1


def test_more_groups_for_the_same_query_heads_keep_the_function_unless_keys_come_from_above(tmp_path: Path) -> None:
    source, target = model(), model(num_key_value_heads=4)
    write_source(tmp_path / "source", source)
    for method, kept in (("fpi", True), ("aki_pro", True), ("aki", False)):
        how = growth(method=method)
        assert rules.preserves(how, source, target) == kept
        assert (difference(tmp_path / "source", grow(tmp_path, target, how, name=method)) < SAME) == kept


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"noise": 0.0}, {"hidden_size": 40, "num_attention_heads": 10}),
        ({"noise": 0.5}, {"hidden_size": 40, "num_attention_heads": 10}),
        ({"maps": "sampled", "noise": 0.5}, {"hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 4}),
        ({"method": "lemon", "norm": "zero_pad", "noise": 0.5}, {"hidden_size": 40, "num_attention_heads": 10}),
        ({"method": "hypercloning", "norm": "copy", "noise": 0.5}, {"hidden_size": 64, "intermediate_size": 24}),
        ({"depth": [0, 0, 1]}, {"hidden_size": 40, "head_dim": 8, "vocab_size": 40}),
    ],
    ids=["fpi", "noise", "sampled", "lemon", "hypercloning", "head_dim and vocabulary"],
)
def test_transformers_agrees_that_source_and_grown_checkpoint_are_one_function(
    options: dict[str, Any], sizes: dict[str, int], qkv_bias: bool, tied: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = model(hidden_size=32, head_dim=4, qkv_bias=qkv_bias, tie_word_embeddings=tied)
    how = growth(**{"new_layers": "zero", **options})
    target = padded(source, how, **{"intermediate_size": 15, "num_hidden_layers": 3, **sizes})
    write_source(tmp_path / "source", source, torch.float32)
    assert rules.preserves(how, source, target)
    grow(tmp_path, target, how)
    tokens_bt = torch.arange(24).view(2, 12) * 5 % 32
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()(tokens_bt).logits
            for name in ("source", "target")
        )
    assert before.abs().max() > 0.5
    torch.testing.assert_close(after[..., :32], before, atol=1e-5 * before.abs().max().item(), rtol=0)


def mark_layers(directory: Path, config: ModelConfig) -> None:
    """A checkpoint whose every tensor in layer l is l + 1 throughout."""
    decoder = Decoder(config).double()
    with torch.no_grad():
        for index, layer in enumerate(decoder.model.layers):
            for parameter in layer.parameters():
                parameter.fill_(index + 1)
        for outer in (decoder.model.embed_tokens, decoder.model.norm, decoder.lm_head):
            outer.weight.fill_(100.0)
    save_model(decoder, directory)


AKI_SIZES = {"hidden_size": 10, "intermediate_size": 16, "num_attention_heads": 10}


@pytest.mark.parametrize("method", ["aki", "aki_pro"])
def test_new_rows_come_from_the_layer_above_and_old_rows_from_the_layer(method: str, tmp_path: Path) -> None:
    source, target = model(num_hidden_layers=3), model(num_hidden_layers=3, **AKI_SIZES)
    mark_layers(tmp_path / "source", source)
    grow(tmp_path, target, growth(method=method, norm="copy"))
    head, new = [False] * 4, [True] * 4
    group = head * 4 + new
    new_rows = {
        names.Q_WEIGHT: group * 2,
        names.Q_BIAS: group * 2,
        names.K_WEIGHT: head * 2,
        names.K_BIAS: head * 2,
        names.V_WEIGHT: head * 2,
        names.V_BIAS: head * 2,
        names.O_WEIGHT: [False] * 8 + [True] * 2,
        names.GATE: [False] * 12 + [True] * 4,
        names.UP: [False] * 12 + [True] * 4,
        names.DOWN: [False] * 8 + [True] * 2,
        names.INPUT_NORM: [False] * 10,
        names.POST_ATTENTION_NORM: [False] * 10,
    }
    residual = torch.tensor([2.0, 2, 1, 1, 1, 1, 1, 1, 2, 2], dtype=torch.float64)
    q_channels = torch.tensor([2.0] * 4 + [1.0] * 12 + [2.0] * 4, dtype=torch.float64).repeat(2)
    ffn = torch.tensor([2.0] * 4 + [1.0] * 8 + [2.0] * 4, dtype=torch.float64)
    readers = {names.O_WEIGHT: q_channels, names.DOWN: ffn}
    assert set(new_rows) == set(names.role_shapes(target))
    for layer, (own, above) in enumerate([(1.0, 2.0), (2.0, 3.0), (3.0, 3.0)]):
        for role, is_new in new_rows.items():
            grown = tensor(tmp_path / "target", names.layer_name(target, layer, role))
            rows = torch.where(torch.tensor(is_new), above, own).double()
            expected = rows if grown.dim() == 1 else rows[:, None] / readers.get(role, residual)
            torch.testing.assert_close(grown, expected, atol=0, rtol=0, msg=f"layer {layer}, {role}")


@pytest.mark.parametrize("method", ["aki", "aki_pro"])
@pytest.mark.parametrize("scope", ["inner", "transplant"])
def test_inner_scopes_leave_what_is_written_to_the_residual_stream_to_the_layer(
    scope: str, method: str, tmp_path: Path
) -> None:
    source, target = model(num_hidden_layers=3), model(num_hidden_layers=3, **AKI_SIZES)
    mark_layers(tmp_path / "source", source)
    grow(tmp_path, target, growth(method=method, norm="copy", scope=scope))
    up, down, o_proj = (
        tensor(tmp_path / "target", names.layer_name(target, 0, role))
        for role in (names.UP, names.DOWN, names.O_WEIGHT)
    )
    assert up[:12, 2].eq(1).all()  # channel 2 has one copy: what is read of it is what the source read
    assert up[12:, 2].eq(2).all()
    fan_out = 2.0 if scope == "transplant" else 1.0
    copies_of_neurons, copies_of_heads = [0.5] * 4 + [1.0] * 8 + [fan_out / 2] * 4, [0.5] + [1.0] * 3 + [fan_out / 2]
    assert down.unique(dim=0).tolist() == [copies_of_neurons]
    heads = [share for share in copies_of_heads * 2 for _ in range(4)]
    assert o_proj.unique(dim=0).tolist() == [heads]


def test_new_groups_of_keys_come_from_the_layer_above_in_aki_and_from_their_own_in_aki_pro(tmp_path: Path) -> None:
    source, target = model(), model(num_attention_heads=16, num_key_value_heads=4)
    mark_layers(tmp_path / "source", source)
    name = names.layer_name(target, 0, names.K_BIAS)
    for method, new_groups in (("aki", 2.0), ("aki_pro", 1.0)):
        grow(tmp_path, target, growth(method=method), name=method)
        assert tensor(tmp_path / method, name).tolist() == [1.0] * 8 + [new_groups] * 8


@pytest.mark.parametrize(
    ("depth", "origins", "uppers"),
    [
        ("interpolate", [1, 1, 2, 2, 3], [2, 2, 3, 3, 3]),
        ("stack", [1, 2, 3, 1, 2], [2, 3, 3, 2, 3]),
        ("stack_top", [1, 2, 3, 2, 3], [2, 3, 3, 3, 3]),
        ([0, 2, 2, 1, 0], [1, 3, 3, 2, 1], [2, 3, 3, 3, 2]),
    ],
)
def test_the_layer_above_is_one_of_the_source_whatever_the_depth(
    depth: str | list[int], origins: list[int], uppers: list[int], tmp_path: Path
) -> None:
    mark_layers(tmp_path / "source", model(num_hidden_layers=3))
    target = model(num_hidden_layers=5, intermediate_size=13)
    grow(tmp_path, target, growth(method="aki", depth=depth))
    ups = [tensor(tmp_path / "target", names.layer_name(target, layer, names.UP)) for layer in range(5)]
    assert [up[0, 0].item() for up in ups] == origins
    assert [up[12, 0].item() for up in ups] == uppers


def test_further_copies_of_a_layer_are_copied_silenced_or_scaled(tmp_path: Path) -> None:
    source, target = model(num_hidden_layers=3), model(num_hidden_layers=5)
    write_source(tmp_path / "source", source)
    factors = {"copy": [1, 1, 1, 1, 1], "zero": [1, 0, 1, 0, 1], "scaled": [0.5, 0.5, 0.5, 0.5, 1]}
    for new_layers, expected in factors.items():
        grow(tmp_path, target, growth(new_layers=new_layers), name=new_layers)
        for layer, factor in enumerate(expected):
            for role in names.role_shapes(target):
                before = tensor(tmp_path / "source", names.layer_name(source, [0, 0, 1, 1, 2][layer], role))
                after = tensor(tmp_path / new_layers, names.layer_name(target, layer, role))
                writes = role in (names.O_WEIGHT, names.DOWN)
                torch.testing.assert_close(after, before * factor if writes else before, atol=0, rtol=0)


def test_noise_restores_the_rank_that_copies_take(tmp_path: Path) -> None:
    source, target = model(intermediate_size=20), model(hidden_size=16, intermediate_size=40)
    write_source(tmp_path / "source", source)
    name = names.layer_name(target, 0, names.UP)
    ranks = {}
    for noise in (0.0, 0.5):
        grow(tmp_path, target, growth(noise=noise), name=str(noise))
        ranks[noise] = int(torch.linalg.matrix_rank(tensor(tmp_path / str(noise), name)))
    assert ranks == {0.0: source.hidden_size, 0.5: target.hidden_size}


def test_noise_is_relative_to_the_weights_and_leaves_units_without_copies_alone(tmp_path: Path) -> None:
    source = model(hidden_size=64, intermediate_size=64)
    target = model(hidden_size=96, intermediate_size=128)
    write_source(tmp_path / "source", source)
    grow(tmp_path, target, growth(noise=0.0), name="plain")
    grow(tmp_path, target, growth(noise=0.25), name="noisy")
    for name in (names.layer_name(target, 1, names.GATE), names.HEAD):
        rms = tensor(tmp_path / "source", name).square().mean().sqrt()
        noise = tensor(tmp_path / "noisy", name) - tensor(tmp_path / "plain", name)
        assert not noise[:, 32:64].any()
        assert noise[:, :32].square().mean().sqrt() / rms == pytest.approx(0.25, rel=0.1)
        assert (noise[:, :32] + noise[:, 64:]).abs().max() < 1e-12
    rows = tensor(tmp_path / "noisy", names.layer_name(target, 1, names.GATE))
    assert (rows[:64] != rows[64:]).any(dim=1).all()  # copies of a neuron are no twins


def test_random_growth_starts_like_a_fresh_model(tmp_path: Path) -> None:
    source, target = model(), model(hidden_size=64, intermediate_size=64, initializer_range=0.03)
    write_source(tmp_path / "source", source)
    grow(tmp_path, target, growth(method="random"))
    drawn = {name: tensor(tmp_path / "target", name) for name in names.tensor_shapes(target)}
    for name, values in drawn.items():
        if name.endswith("norm.weight"):
            assert (values == 1).all()
        elif name.endswith(".bias"):
            assert not values.any()
        else:
            assert values.std().item() == pytest.approx(0.03, rel=0.1)
            assert abs(values.mean().item()) < 0.005
    assert drawn[names.EMBEDDING].ne(drawn[names.HEAD]).all()
    ups = [drawn[names.layer_name(target, layer, names.UP)] for layer in range(2)]
    assert ups[0].ne(ups[1]).all()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_weights(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    target, how = model(hidden_size=10, num_hidden_layers=3), growth(noise=0.5)
    files = [
        grow(tmp_path, target, how, seed, name) / "model.safetensors" for seed, name in ((1, "a"), (1, "b"), (2, "c"))
    ]
    first, second, other = (file.read_bytes() for file in files)
    assert first == second
    assert first != other


def test_random_numbers_of_a_tensor_do_not_depend_on_the_tensors_beside_it(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    for name, layers in (("shallow", 3), ("deep", 7)):
        grow(tmp_path, model(num_hidden_layers=layers), growth(method="random"), seed=5, name=name)
    for name in (names.layer_name(model(), 2, names.DOWN), names.HEAD):
        assert torch.equal(tensor(tmp_path / "shallow", name), tensor(tmp_path / "deep", name))


def test_a_growth_keeps_the_dtype_and_the_files_beside_the_weights(tmp_path: Path) -> None:
    source, target = model(), model(hidden_size=16)
    write_source(tmp_path / "source", source, torch.bfloat16)
    (tmp_path / "source/tokenizer.json").write_text("{}")
    grow(tmp_path, target, growth())
    with Reader(tmp_path / "target") as reader:
        assert {reader.dtype(name) for name in reader.names} == {torch.bfloat16}
        assert set(reader.names) == set(names.tensor_shapes(target))
    assert (tmp_path / "target/tokenizer.json").read_text() == "{}"
    assert read_config(tmp_path / "target") == target
    assert read_eos_token_id(tmp_path / "target") == 3
    assert difference(tmp_path / "source", tmp_path / "target") < 0.1  # halves and doubles round nowhere else


def test_progress_counts_every_tensor_once(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    target, seen = model(num_hidden_layers=3), []
    scale_up(tmp_path / "source", tmp_path / "target", target, growth(), 0, lambda done, of: seen.append((done, of)))
    total = len(names.tensor_shapes(target))
    assert seen == [(done, total) for done in range(total + 1)]


def test_growing_a_deep_model_holds_a_few_source_tensors_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_source(tmp_path / "source", model(num_hidden_layers=12))
    get, alive, most = Reader.get, weakref.WeakSet(), 0

    def watched(self: Reader, name: str) -> Tensor:
        nonlocal most
        value = get(self, name)
        alive.add(value)
        most = max(most, len(alive))
        return value

    monkeypatch.setattr(Reader, "get", watched)
    grow(tmp_path, model(num_hidden_layers=16, **AKI_SIZES), growth(method="aki"))
    assert 2 <= most <= len(names.role_shapes(model())) + 2  # a layer, and the two that are being combined


def test_a_new_method_is_one_file_and_one_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "package/growth/methods"
    folder.mkdir(parents=True)
    (folder / "quiet.py").write_text(
        "def grow(layer, upper_layer, width):\n"
        "    return {role: 0 * width.copy(role, tensor) for role, tensor in layer.items()}\n"
        "def keeps_function(units, num_layers, growth):\n"
        "    return False\n"
    )
    (tmp_path / "quiet.yaml").write_text(
        "{method: quiet, scope: all, norm: exact, maps: circular, noise: 0, depth: stack, new_layers: copy}"
    )
    with pytest.raises(ValueError, match="'quiet' is not in growth/methods"):
        growth(method="quiet")
    monkeypatch.setattr(plugins, "PACKAGE_ROOT", tmp_path / "package")
    methods = aquilamoe.growth.methods
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(folder)])
    how = GrowthConfig.model_validate(OmegaConf.to_container(OmegaConf.load(tmp_path / "quiet.yaml")))
    write_source(tmp_path / "source", model())
    assert not rules.preserves(how, model(), model(hidden_size=10))
    assert not logits(grow(tmp_path, model(hidden_size=10), how)).any()


def test_every_method_has_a_yaml_that_says_all_of_it() -> None:
    files = {path.stem: path for path in (ROOT / "conf/growth").glob("*.yaml")}
    assert sorted(files) == METHODS
    for name, path in files.items():
        how = GrowthConfig.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
        assert how.method == name
        keys = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        assert [line.partition(":")[0] for line in keys] == list(GrowthConfig.model_fields)
        assert all(" # " in line for line in keys)


def test_rules_and_methods_answer_without_torch() -> None:
    code = (
        "import sys\n"
        "from aquilamoe.config import plugins\n"
        "from aquilamoe.growth import rules\n"
        "for name in plugins.names('growth/methods'): plugins.load('growth/methods', name).keeps_function\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "platform", check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 6}, "hidden_size: target 6 is smaller than the source's 8; .* use 8 or more"),
        ({"intermediate_size": 11}, "intermediate_size: target 11 is smaller than the source's 12; "),
        ({"num_hidden_layers": 1}, "num_hidden_layers: target 1 is smaller than the source's 2; "),
        ({"num_attention_heads": 4}, "num_attention_heads: target 4 is smaller than the source's 8; "),
        ({"num_key_value_heads": 1}, "num_key_value_heads: target 1 is smaller than the source's 2; "),
        ({"max_position_embeddings": 16}, "max_position_embeddings: target 16 is smaller than the source's 32; "),
        ({"head_dim": 2}, "head_dim: target 2 is smaller than the source's 4; "),
        ({"head_dim": 6}, "head_dim: target 6, source 4; .* at integer ratios only, use 4 or 8"),
        ({"vocab_size": 31}, "vocab_size: target 31 is smaller than the source's 32; "),
        ({"rope_theta": 1e6}, "rope_theta: target 1000000.0, source 10000.0; "),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps: target 1e-06, source 1e-05; "),
        ({"qkv_bias": False}, "qkv_bias: target False, source True; "),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: target True, source False; "),
        ({"num_experts": 4, "num_experts_per_tok": 2}, "num_experts: target 4, source 0; .* a scale_out stage"),
        (
            {"num_attention_heads": 9, "num_key_value_heads": 3},
            r"num_attention_heads: target 9 in 3 groups .* source \(8 in 2 groups\); use 12 or more heads, or "
            "num_key_value_heads 2",
        ),
    ],
)
def test_a_growth_that_cannot_be_done_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_source(tmp_path / "source", model())
    with pytest.raises(UserError, match=message) as error:
        grow(tmp_path, model(**changes), growth())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "target").exists()


def test_the_heads_that_a_refusal_proposes_are_accepted() -> None:
    rules.check(model(), model(num_attention_heads=12, num_key_value_heads=3), growth())
    rules.check(model(), model(num_attention_heads=10, num_key_value_heads=2), growth())


def test_what_is_not_a_size_of_the_function_may_change() -> None:
    target = model(max_position_embeddings=64, initializer_range=0.01)
    rules.check(model(), target, growth())
    assert rules.preserves(growth(), model(), target)


def test_weights_that_are_not_what_config_json_says_are_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    write_source(tmp_path / "other", model(intermediate_size=14))
    (tmp_path / "other/config.json").replace(tmp_path / "source/config.json")
    with pytest.raises(UserError, match=r"gate_proj.weight' has shape \(12, 8\), config.json says \(14, 8\); "):
        grow(tmp_path, model(intermediate_size=28), growth())


def test_a_checkpoint_is_not_grown_onto_itself(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    with pytest.raises(UserError, match="is source and target at once"):
        grow(tmp_path, model(hidden_size=16), growth(), name="source")
    assert read_config(tmp_path / "source") == model()
