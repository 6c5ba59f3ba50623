"""Families that only growth supports: the certificate computes them, files are spelled as theirs, and the rest is
refused."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import published
from aquilamoe import api
from aquilamoe.checkpoint import packed, safetensors_header, sharding, tensor_names
from aquilamoe.checkpoint.hf_config import read_checkpoint_config, read_config
from aquilamoe.checkpoint.reader import CheckpointWriter, Reader
from aquilamoe.config.messages import UserError
from aquilamoe.growth.certificate import certify
from aquilamoe.growth.claim import Claim
from aquilamoe.growth.forward import StreamedDecoder, opened
from small_checkpoints import growth

transformers.utils.logging.disable_progress_bar()

SMOLLM3, GRANITE = "HuggingFaceTB/SmolLM3-3B", "ibm-granite/granite-3.1-2b-instruct"
GRANITE_MOE, PHI = "ibm-granite/granite-3.1-3b-a800m-instruct", "microsoft/Phi-4-mini-instruct"
STABLELM = "stabilityai/stablelm-2-1_6b"
EVERY = (SMOLLM3, GRANITE, GRANITE_MOE, PHI, STABLELM)
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The small version of a published checkpoint."""
    folder = tmp_path_factory.mktemp("sources")
    return cache(lambda name: published.make(name, folder))


@torch.no_grad()
def certified(directory: Path) -> Tensor:
    """What the network of the certificate computes."""
    with opened(directory) as (checkpoint,):
        decoder = StreamedDecoder(*checkpoint)
        x_btd = decoder.embed(published.tokens())
        for layer in range(decoder.config.num_hidden_layers):
            x_btd, _ = decoder.run_layer(layer, x_btd)
        return (decoder.normalize(x_btd) @ decoder.head_rows(0, decoder.config.vocab_size).T)[None]


@pytest.mark.parametrize("name", EVERY)
def test_the_certificate_computes_what_transformers_computes(name: str, make: Make) -> None:
    expected = published.load(make(name)).logits
    assert (certified(make(name)) - expected).abs().max() < 1e-5 * (expected.max() - expected.min())


def test_a_part_of_each_head_turns_by_the_long_factors_beyond_the_first_context(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = {"max_position_embeddings": 64, "original_max_position_embeddings": published.CONTEXT - 1}
    monkeypatch.setitem(published.CONFIGS, "long", {**published.CONFIGS[PHI], **short})
    source = published.make("long", tmp_path)
    expected = published.load(source).logits
    assert (certified(source) - expected).abs().max() < 1e-5 * (expected.max() - expected.min())
    target = published.apply(published.OPERATIONS["larger"], source, tmp_path / "target")
    assert list(published.problems(published.OPERATIONS["larger"], source, target)) == []


@pytest.mark.parametrize(
    ("name", "field"),
    [
        (SMOLLM3, "no_rope_layers"),
        (GRANITE, "residual_multiplier"),
        (PHI, "partial_rotary_factor"),
        (STABLELM, "partial_rotary_factor"),
    ],
)
def test_a_target_whose_config_states_another_network_fails_its_certificate(
    name: str, field: str, make: Make, tmp_path: Path
) -> None:
    target = published.apply(published.OPERATIONS["larger"], make(name), tmp_path / "target")
    claim = Claim(preserving=True, tolerance=1e-3, growth=growth(**published.FPI))
    assert certify(make(name), target, published.tokens(), claim)["passed"]
    values = json.loads((target / "config.json").read_text())
    values[field] = values[field][::-1] if isinstance(values[field], list) else values[field] / 2
    if name == PHI:  # as many factors as pairs
        values["rope_scaling"] = values["rope_parameters"] = None
    (target / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="claims to keep the function, but they diverge in layer"):
        certify(make(name), target, published.tokens(), claim)


@pytest.mark.parametrize("name", [SMOLLM3, GRANITE])
def test_longer_heads_keep_the_function_whatever_attention_is_scaled_by(name: str, make: Make, tmp_path: Path) -> None:
    longer = published.Operation("longer heads", lambda _config: {"head_dim": 32})
    target = published.apply(longer, make(name), tmp_path / "target")
    expected, found = published.load(make(name)).logits, published.load(target).logits
    assert (found - expected).abs().max() < 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize("name", [SMOLLM3, GRANITE, PHI])
def test_a_grown_checkpoint_of_a_family_is_shrunk_to_its_source(name: str, make: Make, tmp_path: Path) -> None:
    source, quick = make(name), {"tokens": 32, "sequence_length": 32}
    old = read_checkpoint_config(source).model
    sizes = {"intermediate_size": old.intermediate_size, "num_hidden_layers": old.num_hidden_layers}
    larger = {"intermediate_size": "x1.5", "num_hidden_layers": old.num_hidden_layers + 2}
    growth = {"method": "fpi", "new_layers": "zero"}
    api.grow(source, tmp_path / "grown", model=larger, growth=growth, certificate=quick)
    shrunk = api.shrink(tmp_path / "grown", tmp_path / "back", model=sizes, certificate=quick)
    assert shrunk.certificate is not None and shrunk.certificate["kl"] < 1e-6
    assert read_checkpoint_config(tmp_path / "back").model == old


def test_a_tied_head_behind_layer_norm_keeps_the_function(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The final norm divides for the head, its bias too."""
    monkeypatch.setitem(published.CONFIGS, "tied", {**published.CONFIGS[STABLELM], "tie_word_embeddings": True})
    source = published.make("tied", tmp_path)
    target = published.apply(published.OPERATIONS["wider"], source, tmp_path / "target")
    assert list(published.problems(published.OPERATIONS["wider"], source, target)) == []


def test_a_new_layer_rotates_as_the_layer_that_it_copies(make: Make, tmp_path: Path) -> None:
    method = {**published.FPI, "depth": [0, 1, 2, 2, 2]}
    api.grow(
        make(SMOLLM3), tmp_path / "a", model={"num_hidden_layers": 5}, growth=method, certificate={"enabled": False}
    )
    assert json.loads((tmp_path / "a" / "config.json").read_text())["no_rope_layers"] == [1, 1, 0, 0, 0]


def test_the_plan_shows_what_of_a_family_follows(make: Make, tmp_path: Path) -> None:
    plan = api.plan_growth(make(SMOLLM3), tmp_path / "target", model={"num_hidden_layers": 5}, growth=published.FPI)
    assert plan.model["particulars"] == {"nope_layers": [4]}


def test_a_smollm3_without_a_list_leaves_out_every_fourth_rotation(make: Make, tmp_path: Path) -> None:
    values = json.loads((make(SMOLLM3) / "config.json").read_text())
    values |= {"num_hidden_layers": 8, "no_rope_layers": None, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    particulars = read_checkpoint_config(tmp_path).model.particulars
    assert particulars is not None
    assert particulars.nope_layers == (3, 7)


def test_a_list_of_more_layers_than_there_are_is_read_as_far_as_they_go(make: Make, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(make(SMOLLM3), source)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**values, "no_rope_layers": [1, 1, 0, 0, 0, 0]}))
    target = published.apply(published.OPERATIONS["neurons"], source, tmp_path / "target")
    assert json.loads((target / "config.json").read_text())["no_rope_layers"] == [1, 1, 0]


def test_granite_becomes_a_granitemoe_and_phi_a_mixtral(make: Make, tmp_path: Path) -> None:
    for name, architecture in ((GRANITE, "GraniteMoe"), ("microsoft/phi-4", "Mixtral")):
        target = published.apply(published.OPERATIONS["experts"], make(name), tmp_path / architecture)
        assert read_checkpoint_config(target).architecture == f"{architecture}ForCausalLM"


@pytest.mark.parametrize("name", [PHI, GRANITE_MOE])
def test_joined_tensors_are_never_parted_by_shards(name: str, make: Make, tmp_path: Path) -> None:
    model = read_checkpoint_config(make(name)).model
    shapes, joined = tensor_names.tensor_shapes(model), tensor_names.joined(model)
    (tmp_path / "config.json").write_bytes((make(name) / "config.json").read_bytes())
    with (
        Reader(make(name)) as reader,
        CheckpointWriter(tmp_path, shapes, "F32", 30_000, joined=joined) as writer,
    ):
        for part in shapes:
            writer.copy(part, reader, part)
    index = json.loads((tmp_path / sharding.INDEX_FILE).read_text())["weight_map"]
    original = safetensors_header.read(make(name))
    assert index.keys() == original.keys()
    assert {key: (info.shape, info.dtype) for key, info in safetensors_header.read(tmp_path).items()} == {
        key: (info.shape, info.dtype) for key, info in original.items()
    }
    with Reader(tmp_path) as copy, Reader(make(name)) as reader:
        assert {part: copy.digest(part) for part in shapes} == {part: reader.digest(part) for part in shapes}


def test_a_joined_tensor_of_no_such_shape_is_refused(make: Make, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(make(PHI) / "model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors[name] = tensors[name][:-1].contiguous()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((make(PHI) / "config.json").read_bytes())
    with pytest.raises(
        UserError, match=rf"tensor '{name}' has shape \(159, 96\), which does not part into self_attn.q"
    ):
        packed.read(tmp_path)


def test_parts_of_one_tensor_have_one_type(make: Make, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    tensors = safetensors.torch.load_file(make(GRANITE) / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.torch.save_file({**tensors, name: tensors[name].bfloat16()}, source / "model.safetensors")
    (source / "config.json").write_bytes((make(GRANITE) / "config.json").read_bytes())
    with pytest.raises(UserError) as error:
        published.apply(published.OPERATIONS["experts"], source, tmp_path / "target")
    assert str(error.value) == (
        "dtype: source, but parts of the target's 'model.layers.1.block_sparse_moe.input_linear.weight' are bfloat16 "
        "and float32 there; use dtype=float32"
    )


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "experts beside layers that do not rotate": (
        SMOLLM3,
        "upcycling",
        {"num_experts": 4, "num_experts_per_tok": 2},
        "model: num_experts 4 with nope_layers [2], which no architecture of transformers has beside experts and would "
        "be lost; grow it without experts",
    ),
    "experts beside heads that rotate in part": (
        PHI,
        "upcycling",
        {"num_experts": 4, "num_experts_per_tok": 2},
        "model: num_experts 4 with partial_rotary_factor 0.75, which no architecture of transformers has beside "
        "experts and would be lost; grow it without experts",
    ),
    "longer heads that rotate in part": (
        PHI,
        "growth",
        {"head_dim": 32, "hidden_size": 192, "num_attention_heads": 6},
        "model.head_dim: target 32, source 16; of each head 12 channels rotate, and others would in a longer one, keep "
        "16 and grow num_attention_heads",
    ),
    "heads that do not fill the hidden size": (
        PHI,
        "growth",
        {"hidden_size": 144},
        "model: hidden_size 144 with 10 heads of 16 channels; transformers scales the rotary embedding of a Phi-3 by "
        "hidden_size / num_attention_heads, choose hidden_size 160",
    ),
    "LayerNorm over uneven copies": (
        STABLELM,
        "growth",
        {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3},
        "model.hidden_size: target 48, source 32; LayerNorm subtracts the mean of all channels, which stays at integer "
        "ratios only, use 32 or 64",
    ),
    "experts behind LayerNorm": (
        STABLELM,
        "upcycling",
        {"num_experts": 4, "num_experts_per_tok": 2},
        "model: num_experts 4 with layer_norm true, which no architecture of transformers has beside experts and would "
        "be lost; grow it without experts",
    ),
    "dense layers of a GraniteMoE": (
        GRANITE,
        "upcycling",
        {"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
        "model: mlp_only_layers [0] with attention_multiplier, beside which every layer has experts in transformers; "
        "use []",
    ),
    "other constants": (
        GRANITE,
        "growth",
        {"particulars": {"logits_scaling": 2.0}},
        "model.particulars: target {'logits_scaling': 2.0}, source {'embedding_multiplier': 12.0, "
        "'residual_multiplier': 0.22, 'attention_multiplier': 0.015625, 'logits_scaling': 8.0}; a growth keeps them, "
        "leave them out",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_refused_in_one_line(case: str, make: Make, tmp_path: Path) -> None:
    name, keyword, sizes, message = REFUSED[case]
    method = published.FPI if keyword == "growth" else {"method": "copy"}
    call: Any = api.grow if keyword == "growth" else api.upcycle
    with pytest.raises(UserError) as error:
        call(make(name), tmp_path / "target", model=sizes, **{keyword: method}, certificate={"enabled": False})
    assert str(error.value) == message


def test_training_refuses_what_only_growth_computes(make: Make) -> None:
    with pytest.raises(UserError) as error:
        read_config(make(SMOLLM3))
    assert str(error.value) == (
        f"{make(SMOLLM3) / 'config.json'}: nope_layers in its config.json, which is grown and upcycled (efficientscale "
        "grow), but not computed by training, evaluation and generation; choose another checkpoint for these"
    )


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        (
            STABLELM,
            "use_parallel_residual",
            True,
            "use_parallel_residual true is another network, which is not computed",
        ),
        (
            GRANITE,
            "attention_bias",
            True,
            "attention_bias true puts biases on o_proj or the MLP, only q, k and v can have them",
        ),
        (
            SMOLLM3,
            "no_rope_layers",
            [1, 0],
            "no_rope_layers has 2 entries, num_hidden_layers is 3; use the checkpoint's",
        ),
        (SMOLLM3, "no_rope_layers", [1, 1, 2], "no_rope_layers"),
        (PHI, "partial_rotary_factor", 0.0, "partial_rotary_factor"),
        (PHI, "partial_rotary_factor", 0.5, "short_factor has 6 numbers"),
        (PHI, "partial_rotary_factor", 0.70, "of head_dim 16 are 11 channels, rotary embeddings need pairs"),
        (PHI, "partial_rotary_factor", "x", "partial_rotary_factor"),
        (GRANITE, "residual_multiplier", "x", "residual_multiplier"),
        (GRANITE, "logits_scaling", 0.0, "logits_scaling"),
    ],
)
def test_a_config_of_another_network_is_refused(
    name: str, key: str, value: object, message: str, make: Make, tmp_path: Path
) -> None:
    values = json.loads((make(name) / "config.json").read_text()) | {key: value, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint_config(tmp_path)
    assert "\n" not in str(error.value)
