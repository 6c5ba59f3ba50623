"""Maps of units: which channel, neuron and head of the source each of the target copies."""

from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.config.schema import ModelConfig
from aquilamoe.growth.units import UnitMap, channels, circular, map_units, query_heads
from aquilamoe.weights import names

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)


def model(**changes: object) -> ModelConfig:
    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 2,
        "max_position_embeddings": 16,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "qkv_bias": True,
        "tie_word_embeddings": False,
        "num_experts": 0,
        "num_experts_per_tok": 0,
    }
    return ModelConfig.model_validate(sizes | changes)


@given(old=st.integers(1, 40), new=st.integers(0, 80))
@PROPERTY
def test_a_circular_map_keeps_the_old_units_in_place_and_shares_copies_evenly(old: int, new: int) -> None:
    units = circular(old, old + new)
    assert units.sources[:old] == tuple(range(old))
    assert sum(units.counts) == old + new
    assert max(units.counts) - min(units.counts) <= 1
    assert units.is_new == (False,) * old + (True,) * new
    assert units.is_onto
    assert units.is_identity == (new == 0)


def test_copies_are_counted_for_every_target_unit() -> None:
    units = UnitMap((0, 2, 0, 1, 0), num_sources=4)
    assert units.counts == (3, 1, 1, 0)
    assert units.copies == (3, 1, 3, 1, 3)
    assert units.is_new == (False, False, True, False, True)
    assert not units.is_onto


def test_new_query_heads_join_the_group_whose_keys_they_need() -> None:
    heads = query_heads(source=(8, 2), target=(10, 2))
    assert heads.sources == (0, 1, 2, 3, 0, 4, 5, 6, 7, 4)


def test_grown_groups_are_copied_whole() -> None:
    assert query_heads(source=(8, 2), target=(16, 4)).sources == (0, 1, 2, 3, 4, 5, 6, 7) * 2
    assert query_heads(source=(4, 2), target=(6, 3)).sources == (0, 1, 2, 3, 0, 1)


def test_copies_of_a_group_with_fewer_slots_cover_it_together() -> None:
    heads = query_heads(source=(8, 2), target=(8, 4))
    assert heads.sources == (0, 1, 4, 5, 2, 3, 6, 7)
    assert heads.is_onto
    assert not query_heads(source=(8, 2), target=(9, 3)).is_onto  # 3 slots for 4 heads, and only group 0 has 2 copies


@given(groups=st.integers(1, 4), slots=st.integers(1, 4), more_groups=st.integers(0, 5), target_slots=st.integers(1, 8))
@PROPERTY
def test_query_heads_of_a_group_come_from_the_group_of_its_keys(
    groups: int, slots: int, more_groups: int, target_slots: int
) -> None:
    new_groups = groups + more_groups
    heads = query_heads((groups * slots, groups), (new_groups * target_slots, new_groups))
    keys = circular(groups, new_groups)
    for head, source in enumerate(heads.sources):
        assert source // slots == keys.sources[head // target_slots]
    assert heads.is_onto == (target_slots * min(keys.counts) >= slots)
    if new_groups == groups:
        expected = [group * slots + slot % slots for group in range(groups) for slot in range(target_slots)]
        assert list(heads.sources) == expected


def test_a_head_is_copied_whole_with_its_channels_in_order() -> None:
    assert channels(UnitMap((0, 1, 0), 2), head_dim=3).sources == (0, 1, 2, 3, 4, 5, 0, 1, 2)
    assert channels(UnitMap((1,), 2), head_dim=2) == UnitMap((2, 3), 4)


def test_the_maps_of_every_tensor_have_the_shapes_of_source_and_target() -> None:
    source = model()
    target = model(hidden_size=11, intermediate_size=17, num_attention_heads=9, num_key_value_heads=3)
    units = map_units(source, target)
    source_shapes = names.role_shapes(source) | names.outer_shapes(source)
    target_shapes = names.role_shapes(target) | names.outer_shapes(target)
    for role in target_shapes:
        for axis, space in enumerate((units.rows(role), units.columns(role))):
            if space is not None:
                assert (space.num_sources, len(space.sources)) == (source_shapes[role][axis], target_shapes[role][axis])
    matrices = {role for role, shape in names.role_shapes(target).items() if len(shape) == 2}
    assert {role for role in matrices if units.rows(role) and units.columns(role)} == matrices


def test_equal_sizes_grow_nothing_and_any_larger_size_grows_something() -> None:
    assert map_units(model(), model(num_hidden_layers=9)).is_identity
    for size in (
        {"hidden_size": 9},
        {"intermediate_size": 13},
        {"num_attention_heads": 6},
        {"num_key_value_heads": 4},
    ):
        assert not map_units(model(), model(**size)).is_identity
