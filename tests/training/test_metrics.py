"""metrics.jsonl: what is written, what is forgotten on a resume, and the numbers that are drawn from it."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aquilamoe.training.metrics import RECOVERED, MetricsFile, PointsFile, recovery_tokens

BATCH, FLOPS = 64, 10


def metrics_file(folder: Path, resume_step: int = 0, enabled: bool = True) -> MetricsFile:
    return MetricsFile(
        folder / "metrics.jsonl",
        resume_step=resume_step,
        batch_tokens=BATCH,
        flops_per_token=FLOPS,
        ancestor_tokens=1000,
        ancestor_flops=5_000_000,
        enabled=enabled,
    )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(step: int, **values: float) -> dict[str, float]:
    return {"train/loss": 5.0 - step, "train/tokens_per_s": 100.0 * step, **values}


def validated(tokens: int, loss: float) -> dict[str, float]:
    return {"tokens": tokens, "val/loss": loss}


def test_a_point_states_what_was_trained_here_and_by_all_ancestors(tmp_path: Path) -> None:
    metrics_file(tmp_path).write(3, {"train/loss": 2.5})
    (point,) = lines(tmp_path)
    assert point.pop("time") > 1.7e9
    assert point == {
        "step": 3,
        "tokens": 3 * BATCH,
        "lineage_tokens": 1000 + 3 * BATCH,
        "lineage_flops": 5_000_000 + 3 * BATCH * FLOPS,
        "train/loss": 2.5,
    }


def test_a_point_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    points = metrics_file(tmp_path)
    assert lines(tmp_path) == []
    for step in range(3):
        points.write(step, {})
        assert len(lines(tmp_path)) == step + 1


def test_what_is_not_finite_is_left_out_because_json_has_no_word_for_it(tmp_path: Path) -> None:
    metrics_file(tmp_path).write(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "a": 1.0, "b": 2})
    (point,) = lines(tmp_path)
    assert {"a", "b"} < point.keys() and not any(key.startswith("train/") for key in point)


def test_a_table_of_routers_is_written_and_resumed_as_the_metrics_are(tmp_path: Path) -> None:
    def table(resume_step: int) -> PointsFile:
        return PointsFile(tmp_path / "metrics.jsonl", resume_step, BATCH, enabled=True)

    first = table(0)
    for step in (2, 4, 6):
        first.write(step, {"load": [[0.25, 0.75]], "dropped": [0]})
    table(4).write(5, {"load": [[0.5, 0.5]]})
    assert lines(tmp_path) == [
        {"step": 2, "tokens": 2 * BATCH, "load": [[0.25, 0.75]], "dropped": [0]},
        {"step": 4, "tokens": 4 * BATCH, "load": [[0.25, 0.75]], "dropped": [0]},
        {"step": 5, "tokens": 5 * BATCH, "load": [[0.5, 0.5]]},
    ]


@pytest.mark.parametrize("resume_step", [1, 2, 4])
def test_a_resume_keeps_the_points_up_to_its_checkpoint_and_no_others(tmp_path: Path, resume_step: int) -> None:
    first = metrics_file(tmp_path)
    for step in range(5):
        first.write(step, {"value": step})
    kept = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[: resume_step + 1]
    second = metrics_file(tmp_path, resume_step)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines() == kept
    assert [point["step"] for point in second.points] == list(range(resume_step + 1))


def test_a_stage_that_starts_over_forgets_every_point(tmp_path: Path) -> None:
    metrics_file(tmp_path).write(0, {})
    metrics_file(tmp_path)
    assert lines(tmp_path) == []


def test_a_line_that_a_killed_process_left_half_written_is_forgotten(tmp_path: Path) -> None:
    metrics_file(tmp_path).write(1, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tok')
    metrics_file(tmp_path, resume_step=2).write(2, {})
    assert [point["step"] for point in lines(tmp_path)] == [1, 2]


def test_a_resume_replaces_the_file_so_that_a_reader_of_the_old_one_notices(tmp_path: Path) -> None:
    metrics_file(tmp_path).write(1, {})
    with (tmp_path / "metrics.jsonl").open() as reader:
        metrics_file(tmp_path, resume_step=1).write(2, {})
        assert len(reader.readlines()) == 1
    assert len(lines(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_ranks_keep_points_but_write_none(tmp_path: Path) -> None:
    metrics_file(tmp_path).write(1, trained(1))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    other = metrics_file(tmp_path, resume_step=1, enabled=False)
    other.write(2, trained(2, **{"val/loss": 4.0}))
    other.sync()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert other.summary()["steps"] == 2


def test_the_summary_is_of_the_first_and_the_last_validation(tmp_path: Path) -> None:
    points = metrics_file(tmp_path)
    points.write(0, {"val/loss": 6.0, "val/loss/en": 5.0, "val/loss/zh": 7.0})
    for step in (1, 2, 3):
        points.write(step, trained(step))
    points.write(4, trained(4, **{"val/loss": 3.0, "val/loss/en": 2.0, "val/loss/zh": 4.0}))
    tokens = 4 * BATCH
    assert points.summary() == {
        "steps": 4,
        "tokens": tokens,
        "flops": tokens * FLOPS,
        "lineage_tokens": 1000 + tokens,
        "lineage_flops": 5_000_000 + tokens * FLOPS,
        "loss_start": 6.0,
        "loss_end": 3.0,
        "loss_end/en": 2.0,
        "loss_end/zh": 4.0,
        "tokens_per_s": 250.0,
    }


# Recovery


def test_recovery_is_interpolated_between_validations_and_then_whole_steps() -> None:
    points: list[dict[str, Any]] = [validated(0, 4.0), {"tokens": 50}, validated(100, 3.0), validated(200, 2.0)]
    assert recovery_tokens(points, 3.5 - RECOVERED, 1) == 50
    assert recovery_tokens(points, 3.5 - RECOVERED, 20) == 60
    assert recovery_tokens(points, 3.0 - RECOVERED, 20) == 100
    assert recovery_tokens(points, 2.25 - RECOVERED, 25) == 175


def test_recovery_does_not_hang_on_the_rounding_of_a_loss() -> None:
    """A growth that keeps the function starts some 1e-7 above or below its source's loss."""
    for rounding in (-4e-7, 0.0, 4e-7):
        assert recovery_tokens([validated(0, 2.0 + rounding), validated(4096, 1.5)], 2.0, 1024) == 0
    found = [recovery_tokens([validated(0, 2.0 + off), validated(4096, 1.5)], 2.0, 1024) for off in (0.0011, 0.5)]
    assert found == [1024, 2048], "never a part of a step"


def test_nothing_is_to_be_recovered_when_the_loss_starts_at_the_goal() -> None:
    assert recovery_tokens([validated(0, 2.0), validated(100, 3.0)], 2.0, 10) == 0


def test_a_loss_that_never_comes_back_has_no_recovery() -> None:
    assert recovery_tokens([validated(0, 4.0), validated(100, 3.0)], 2.9, 10) is None
    assert recovery_tokens([{"tokens": 0, "train/loss": 1.0}], 2.9, 10) is None


def test_recovery_is_the_first_return_even_if_the_loss_rises_again() -> None:
    points = [validated(0, 4.0), validated(100, 5.0), validated(200, 3.0), validated(300, 6.0), validated(400, 1.0)]
    assert recovery_tokens(points, 4.0, 25) == 0
    assert recovery_tokens(points, 3.5 - RECOVERED, 25) == 175


@settings(derandomize=True, deadline=None, max_examples=50)
@given(losses=st.lists(st.floats(0.1, 20.0), min_size=1, max_size=12), goal=st.floats(0.1, 20.0))
def test_recovery_lies_between_the_last_validation_above_the_goal_and_the_first_at_it(
    losses: list[float], goal: float
) -> None:
    found = recovery_tokens([validated(100 * index, loss) for index, loss in enumerate(losses)], goal, 1)
    reached = next((index for index, loss in enumerate(losses) if loss <= goal + RECOVERED), None)
    if reached is None:
        assert found is None
    else:
        assert found is not None and 100 * max(0, reached - 1) <= found <= 100 * reached
