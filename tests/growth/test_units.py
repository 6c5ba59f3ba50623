"""Maps of units: which channel, neuron and head of the source each of the target copies."""

from functools import partial
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import small_checkpoints
from aquilamoe.checkpoint import tensor_names
from aquilamoe.growth.units import UnitMap, channels, circular, map_units, query_heads, rotary_channels, sampled
from small_checkpoints import growth

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
# A network of which every size is easily counted.
model = partial(small_checkpoints.model, num_attention_heads=4, head_dim=2, max_position_embeddings=16)


@given(old=st.integers(1, 40), new=st.integers(0, 80))
@PROPERTY
def test_a_circular_map_keeps_the_old_units_in_place_and_shares_copies_evenly(old: int, new: int) -> None:
    units = circular(old, old + new)
    assert units.sources[:old] == tuple(range(old))
    assert sum(units.counts) == old + new
    assert max(units.counts) - min(units.counts) <= 1
    assert units.is_new == (False,) * old + (True,) * new
    assert units.is_surjective
    assert units.is_identity == (new == 0)


@given(old=st.integers(1, 40), new=st.integers(0, 80), seed=st.integers(0, 9))
@PROPERTY
def test_a_sampled_map_keeps_the_old_units_and_shares_copies_as_evenly_as_a_circular_one(
    old: int, new: int, seed: int
) -> None:
    units = sampled(old, old + new, Random(seed))
    assert units == sampled(old, old + new, Random(seed))
    assert units.sources[:old] == tuple(range(old))
    assert sorted(units.counts) == sorted(circular(old, old + new).counts)
    assert units.is_new == (False,) * old + (True,) * new


def test_another_seed_samples_another_map_and_every_space_its_own() -> None:
    target = model(hidden_size=16, intermediate_size=16)
    how = growth(maps="sampled")
    first, second = (map_units(model(intermediate_size=8), target, how, seed) for seed in (1, 2))
    assert first == map_units(model(intermediate_size=8), target, how, 1)
    assert first.residual != second.residual
    assert first.residual != first.ffn
    assert map_units(model(), target, growth(), 1) == map_units(model(), target, growth(), 2)


def test_copies_are_counted_for_every_target_unit() -> None:
    units = UnitMap((0, 2, 0, 1, 0), num_sources=4)
    assert units.counts == (3, 1, 1, 0)
    assert units.copies == (3, 1, 3, 1, 3)
    assert units.is_new == (False, False, True, False, True)
    assert not units.is_surjective


def test_new_query_heads_join_the_group_whose_keys_they_need() -> None:
    heads = query_heads((8, 2), (10, 2), circular(2, 2))
    assert heads.sources == (0, 1, 2, 3, 0, 4, 5, 6, 7, 4)


def test_grown_groups_are_copied_whole() -> None:
    assert query_heads((8, 2), (16, 4), circular(2, 4)).sources == (0, 1, 2, 3, 4, 5, 6, 7) * 2
    assert query_heads((4, 2), (6, 3), circular(2, 3)).sources == (0, 1, 2, 3, 0, 1)
    assert query_heads((4, 2), (6, 3), UnitMap((0, 1, 1), 2)).sources == (0, 1, 2, 3, 2, 3)


def test_copies_of_a_group_with_fewer_slots_cover_it_together() -> None:
    heads = query_heads((8, 2), (8, 4), circular(2, 4))
    assert heads.sources == (0, 1, 4, 5, 2, 3, 6, 7)
    assert heads.is_surjective
    assert not query_heads(
        (8, 2), (9, 3), circular(2, 3)
    ).is_surjective  # 3 slots for 4 heads, and only group 0 has 2 copies


@pytest.mark.parametrize("maps", ["circular", "sampled"])
@given(groups=st.integers(1, 4), slots=st.integers(1, 4), more_groups=st.integers(0, 5), target_slots=st.integers(1, 8))
@PROPERTY
def test_query_heads_of_a_group_come_from_the_group_of_its_keys(
    maps: str, groups: int, slots: int, more_groups: int, target_slots: int
) -> None:
    new_groups = groups + more_groups
    source = model(num_attention_heads=groups * slots, num_key_value_heads=groups)
    sizes = {"num_attention_heads": new_groups * target_slots, "num_key_value_heads": new_groups}
    units = map_units(source, source.model_copy(update=sizes), growth(maps=maps))
    heads, keys = units.q_heads, units.kv_heads
    for head, source_head in enumerate(heads.sources):
        assert source_head // slots == keys.sources[head // target_slots]
    assert heads.is_surjective == (target_slots * min(keys.counts) >= slots)
    if new_groups == groups and maps == "circular":
        expected = [group * slots + slot % slots for group in range(groups) for slot in range(target_slots)]
        assert list(heads.sources) == expected


def test_a_head_is_copied_whole_with_its_channels_in_order() -> None:
    assert channels(UnitMap((0, 1, 0), 2), circular(3, 3)).sources == (0, 1, 2, 3, 4, 5, 0, 1, 2)
    assert channels(UnitMap((1,), 2), circular(2, 2)) == UnitMap((2, 3), 4)
    assert channels(UnitMap((1, 0), 2), circular(2, 4)).sources == (2, 3, 2, 3, 0, 1, 0, 1)


def test_a_rotary_pair_goes_where_its_frequency_is() -> None:
    inside = rotary_channels(head_dim=6, ratio=2)
    assert inside.sources == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5)
    assert inside.is_new == (False, True) * 6
    for ratio in (1, 2, 3):
        inside = rotary_channels(6, ratio)
        old = [channel for channel, new in enumerate(inside.is_new) if not new]
        frequency_of = [1e4 ** (-(pair % 3) / 3) for pair in range(6)]
        grown = [1e4 ** (-(channel % (3 * ratio)) / (3 * ratio)) for channel in old]
        assert grown == pytest.approx([frequency_of[inside.sources[channel]] for channel in old])


def test_zero_padding_copies_the_residual_stream_whole_and_pads_the_rest() -> None:
    units = map_units(model(), model(hidden_size=21), growth(norm="zero_pad"))
    assert units.residual == UnitMap(tuple(range(8)) * 2, 8, padding=5)
    assert units.residual.size == 21
    assert set(units.residual.copies) == {2}
    padded = map_units(model(), model(hidden_size=9), growth(norm="zero_pad")).residual
    assert not padded.has_new
    assert not padded.is_identity


@pytest.mark.parametrize("norm", ["exact", "zero_pad"])
def test_the_maps_of_every_tensor_have_the_shapes_of_source_and_target(norm: str) -> None:
    source = model()
    sizes = {"hidden_size": 11, "intermediate_size": 17, "num_attention_heads": 9, "num_key_value_heads": 3}
    target = model(head_dim=6, **sizes)
    units = map_units(source, target, growth(norm=norm))
    source_shapes = tensor_names.role_shapes(source, 0) | tensor_names.outer_shapes(source)
    target_shapes = tensor_names.role_shapes(target, 0) | tensor_names.outer_shapes(target)
    for role in target_shapes:
        for axis, space in enumerate((units.rows(role), units.columns(role))):
            if space is not None:
                assert (space.num_sources, space.size) == (source_shapes[role][axis], target_shapes[role][axis])
    matrices = {role for role, shape in tensor_names.role_shapes(target, 0).items() if len(shape) == 2}
    assert {role for role in matrices if units.rows(role) and units.columns(role)} == matrices


def test_equal_sizes_grow_nothing_and_any_larger_size_grows_something() -> None:
    assert map_units(model(), model(num_hidden_layers=9), growth()).is_identity
    for size in (
        {"hidden_size": 9},
        {"intermediate_size": 13},
        {"num_attention_heads": 6},
        {"num_key_value_heads": 4},
        {"head_dim": 4},
    ):
        assert not map_units(model(), model(**size), growth()).is_identity
