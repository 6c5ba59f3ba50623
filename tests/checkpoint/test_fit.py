"""Tensors that config.json does not know, experts that are packed, and numbers beyond all measure: all from headers."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from aquilamoe.checkpoint import safetensors_header, tensor_names
from aquilamoe.checkpoint.hf_config import config_from_dict, config_to_dict, read_config
from aquilamoe.checkpoint.raw_reader import RawReader
from aquilamoe.config.graph import grown_model
from aquilamoe.config.messages import UserError
from aquilamoe.config.network import ModelConfig
from aquilamoe.growth.scale_out import scale_out
from aquilamoe.growth.scale_up import scale_up
from aquilamoe.growth.tool.request import open_checkpoint
from effort import examples
from small_checkpoints import growth, logits, model, padded, upcycling, write_source

WEIGHTS = "model.safetensors"
FURTHER = (
    *(
        "model.layers.0.self_attn.o_proj.bias",
        "model.layers.1.mlp.up_proj.bias",
        "lm_head.bias",
        "v_head.summary.weight",
    ),
    *("score.weight", "model.layers.2.eh_proj.weight", "model.mtp.0.norm.weight", "vision_tower.x", "model.norm.bias"),
    *("base_model.model.lora_A.weight", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.gate.weight"),
    *("model.layers.0.mlp.experts.0.gate_proj.weight", "lm_head.weight "),
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", model(), torch.float32)


def put(source: Path, **further: torch.Tensor | None) -> None:
    tensors: dict[str, torch.Tensor | None] = {**load_file(source / WEIGHTS), **further}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, source / WEIGHTS)


@pytest.mark.parametrize("name", FURTHER)
def test_a_tensor_that_the_config_does_not_know_is_refused_from_headers(
    name: str, source: Path, tmp_path: Path
) -> None:
    put(source, **{name: torch.ones(4)})
    lines = []
    for attempt in (
        lambda: open_checkpoint("source", source),
        lambda: scale_up(source, tmp_path / "grown", padded(model(), growth(), hidden_size=16), growth(), 0),
        lambda: scale_out(source, tmp_path / "sparse", grown_model(model(), SPARSE, "model"), upcycling(), 0),
    ):
        with pytest.raises(UserError) as caught:
            attempt()
        lines.append(str(caught.value))
    expected = (
        f"{source}: tensor '{name}' has no place in Qwen2ForCausalLM as config.json describes it and would be lost; "
    )
    assert [line.startswith(expected) for line in lines] == [True] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


SPARSE = {"num_experts": 4, "num_experts_per_tok": 2}


def test_a_tensor_that_the_index_omits_is_not_lost_either(source: Path) -> None:
    put(source, **{"lm_head.bias": torch.ones(4)})
    (source / WEIGHTS).rename(source / "part.safetensors")
    known = [name for name in safetensors_header.read_file(source / "part.safetensors") if name != "lm_head.bias"]
    index = {"weight_map": dict.fromkeys(known, "part.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"tensor 'lm_head.bias' has no place"):
        open_checkpoint("source", source)


def test_what_older_files_repeat_is_no_loss(source: Path) -> None:
    tables = ("inv_freq", "cos_cached", "sin_cached")
    put(source, **{f"model.layers.0.self_attn.rotary_emb.{table}": torch.ones(2) for table in tables})
    assert open_checkpoint("source", source).model == model()


def test_a_shared_expert_that_does_something_is_not_lost_by_an_upcycling(tmp_path: Path) -> None:
    sparse = model(**SPARSE, moe_intermediate_size=12)
    source = write_source(tmp_path / "source", sparse, torch.float32)
    more = model(num_experts=8, num_experts_per_tok=4, moe_intermediate_size=12)
    name = "model.layers.1.mlp.shared_expert.down_proj.weight"
    put(source, **{name: -torch.zeros(8, 8)})
    scale_out(source, tmp_path / "fine", more, upcycling(), 0)
    put(source, **{name: torch.eye(8)})
    with pytest.raises(UserError, match=rf"tensor '{name}' is not zero"):
        scale_out(source, tmp_path / "target", more, upcycling(), 0)
    assert not (tmp_path / "target").exists()


EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
PACKED: dict[str, dict[str, Any]] = {
    "mixtral": {"sliding_window": None},
    "qwen2_moe": {"shared_expert_intermediate_size": 20},
    "qwen3_moe": {"head_dim": 8, "mlp_only_layers": [1]},
    "olmoe": {},
}


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("model_type", PACKED)
def test_packed_experts_are_read_as_the_same_experts_one_by_one(model_type: str, shard: str, tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": None}
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **sizes, **heads, **EXPERTS, **PACKED[model_type])
    ).float()
    found.save_pretrained(tmp_path / "apart")
    found.save_pretrained(tmp_path / "packed", save_original_format=False, max_shard_size=shard)
    assert any(name.endswith("gate_up_proj") for name in safetensors_header.read(tmp_path / "packed"))
    with RawReader(tmp_path / "apart") as apart, RawReader(tmp_path / "packed") as packed:
        assert set(apart.names) == set(packed.names)
        assert [name for name in apart.names if apart.digest(name) != packed.digest(name)] == []
    assert torch.equal(logits(tmp_path / "apart", torch.float32), logits(tmp_path / "packed", torch.float32))
    source = open_checkpoint("source", tmp_path / "packed")
    target = grown_model(source.model, {"num_experts": 8, "num_experts_per_tok": 4}, "model")
    for name in ("apart", "packed"):
        scale_out(tmp_path / name, tmp_path / f"more of {name}", target, upcycling(), 0)
    assert (tmp_path / "more of packed" / WEIGHTS).read_bytes() == (tmp_path / "more of apart" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("shape", [(4, 7, 8), (8, 8), (4, 2, 3, 8)])
def test_experts_packed_in_another_way_are_refused_with_the_true_reason(shape: tuple[int, ...], source: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    put(source, **{name: torch.ones(shape)})
    with pytest.raises(UserError, match=rf"tensor '{name}' of packed experts has shape .* is read; write it with"):
        open_checkpoint("source", source)


def changed(source: Path, **values: Any) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(directory: Path) -> str:
    """The one line; what Python allocates for it is far below a gigabyte."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            open_checkpoint("source", directory)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5 * 10**8, "bounds come before loops"
    line = str(caught.value)
    assert line.startswith(str(directory))
    assert "\n" not in line
    assert len(line) < 4100
    return line


@pytest.mark.parametrize("size", [10**9, 10**18, 2**80])
@pytest.mark.parametrize(
    "field",
    [
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size"),
        *("intermediate_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    ],
)
def test_sizes_beyond_any_network_are_refused_before_anything_counts_to_them(
    field: str, size: int, source: Path
) -> None:
    sparse = {"architectures": ["Qwen2MoeForCausalLM"], "moe_intermediate_size": 12} | SPARSE
    changed(source, **((sparse if "expert" in field or "moe" in field else {}) | {field: size}))
    assert field in refused(source)


def test_many_layers_of_many_experts_are_refused_together(source: Path) -> None:
    sparse = {"architectures": ["Qwen2MoeForCausalLM"], "moe_intermediate_size": 12}
    changed(source, **sparse, num_hidden_layers=4000, num_experts=30_000, num_experts_per_tok=2)
    assert "are 360036000 tensors or more, a checkpoint can have 200000" in refused(source)


def header(source: Path, text: bytes, data: int = 0) -> None:
    (source / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))


def entry(shape: str = "[0]", end: int = 0) -> str:
    return f'{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (lambda: "{" + ",".join(f'"t{i}":{entry()}' for i in range(400_000)) + "}", "names 320000 tensors or more"),
        (lambda: f'{{"a":{entry("[" + ",".join(["1"] * 200_000) + "]", 4)}}}', "200000 dimensions, at most 8"),
        (lambda: f'{{"a":{entry("[1" + "0" * 4000 + "]")}}}', "not whole numbers from 0"),
        (lambda: f'{{"{"a" * 10**6}":{entry("[1]", 8)}}}', "offsets 0 to 8 give it 8"),
        (lambda: "[" * 1_000_000, "is not JSON"),
        (lambda: '{"a":' * 1_000_000, "is not JSON"),
        (lambda: " " * (33 * 2**20), "more than 33554432"),
    ],
)
def test_a_hostile_header_is_refused_in_one_short_line(text: Callable[[], str], line: str, source: Path) -> None:
    header(source, text().encode())
    assert line in refused(source)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 1_000_000, "is not JSON (nested too deeply"),
        ('{"a":' * 400_000, "is not JSON (nested too deeply"),
        ('{"a": "' + "x" * 10**8 + '"}', "has 100 MB, at most 4.19 MB are read"),
        ('{"vocab_size": 1' + "0" * 5000 + "}", "is not JSON (Exceeds the limit"),
        ('{"vocab_size": "\ud800"}', "is not JSON"),
        ("\0" * 1000, "is not JSON"),
        ("null", "holds NoneType"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_hostile_json_is_refused_in_one_short_line(file: str, text: str, line: str, source: Path) -> None:
    if file != "config.json":
        (source / WEIGHTS).unlink()
        line = line.replace("at most 4.19 MB", "at most 67.1 MB")
    (source / file).write_bytes(text.encode("utf-8", "surrogatepass"))
    assert line in refused(source)


def each(key: str, *values: Any) -> list[tuple[str, Any]]:
    return [(key, value) for value in values]


WRONG: list[tuple[str, Any]] = [
    *each("rope_scaling", "linear", 7, [], [1], {"type": 3}, {"rope_type": ["yarn"]}, {"factor": {}}),
    *[("rope_scaling", {"rope_type": "linear", "factor": value}) for value in ("2", None, 0, -1, True, [2.0], 1e300)],
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 2.0]}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "4096"}),
    ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    *[("rope_theta", value) for value in ("1e6", 0, -1.0, [1e4], 1e300)],
    *[("layer_types", value) for value in (7, "full_attention", [7, 7], [None], ["chunked_attention"] * 2)],
    *[("layer_types", ["full_attention"] * count) for count in (1, 10_000)],
    *[("layer_types", [7] * 300_000), ("mlp_only_layers", ["x"] * 300_000), ("architectures", [7] * 300_000)],
    *each("hidden_size", "8", 8.0, -8, 0, True, [8], None, {}),
    *[("num_hidden_layers", value) for value in ("2", 2.5, -2, 0, None)],
    *[("rms_norm_eps", value) for value in ("1e-5", 0, -1, 1e300, True)],
    *[("max_position_embeddings", value) for value in ("32", 0, -1, 1.5)],
    *each("architectures", 7, "Qwen2ForCausalLM", [None], [["x"]], {}),
    *[("hidden_act", value) for value in (7, ["silu"])],
    *each("tie_word_embeddings", "false", 0, []),
    *[("use_sliding_window", value) for value in ("true", 1)],
    *[("sliding_window", value) for value in ("7", -1, 1.5, [7])],
    *[("eos_token_id", value) for value in ("2", [2, "8"], {"a": 2}, 2.5, 10**30, True)],
    *[("bos_token_id", value) for value in ("1", [[1]])],
    ("initializer_range", "x"),
    ("partial_rotary_factor", "half"),
    ("quantization_config", {"bits": 4}),
    ("num_key_value_heads", 3),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=[f"{field}={str(value)[:40]}" for field, value in WRONG])
def test_a_value_of_a_wrong_type_or_measure_is_one_line_that_names_it(field: str, value: Any) -> None:
    values = config_to_dict(model(), dtype="float32")
    with pytest.raises(UserError) as caught:
        config_from_dict(values | {field: value}, where="some/config.json")
    line = str(caught.value)
    assert line.startswith("some/config.json")
    assert "\n" not in line
    inner = list(value) if isinstance(value, dict) else []
    assert any(name in line for name in (field, *inner, "rotary", "rope_type"))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta", "hidden_size", "initializer_range", "vocab_size"])
def test_numbers_that_are_none_are_one_line(field: str, text: str, source: Path) -> None:
    values = json.loads((source / "config.json").read_text()) | {field: "HERE"}
    (source / "config.json").write_text(json.dumps(values).replace('"HERE"', text))
    assert field in refused(source)


def test_null_is_as_good_as_absent_where_it_is_in_transformers(source: Path) -> None:
    optional = ("rope_scaling", "head_dim", "layer_types", "initializer_range", "tie_word_embeddings", "hidden_act")
    changed(source, **dict.fromkeys(optional), num_attention_heads=2, num_key_value_heads=2)
    assert read_config(source).head_dim == 4


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 2, 3, 8, 64, 10**9])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(
        ["linear", "yarn", "llama3", "longrope", "dynamic", "full_attention", "sliding_attention", "silu"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rope_type", "type", "factor", "rope_theta", "full_attention"]), inner, max_size=3
        )
    ),
    max_leaves=4,
)
FIELDS = sorted(
    {key for kind in ("", "Qwen2Moe") for key in config_to_dict(model(**(SPARSE if kind else {})), dtype="float32")}
    | {"sliding_window", "layer_types", "rope_scaling", "partial_rotary_factor", "clip_qkv", "quantization_config"}
    | {"num_local_experts", "decoder_sparse_step", "original_max_position_embeddings", "attention_bias", "some_field"}
)


@settings(derandomize=True, deadline=None, max_examples=examples(600))
@given(
    changes=st.dictionaries(st.sampled_from(FIELDS), anything, min_size=1, max_size=3),
    sparse=st.booleans(),
    without=st.sets(st.sampled_from(FIELDS), max_size=2),
)
def test_any_config_is_right_or_one_line(changes: dict[str, Any], sparse: bool, without: set[str]) -> None:
    values = config_to_dict(model(**(SPARSE if sparse else {})), dtype="float32")
    values = {key: value for key, value in (values | changes).items() if key not in without}
    try:
        found = config_from_dict(values)
    except UserError as error:
        lines = str(error).splitlines()
        assert len(lines) <= 4, "one for each value"
        assert str(error).startswith("config.json")
        assert len(str(error)) < 4100 * len(lines)
        return
    assert isinstance(found, ModelConfig)
    assert len(tensor_names.tensor_shapes(found)) <= 200_000 + 6 * found.num_hidden_layers + 3
