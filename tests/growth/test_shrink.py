"""The way back: what a growth that keeps the function has made is the source again, or computes the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

import small_checkpoints as small
from aquilamoe.checkpoint.reader import Reader
from aquilamoe.config.growth import ShrinkConfig
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth import shrink as shrinking
from aquilamoe.growth.copies import first_equals

EXACT = 1e-10
EXACTLY = ShrinkConfig(method="exact", layers=None)
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "qkv_bias": False}
OLMOE = {**MIXTURE, "qk_norm": "projection", "norm_topk_prob": False, "num_attention_heads": 4, "head_dim": 2}
WIDER = {"hidden_size": 10, "intermediate_size": 16, "num_attention_heads": 12, "num_key_value_heads": 3}
TWICE = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 16, "num_key_value_heads": 4}
FOURFOLD = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 32, "num_key_value_heads": 8}
EXPERTS = {"hidden_size": 12, "moe_intermediate_size": 16, "intermediate_size": 16}
DEEPER = {"num_hidden_layers": 5}


def source_of(folder: Path, dtype: torch.dtype = torch.float64, **changes: Any) -> ModelConfig:
    config = small.model(**changes)
    small.write_source(folder / "source", config, dtype)
    return config


def shrunk(folder: Path, target: ModelConfig, source: str = "target") -> Path:
    """`target` in the folder, shrunk to a model."""
    reduction = shrinking.find(folder / source, target, EXACTLY)
    shrinking.shrink(folder / source, folder / "shrunk", target, reduction)
    return folder / "shrunk"


def same_bytes(one: Path, other: Path) -> bool:
    with Reader(one) as first, Reader(other) as second:
        return first.names == second.names and all(first.digest(name) == second.digest(name) for name in first.names)


@pytest.mark.parametrize(
    ("how", "sizes", "changes"),
    [
        ({}, WIDER, {}),
        ({"noise": 0.5}, WIDER, {}),
        ({"noise": 0.5, "maps": "sampled"}, WIDER, {"qkv_bias": False, "qk_norm": "head"}),
        ({"noise": 0.5, "norm": "zero_pad"}, WIDER, {"tie_word_embeddings": True}),
        ({"noise": 0.5}, WIDER, {"tie_word_embeddings": True}),
        ({"noise": 0.5, "new_layers": "zero"}, WIDER | DEEPER, {}),
        ({"method": "lemon", "noise": 0.5, "norm": "zero_pad", "new_layers": "zero"}, WIDER | DEEPER, {}),
        ({"method": "hypercloning", "noise": 0.5, "norm": "copy"}, TWICE, {}),
        ({"noise": 0.5}, {"head_dim": 8}, {}),
        ({"noise": 0.5}, {**WIDER, "head_dim": 12}, {}),
        ({"noise": 0.5}, {"num_attention_heads": 10, "num_key_value_heads": 5}, {"num_attention_heads": 4}),
        ({"noise": 0.5, "new_layers": "zero"}, EXPERTS | DEEPER, MIXTURE),
        ({"noise": 0.5}, {"hidden_size": 12, "num_attention_heads": 6, "num_key_value_heads": 3}, OLMOE),
        (
            {"noise": 0.5, "new_layers": "zero"},
            EXPERTS | {"shared_expert_intermediate_size": 20},
            {**MIXTURE, "shared_expert_intermediate_size": 12, "qkv_bias": True},
        ),
    ],
)
def test_a_grown_model_that_is_shrunk_at_once_computes_what_its_source_does(
    tmp_path: Path, how: dict[str, Any], sizes: dict[str, Any], changes: dict[str, Any]
) -> None:
    source = source_of(tmp_path, **changes)
    growth = small.growth(**how)
    small.grow(tmp_path, small.padded(source, growth, **sizes), growth)
    target = source.model_copy(
        update={"rms_norm_eps": growth.grown_eps(source, sizes.get("hidden_size", source.hidden_size))}
    )
    back = shrunk(tmp_path, target)
    assert small.difference(tmp_path / "source", back) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [TWICE, FOURFOLD, DEEPER, {**TWICE, **DEEPER}])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "qkv_bias": False}])
def test_ratios_of_powers_of_two_without_noise_give_the_bytes_of_the_source(
    tmp_path: Path, dtype: torch.dtype, sizes: dict[str, Any], changes: dict[str, Any]
) -> None:
    source = source_of(tmp_path, dtype, **changes)
    growth = small.growth(norm="copy", new_layers="zero")
    small.grow(tmp_path, source.model_copy(update=sizes), growth)
    assert same_bytes(tmp_path / "source", shrunk(tmp_path, source))


@pytest.mark.parametrize(
    ("how", "sizes", "changes"),
    [
        ({}, {"num_experts": 4, "num_experts_per_tok": 2}, {}),
        ({"method": "permute"}, {"num_experts": 4, "num_experts_per_tok": 2}, {}),
        ({}, {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 6}, {}),
        ({}, {"num_experts": 4, "num_experts_per_tok": 1, "shared_expert_intermediate_size": 12}, {}),
        (
            {},
            {
                "num_experts": 8,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 6,
                "shared_expert_intermediate_size": 12,
                "mlp_only_layers": (0,),
            },
            {},
        ),
        ({}, {"num_experts": 8, "num_experts_per_tok": 4}, MIXTURE),
        ({"method": "permute"}, {"num_experts": 12, "num_experts_per_tok": 6}, MIXTURE),
        ({}, {"num_experts": 8, "num_experts_per_tok": 4}, OLMOE),
    ],
)
def test_copies_of_feed_forwards_become_the_feed_forward_again(
    tmp_path: Path, how: dict[str, Any], sizes: dict[str, Any], changes: dict[str, Any]
) -> None:
    source = source_of(tmp_path, **changes)
    target = ModelConfig.model_validate(
        source.model_dump() | ({} if source.is_moe else {"moe_intermediate_size": None}) | sizes
    )
    small.upcycle(tmp_path, target, small.upcycling(**how))
    assert small.difference(tmp_path / "source", shrunk(tmp_path, source)) < EXACT


def test_a_wider_model_with_experts_becomes_the_first_model_in_one_step(tmp_path: Path) -> None:
    source = source_of(tmp_path, qkv_bias=False)
    growth = small.growth(noise=0.5, new_layers="zero")
    wider = source.model_copy(update=WIDER | DEEPER)
    small.grow(tmp_path, wider, growth, name="wider")
    experts = ModelConfig.model_validate(
        wider.model_dump() | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": None}
    )
    from aquilamoe.growth.scale_out import scale_out

    scale_out(tmp_path / "wider", tmp_path / "target", experts, small.upcycling(), 0)
    assert small.difference(tmp_path / "source", shrunk(tmp_path, source)) < EXACT


def test_a_part_of_the_copies_can_go(tmp_path: Path) -> None:
    source = source_of(tmp_path)
    small.grow(tmp_path, source.model_copy(update=TWICE), small.growth(noise=0.5))
    part = source.model_copy(update={"hidden_size": 11, "intermediate_size": 13, "num_attention_heads": 12})
    assert small.difference(tmp_path / "source", shrunk(tmp_path, part)) < EXACT


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 6}, "hidden_size: target 6, but 8 of 8 channels of the source differ; use 8 or more"),
        ({"intermediate_size": 10}, "intermediate_size: target 10, but 12 of 12 neurons in layer 0 of the source di"),
        ({"num_attention_heads": 4}, "num_attention_heads: target 4, 2 for each of 2 key-value heads, but key-value "),
        ({"num_key_value_heads": 1}, "num_key_value_heads: target 1, but 2 of 2 key-value heads in layer 0 of the s"),
        ({"head_dim": 2}, "head_dim: target 2, but all 4 channels of a head in layer 0 of the source do something; k"),
        ({"num_hidden_layers": 1}, "num_hidden_layers: target 1, but 0 of 2 layers of the source are silent; use 2 o"),
    ],
)
def test_units_that_differ_are_not_merged(tmp_path: Path, sizes: dict[str, Any], message: str) -> None:
    source = source_of(tmp_path)
    with pytest.raises(UserError) as error:
        shrinking.find(tmp_path / "source", source.model_copy(update=sizes), EXACTLY)
    assert str(error.value).startswith(message)


def test_rows_from_the_layer_above_are_no_copies(tmp_path: Path) -> None:
    source = source_of(tmp_path, num_hidden_layers=3)
    small.grow(tmp_path, source.model_copy(update={"hidden_size": 10}), small.growth(method="aki"))
    with pytest.raises(UserError, match="channel 8, equal to channel 0 in the embedding, is not so in"):
        shrinking.find(tmp_path / "target", source, EXACTLY)


@pytest.mark.parametrize("method", ["noise", "drop"])
def test_experts_that_differ_stay(tmp_path: Path, method: str) -> None:
    source = source_of(tmp_path)
    values = source.model_dump() | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": None}
    how = {"noise": 0.1} if method == "noise" else {"drop_ratio": 0.5}
    small.upcycle(tmp_path, ModelConfig.model_validate(values), small.upcycling(method=method, **how))
    with pytest.raises(UserError, match="num_experts: target 0, but the experts in layer 0 of the source are no cop"):
        shrinking.find(tmp_path / "target", source, EXACTLY)


def test_units_are_equal_only_if_all_of_their_parts_are() -> None:
    part = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [1.0 + 1e-13, 2.0], [1.0, 2.1]])
    other = torch.tensor([[5.0], [5.0], [5.0], [5.0], [5.0]])
    assert first_equals([part.double(), other.double()], 1e-12) == [0, 1, 0, 0, 4]
    other[2] = 6.0
    assert first_equals([part.double(), other.double()], 1e-12) == [0, 1, 2, 0, 4]
