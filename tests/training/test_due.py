"""What a training does by the clock or on request changes no weight, and what it keeps stays."""

from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aquilamoe.checkpoint.state_dict import load_model
from aquilamoe.config.messages import UserError
from aquilamoe.config.points import read_points
from aquilamoe.data.tokens import TokenCounts, TokensRecord, write_record
from aquilamoe.process.stopping import forget_request, request_stop
from aquilamoe.training import checkpoint, example, loop
from aquilamoe.training.due import Clock, Due
from aquilamoe.training.job import Job
from aquilamoe.training.loop import train
from aquilamoe.training.parallel import ParallelContext
from token_files import write_token_file

STEPS, BATCH = 6, example.BATCH


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    counts = {}
    for split, size in (("train", 4000), ("validation", 400)):
        stream = np.arange(size) * 7 % (example.VOCABULARY - 1)
        write_token_file(folder / f"{split}-en", example.VOCABULARY, np.array_split(stream, size // 100))
        counts[split] = TokenCounts(size, size // 100, size)
    write_record(folder, TokensRecord(example.VOCABULARY, example.VOCABULARY - 1, {"en": counts}))
    return folder


def job(tokens: Path, root: Path, **changes: Any) -> Job:
    out = root / "stages" / "small-0123.partial"
    return example.job(tokens, out, **{"total_tokens": STEPS * BATCH, **changes})


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def test_a_stop_saves_the_step_that_it_interrupts_and_the_rest_ends_with_the_same_bytes(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(whole := job(tokens, tmp_path / "whole"))
    stopped, steps, look = job(tokens, tmp_path / "stopped"), count(1), Clock.look

    def request_in_step_3(clock: Clock) -> Due:
        if next(steps) == 3:
            request_stop(stopped.out)
        return look(clock)

    monkeypatch.setattr(Clock, "look", request_in_step_3)
    with pytest.raises(UserError) as raised:
        train(stopped)
    assert str(raised.value) == (
        f"stage small: stopped on request, at {3 * BATCH} of {STEPS * BATCH} tokens; "
        "the same command resumes from there"
    )
    assert [path.name for path in checkpoint.checkpoints(stopped.out)] == ["step-000000003"]
    forget_request(stopped.out)
    train(stopped)
    assert weights(stopped.out) == weights(whole.out)


def test_time_alone_is_a_reason_to_save_and_changes_no_byte(tokens: Path, tmp_path: Path) -> None:
    train(rare := job(tokens, tmp_path / "rare"))
    train(often := job(tokens, tmp_path / "often", checkpoint_every_s=1e-9))
    saved = [path.name for path in checkpoint.checkpoints(often.out)]
    assert saved == ["step-000000005", "step-000000004"]
    assert checkpoint.checkpoints(rare.out) == []
    assert weights(often.out) == weights(rare.out)


def test_milestones_stay_when_later_checkpoints_and_the_stage_itself_have_gone_on(tokens: Path, tmp_path: Path) -> None:
    training = job(tokens, tmp_path, keep_every_tokens=2 * BATCH, checkpoint_every_tokens=BATCH)
    train(training)
    kept = tmp_path / "milestones" / "small-0123"
    assert sorted(path.name for path in kept.iterdir()) == ["step-000000002", "step-000000004"]
    assert [path.name for path in checkpoint.checkpoints(training.out)] == ["step-000000005", "step-000000004"]
    group = ParallelContext(training.cluster)
    assert all(checkpoint._damage(path, group) is None for path in kept.iterdir())
    assert load_model(kept / "step-000000002" / "model").config == training.model
    assert weights(kept / "step-000000002") != weights(kept / "step-000000004")


def test_a_milestone_of_steps_that_were_undone_is_replaced(tokens: Path, tmp_path: Path) -> None:
    train(once := job(tokens, tmp_path / "once", keep_every_tokens=2 * BATCH))
    again = job(tokens, tmp_path / "again", keep_every_tokens=2 * BATCH)
    kept = checkpoint.milestones(again.out) / "step-000000002"
    (kept / "model").mkdir(parents=True)
    (kept / "model" / "model.safetensors").write_text("of steps that were undone")
    train(again)
    assert weights(kept) == weights(checkpoint.milestones(once.out) / kept.name)


def test_points_are_means_over_the_steps_since_the_point_before_if_they_are_due_by_time(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(single := job(tokens, tmp_path / "single"))
    monkeypatch.setattr(loop, "LOG_POINTS", 2)
    train(means := job(tokens, tmp_path / "means", metrics_every_s=1e9))
    each = [point["train/loss"] for point in read_points(single.out / "metrics.jsonl") if point["step"]]
    found = [point for point in read_points(means.out / "metrics.jsonl") if point["step"]]
    assert len(each) == STEPS and [point["step"] for point in found] == [3, 6]
    assert [point["train/loss"] for point in found] == pytest.approx([np.mean(each[:3]), np.mean(each[3:])])
    monkeypatch.undo()
    monkeypatch.setattr(loop, "LOG_POINTS", 2)
    train(timed := job(tokens, tmp_path / "timed", metrics_every_s=1e-9))
    assert [point["step"] for point in read_points(timed.out / "metrics.jsonl")] == list(range(STEPS + 1))


def test_intervals_begin_again_with_whatever_ended_them(tokens: Path, tmp_path: Path) -> None:
    training, now = job(tokens, tmp_path, metrics_every_s=30.0, checkpoint_every_s=100.0), [0.0]
    clock = Clock(training, ParallelContext(training.cluster), now=lambda: now[0])
    now[0] = 29.0
    assert clock.look() == Due(point=False, checkpoint=False, stop=False)
    now[0] = 30.0
    assert clock.look() == Due(point=True, checkpoint=False, stop=False)
    clock.pointed()
    now[0] = 59.0
    assert clock.look() == Due(point=False, checkpoint=False, stop=False)
    now[0] = 101.0
    clock.saved()
    assert clock.look() == Due(point=True, checkpoint=False, stop=False)
