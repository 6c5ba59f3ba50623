"""Scale-Up on files: which growths keep the function, which do not, and what a growth leaves in its directory."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aquilamoe.checkpoint import tensor_names
from aquilamoe.checkpoint.hf_config import read_config, read_eos_token_id
from aquilamoe.checkpoint.reader import SINGLE_FILE, Reader
from aquilamoe.config import plugins
from aquilamoe.config.depth import RULES
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import GrowthConfig, ModelConfig
from aquilamoe.growth import rules
from aquilamoe.growth.methods import hypercloning
from aquilamoe.growth.scale_up import scale_up
from effort import examples
from small_checkpoints import difference, grow, growth, model, padded, tensor, transformers_logits, write_source

METHODS = plugins.names("growth/methods")
SAME, DIFFERENT = 1e-10, 1e-6  # of logits around 1, in float64


@st.composite
def growths(draw: st.DrawFn, fewest_channels: int = 2) -> tuple[ModelConfig, ModelConfig, GrowthConfig]:
    """Small sources with targets that can be made of them, by every method and with every option."""
    number, one_of = st.integers, st.sampled_from
    groups, slots, more_groups = draw(number(1, 2)), draw(number(1, 3)), draw(number(0, 3))
    new_groups = groups + more_groups
    fewest = -(-slots // (new_groups // groups))
    new_slots = draw(number(fewest, fewest + 3))
    hidden, ffn, layers = fewest_channels + draw(number(0, 5)), draw(number(2, 7)), draw(number(1, 3))
    qk_norm = draw(one_of(["none", "none", "head"]))
    source = model(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=groups * slots,
        num_key_value_heads=groups,
        head_dim=draw(one_of([2, 4])),
        rms_norm_eps=draw(one_of([1e-5, 0.1])),  # the larger one is missed when it is wrong
        qk_norm=qk_norm,
        qkv_bias=qk_norm == "none" and draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )
    sizes = {
        "vocab_size": 32 + draw(one_of([0, 0, 5])),
        "hidden_size": draw(one_of([hidden, 2 * hidden, hidden + draw(number(0, 2 * hidden))])),
        "intermediate_size": ffn + draw(number(0, 2 * ffn)),
        "num_hidden_layers": layers + draw(number(0, 4)),
        "num_attention_heads": new_groups * new_slots,
        "num_key_value_heads": new_groups,
        "head_dim": source.head_dim * (draw(one_of([1, 1, 2, 3])) if qk_norm == "none" else 1),
    }
    # Some keep their width or their depth, and some grow one size only: the claims differ there.
    kept = draw(one_of(["width", "depth", "nothing", "all but one"]))
    if kept == "width":
        sizes = {"num_hidden_layers": sizes["num_hidden_layers"]}
    elif kept == "depth":
        del sizes["num_hidden_layers"]
    elif kept == "all but one":
        heads = [field for field in sizes if field.endswith("_heads")]
        grows = draw(one_of([["head_dim"], heads, ["hidden_size"], ["intermediate_size"]]))
        sizes = {field: sizes[field] for field in grows}
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
        sizes["head_dim"] = sizes["head_dim"] if qk_norm == "none" else source.head_dim
        sizes["num_attention_heads"] *= sizes["num_key_value_heads"] // groups
    return source, padded(source, how, **sizes), how


@given(growths())
@settings(derandomize=True, deadline=None, max_examples=examples(200))
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


# Of a few channels the mean square can be next to nothing, and what divides by it magnifies how float32 rounds.
@given(growths(fewest_channels=12))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_transformers_finds_the_claims_of_random_growths_true_in_float32(
    case: tuple[ModelConfig, ModelConfig, GrowthConfig],
) -> None:
    source, target, how = case
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_source(directory / "source", source, torch.float32)
        grow(directory, target, how)
        before, after = (transformers_logits(directory / name)[..., :32] for name in ("source", "target"))
    measured = ((before - after).abs().max() / before.abs().max()).item()
    assert measured < 1e-5 if rules.preserves(how, source, target) else measured > 1e-3


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
    source = model(hidden_size=32, head_dim=4, qkv_bias=qkv_bias, tie_word_embeddings=tied)
    how = growth(**{"new_layers": "zero", **options})
    target = padded(source, how, **{"intermediate_size": 15, "num_hidden_layers": 3, **sizes})
    write_source(tmp_path / "source", source, torch.float32)
    assert rules.preserves(how, source, target)
    grow(tmp_path, target, how)
    before, after = (transformers_logits(tmp_path / name) for name in ("source", "target"))
    assert before.abs().max() > 0.5
    torch.testing.assert_close(after[..., :32], before, atol=1e-5 * before.abs().max().item(), rtol=0)


AKI_SIZES = {"hidden_size": 10, "intermediate_size": 16, "num_attention_heads": 10}


def test_further_copies_of_a_layer_are_copied_silenced_or_scaled(tmp_path: Path) -> None:
    source, target = model(num_hidden_layers=3), model(num_hidden_layers=5)
    write_source(tmp_path / "source", source)
    factors: dict[str, list[float]] = {
        "copy": [1, 1, 1, 1, 1],
        "zero": [1, 0, 1, 0, 1],
        "scaled": [0.5, 0.5, 0.5, 0.5, 1],
    }
    for new_layers, expected in factors.items():
        grow(tmp_path, target, growth(new_layers=new_layers), name=new_layers)
        for layer, factor in enumerate(expected):
            for role in tensor_names.role_shapes(target, 0):
                before = tensor(tmp_path / "source", tensor_names.layer_name(source, [0, 0, 1, 1, 2][layer], role))
                after = tensor(tmp_path / new_layers, tensor_names.layer_name(target, layer, role))
                writes = role in (tensor_names.O_WEIGHT, tensor_names.DOWN)
                torch.testing.assert_close(after, before * factor if writes else before, atol=0, rtol=0)


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
    for name in (tensor_names.layer_name(model(), 2, tensor_names.DOWN), tensor_names.HEAD):
        assert torch.equal(tensor(tmp_path / "shallow", name), tensor(tmp_path / "deep", name))


def test_a_growth_keeps_the_dtype_and_the_files_beside_the_weights(tmp_path: Path) -> None:
    source, target = model(), model(hidden_size=16)
    write_source(tmp_path / "source", source, torch.bfloat16)
    (tmp_path / "source/tokenizer.json").write_text("{}")
    grow(tmp_path, target, growth())
    with Reader(tmp_path / "target") as reader:
        assert {reader.dtype(name) for name in reader.names} == {torch.bfloat16}
        assert set(reader.names) == set(tensor_names.tensor_shapes(target))
    assert (tmp_path / "target/tokenizer.json").read_text() == "{}"
    assert read_config(tmp_path / "target") == target
    assert read_eos_token_id(tmp_path / "target") == 3
    assert difference(tmp_path / "source", tmp_path / "target") < 0.1  # halves and doubles round nowhere else


def test_what_grows_beyond_float16_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    source = model()
    write_source(tmp_path / "source", source, torch.float16)
    path = tmp_path / "source" / SINGLE_FILE
    tensors = load_file(path)
    tensors["model.layers.1.self_attn.q_proj.bias"][3] = 60000
    save_file(tensors, path)
    # Queries make good for the root of a wider head_dim.
    message = r"^tensor 'model\.layers\.1\.self_attn\.q_proj\.bias': one of its weights becomes 84852\.8, float16 ends"
    with pytest.raises(UserError, match=message):
        grow(tmp_path, source.model_copy(update={"head_dim": 8}), growth())
    assert not (tmp_path / "target").exists()


def test_progress_counts_every_tensor_once(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    target, seen = model(num_hidden_layers=3), []
    scale_up(
        tmp_path / "source", tmp_path / "target", target, growth(), 0, progress=lambda done, of: seen.append((done, of))
    )
    total = len(tensor_names.tensor_shapes(target))
    assert seen == [(done, total) for done in range(total + 1)]


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


def test_weights_that_are_not_what_config_json_declares_are_refused(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    write_source(tmp_path / "other", model(intermediate_size=14))
    (tmp_path / "other/config.json").replace(tmp_path / "source/config.json")
    with pytest.raises(UserError, match=r"gate_proj.weight' has shape \(12, 8\), config.json declares \(14, 8\); "):
        grow(tmp_path, model(intermediate_size=28), growth())


def test_a_checkpoint_is_not_grown_onto_itself(tmp_path: Path) -> None:
    write_source(tmp_path / "source", model())
    with pytest.raises(UserError, match="is source and target at once"):
        grow(tmp_path, model(hidden_size=16), growth(), name="source")
    assert read_config(tmp_path / "source") == model()
