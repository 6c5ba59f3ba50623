"""What is new of a grown model: one bit of every unit and axis, through growths after one another."""

from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aquilamoe.config.growth import Growth
from aquilamoe.config.schema import GrowthConfig, ModelConfig, UpcyclingConfig
from aquilamoe.growth.gradient_maps import parameter_shapes
from aquilamoe.growth.new_parts import new_parts
from effort import examples
from small_checkpoints import growth, model, upcycling

SOURCE = model()
LAYER = "model.layers.0."


def masks(*growths: Growth) -> dict[str, Tensor]:
    """Whether each weight is new, by parameter."""
    shapes = parameter_shapes(growths[-1].target)
    found = new_parts(growths)
    assert list(found) == list(shapes)
    return {
        name: found[name].part(tuple(slice(0, size) for size in shape)).expand(shape) for name, shape in shapes.items()
    }


def grown(source: ModelConfig, how: GrowthConfig | UpcyclingConfig, **sizes: Any) -> Growth:
    return Growth(source, source.model_copy(update=sizes), how, seed=0)


@settings(max_examples=examples(20), deadline=None)
@given(
    hidden=st.integers(8, 20),
    neurons=st.integers(12, 30),
    groups=st.integers(2, 4),
    slots=st.integers(4, 6),
    maps=st.sampled_from(["circular", "sampled"]),
    norm=st.sampled_from(["exact", "zero_pad"]),
)
def test_new_weights_of_a_width_growth_are_those_that_the_source_has_not(
    hidden: int, neurons: int, groups: int, slots: int, maps: str, norm: str
) -> None:
    step = grown(
        SOURCE,
        growth(maps=maps, norm=norm),
        hidden_size=hidden,
        intermediate_size=neurons,
        num_key_value_heads=groups,
        num_attention_heads=groups * slots,
    )
    before = parameter_shapes(SOURCE)
    for name, mask in masks(step).items():
        assert mask.sum().item() == mask.numel() - prod(before[name]), name
    found = masks(step)[f"{LAYER}mlp.up_proj.weight"]
    assert torch.equal(found, found.all(1, keepdim=True) | found.all(0, keepdim=True))  # whole rows and columns


@pytest.mark.parametrize("depth", ["interpolate", "stack", (0, 0, 1, 1)])
def test_new_weights_of_a_depth_growth_are_the_further_copies_of_layers(depth: Any) -> None:
    layers = 4
    how = growth(depth=depth)
    sources = how.layer_sources(2, layers)
    new = {layer for layer in range(layers) if sources[layer] in sources[:layer]}
    assert len(new) == layers - 2
    for name, mask in masks(grown(SOURCE, how, num_hidden_layers=layers)).items():
        is_new = name.startswith(tuple(f"model.layers.{layer}." for layer in new))
        assert mask.all() if is_new else not mask.any(), name


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}


def test_new_experts_of_experts_are_the_further_copies_with_their_rows_of_the_router() -> None:
    source = model(**EXPERTS)
    step = grown(source, upcycling(), num_experts=12, num_experts_per_tok=6)
    for name, mask in masks(step).items():
        if ".mlp." in name:
            assert mask.flatten(1).all(1).tolist() == mask.flatten(1).any(1).tolist() == [False, True, True] * 4
        else:
            assert not mask.any()


@pytest.mark.parametrize("method", ["copy", "permute"])
@pytest.mark.parametrize("parts", [1, 2])
def test_new_experts_of_a_feed_forward_are_all_but_its_first_copy(method: str, parts: int) -> None:
    step = grown(
        SOURCE,
        upcycling(method=method),
        num_experts=3 * parts,
        num_experts_per_tok=parts,
        moe_intermediate_size=12 // parts,
    )
    for name, mask in masks(step).items():
        if ".experts." in name:
            assert mask.flatten(1).all(1).tolist() == [False] * parts + [True] * (2 * parts)
            assert mask.sum().item() == 2 * SOURCE.intermediate_size * SOURCE.hidden_size
        else:
            assert mask.all() if ".mlp." in name else not mask.any()  # the router has no source


def test_neurons_that_are_drawn_again_are_new_in_every_expert() -> None:
    step = grown(SOURCE, upcycling(method="drop", drop_ratio=0.5), **EXPERTS)
    for name, dim in (("gate_proj", 1), ("down_proj", 2)):
        mask = masks(step)[f"{LAYER}mlp.experts.{name}"]
        assert mask[0].any(2 - dim).sum().item() == 6 and mask[1:].all()


def test_marks_are_carried_through_width_depth_and_experts() -> None:
    wider = grown(SOURCE, growth(), hidden_size=12, intermediate_size=18)
    deeper = grown(wider.target, growth(depth="stack"), num_hidden_layers=4)
    sparse = grown(deeper.target, upcycling(), **{**EXPERTS, "moe_intermediate_size": 18})
    wide, deep, found = masks(wider), masks(wider, deeper), masks(wider, deeper, sparse)
    up = f"{LAYER}mlp.up_proj.weight"
    assert torch.equal(deep[up], wide[up]) and deep[up.replace("0", "2")].all()
    experts = found[f"{LAYER}mlp.experts.up_proj"]
    assert torch.equal(experts[0], wide[up]) and experts[1:].all()
    assert torch.equal(found[f"{LAYER}input_layernorm.weight"], wide[f"{LAYER}input_layernorm.weight"])
    assert found["model.layers.3.mlp.experts.down_proj"].all()


def test_further_tokens_are_new_and_everything_of_a_model_that_is_drawn() -> None:
    found = masks(grown(SOURCE, growth(), vocab_size=40))
    assert found["lm_head.weight"].all(1).tolist() == [False] * 32 + [True] * 8
    assert all(mask.all() for mask in masks(grown(SOURCE, growth(method="random"), hidden_size=16)).values())


def test_a_part_of_the_marks_is_that_of_the_whole() -> None:
    step = grown(model(**EXPERTS), upcycling(), num_experts=8, num_experts_per_tok=4)
    wider = grown(step.target, growth(), hidden_size=12)
    marks = new_parts([step, wider])
    for name, whole in masks(step, wider).items():
        place = tuple(slice(size // 3, size) for size in whole.shape)
        assert torch.equal(marks[name].part(place).expand(whole[place].shape), whole[place])
        assert marks[name].all_new == bool(whole.all()) and marks[name].any_new == bool(whole.any())
