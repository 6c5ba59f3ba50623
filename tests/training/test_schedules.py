"""Learning-rate schedules by their properties: where they start, where they end, and that nothing jumps."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.config import graph
from aquilamoe.config.schema import PretrainStage, ScheduleConfig
from aquilamoe.training.schedules import learning_rate_factor

TOTAL = 1000
NAMES = ("cosine", "wsd", "constant")
any_schedule = st.builds(
    lambda name, warmup, decay, ratio: schedule(
        name, warmup_tokens=warmup, decay_tokens=min(decay, TOTAL - warmup), min_lr_ratio=ratio
    ),
    name=st.sampled_from(NAMES),
    warmup=st.integers(0, TOTAL),
    decay=st.integers(0, TOTAL),
    ratio=st.floats(0.0, 1.0),
)


def schedule(name: str, **changes: Any) -> ScheduleConfig:
    return ScheduleConfig.model_validate(
        {"name": name, "warmup_tokens": 100, "decay_tokens": 300, "min_lr_ratio": 0.1, **changes}
    )


def factors(config: ScheduleConfig, batch: int = 1) -> list[float]:
    """The factor of every step of a stage of TOTAL tokens."""
    return [learning_rate_factor(tokens, TOTAL, config) for tokens in range(batch, TOTAL + 1, batch)]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(config=any_schedule)
def test_every_step_learns_at_most_at_the_peak(config: ScheduleConfig) -> None:
    steps = factors(config)
    assert max(steps) <= 1.0
    # The last step of a schedule that ends at 0 is the only one that may be lost.
    assert min(steps[:-1]) > 0.0 and steps[-1] >= 0.0


@settings(derandomize=True, deadline=None, max_examples=60)
@given(config=any_schedule)
def test_the_warm_up_is_a_straight_line_from_zero_to_the_peak(config: ScheduleConfig) -> None:
    steps = factors(config)
    for tokens in range(1, config.warmup_tokens + 1):
        assert math.isclose(steps[tokens - 1], tokens / config.warmup_tokens)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(config=any_schedule)
def test_the_rate_never_rises_after_its_peak(config: ScheduleConfig) -> None:
    after = factors(config)[max(config.warmup_tokens, 1) - 1 :]
    assert all(later <= earlier for earlier, later in pairwise(after))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(config=any_schedule, total=st.integers(TOTAL // 2, TOTAL))
def test_the_rate_never_jumps_even_when_the_stage_ends_before_its_budget(config: ScheduleConfig, total: int) -> None:
    slopes = [1 / length for length in (config.warmup_tokens, config.decay_tokens) if length]
    if config.name == "cosine":
        slopes.append(math.pi / 2 / max(1, total - config.warmup_tokens))
    steepest = max(slopes, default=0.0)
    steps = [learning_rate_factor(tokens, total, config) for tokens in range(1, total + 1)]
    assert all(abs(later - earlier) <= steepest + 1e-12 for earlier, later in pairwise(steps))


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_cosine_and_wsd_end_at_min_lr_ratio(name: str, ratio: float) -> None:
    assert learning_rate_factor(TOTAL, TOTAL, schedule(name, min_lr_ratio=ratio)) == ratio


def test_a_cosine_is_half_way_down_half_way_through() -> None:
    assert math.isclose(learning_rate_factor(550, TOTAL, schedule("cosine")), 0.1 + 0.9 / 2)
    assert math.isclose(learning_rate_factor(325, TOTAL, schedule("cosine")), 0.1 + 0.9 * (0.5 + math.sqrt(2) / 4))


def test_a_cosine_does_not_read_decay_tokens() -> None:
    assert factors(schedule("cosine", decay_tokens=0)) == factors(schedule("cosine", decay_tokens=777))


def test_wsd_stays_at_the_peak_until_the_decay_and_then_falls_in_a_straight_line() -> None:
    steps = factors(schedule("wsd"))
    assert set(steps[99:700]) == {1.0}
    falls = [earlier - later for earlier, later in pairwise(steps[699:])]
    assert all(math.isclose(fall, 0.9 / 300, rel_tol=1e-9) for fall in falls)


def test_wsd_without_decay_keeps_the_peak_so_that_a_later_stage_can_decay() -> None:
    assert set(factors(schedule("wsd", decay_tokens=0))[99:]) == {1.0}


def test_a_constant_schedule_ignores_decay_and_min_lr_ratio() -> None:
    assert set(factors(schedule("constant"))[99:]) == {1.0}


@pytest.mark.parametrize("name", NAMES)
def test_without_warm_up_the_first_step_learns_at_about_the_peak(name: str) -> None:
    assert learning_rate_factor(1, TOTAL, schedule(name, warmup_tokens=0)) > 0.999


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_up_shorter_than_a_batch_is_over_with_the_first_step(name: str) -> None:
    assert factors(schedule(name, warmup_tokens=40), batch=50)[0] > 0.999


# As in a configuration


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_reachable_for_all_stages_and_for_one(
    compose: Callable[..., dict[str, Any]], name: str
) -> None:
    """By its group, and in a stage: there a cooldown, or a re-warming after a growth."""
    values = compose(f"schedule={name}", "stages.moe.schedule.name=wsd", "stages.moe.schedule.decay_tokens=100_000")
    stages = graph.parse(values).stages
    dense, moe = stages["dense"], stages["moe"]
    assert isinstance(dense, PretrainStage) and isinstance(moe, PretrainStage)
    assert (dense.schedule.name, moe.schedule.name) == (name, "wsd")
    total = 1_000_000
    assert (
        learning_rate_factor(1, total, dense.schedule)
        < 0.01
        < 1.0
        == learning_rate_factor(dense.schedule.warmup_tokens, total, dense.schedule)
    )
    assert learning_rate_factor(total - 50_000, total, moe.schedule) == pytest.approx(
        (1 + moe.schedule.min_lr_ratio) / 2
    )
