"""Steps that must not be taken: skipped, or gone back before, the same on all ranks and after every interruption."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from aquilamoe.config.messages import UserError
from aquilamoe.data.loader import Batches
from aquilamoe.data.tokens import TokenCounts, TokensRecord, write_record
from aquilamoe.model.transformer import Decoder
from aquilamoe.training import checkpoint, example
from aquilamoe.training.job import FIRST, Job, Rank
from aquilamoe.training.loop import train
from aquilamoe.training.metrics import PointsFile
from aquilamoe.training.objective import RouterObjective
from aquilamoe.training.parallel import ParallelContext
from aquilamoe.training.step import TrainStep
from token_files import write_token_file

VOCABULARY, LENGTH, ROWS, STEPS = 32, 8, 4, 8
BATCH = LENGTH * ROWS
MODEL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "initializer_range": 0.1,
    "qkv_bias": False,
    "num_experts": 4,
}
TIMES = {"time", "train/tokens_per_s", "train/data_wait_share", "val/seconds", "checkpoint/seconds"}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(5)
    for split, size in (("train", 4000), ("validation", 100)):
        documents = [generator.integers(0, VOCABULARY - 1, 100) for _ in range(size // 100)]
        write_token_file(folder / f"{split}-en", VOCABULARY, documents)
    counts = {"train": TokenCounts(4000, 40, 4000), "validation": TokenCounts(100, 1, 100)}
    write_record(folder, TokensRecord(VOCABULARY, VOCABULARY - 1, {"en": counts}))
    return folder


def make_job(tokens: Path, out: Path, policy: str, limit: float | None = None, events: int = 10, every: int = 2) -> Job:
    """A job of STEPS steps with a checkpoint after each `every`."""
    return example.job(
        tokens,
        out,
        **MODEL,
        total_tokens=STEPS * BATCH,
        batch_tokens=BATCH,
        sequence_length=LENGTH,
        learning_rate=0.01,
        router={"balance_loss_coeff": 0.0, "bias_update_rate": 0.01},
        spikes={"policy": policy, "max_grad_norm": limit, "max_events": events},
        validate_every_tokens=3 * BATCH,
        validation_tokens=5 * LENGTH,  # which two ranks cannot divide
        micro_batch_tokens=BATCH,
        checkpoint_every_tokens=every * BATCH,
    )


def sequences(tokens: Path, start: int, count: int) -> np.ndarray:
    """Some sequences of the stream that the jobs read."""
    return Batches(tokens, {"en": 1.0}, LENGTH, count, seed=1).read(start)


Patch = Callable[[pytest.MonkeyPatch], None]


def spoil(tokens: Path, *bad: int) -> Patch:
    """Let the loss be NaN whenever a batch has one of these sequences of the stream."""
    spoiled = [sequences(tokens, each, 1)[0] for each in bad]
    original = TrainStep.accumulate

    def accumulate(self: TrainStep, rows: np.ndarray, router: RouterObjective) -> dict[str, Tensor]:
        losses = original(self, rows, router)
        if any(np.array_equal(row, one) for row in rows for one in spoiled):
            losses["train/loss"] = losses["train/loss"] * math.nan
        return losses

    return lambda patch: patch.setattr(TrainStep, "accumulate", accumulate)


def points(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    def no_nan(text: str) -> float:
        raise AssertionError(f"{text} is no JSON")

    lines = (out / name).read_text().splitlines()
    found = [json.loads(line, parse_constant=no_nan) for line in lines]
    return [{key: value for key, value in point.items() if key not in TIMES} for point in found]


def assert_same_result(one: Path, other: Path) -> None:
    files = sorted(path.relative_to(one) for part in ("model", "training") for path in (one / part).rglob("*.*"))
    assert len(files) >= 5
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    for name in ("metrics.jsonl", "router.jsonl"):
        assert points(one, name) == points(other, name)


def progress(folder: Path) -> list[int]:
    """Skipped steps, rollbacks and skipped sequences, as a checkpoint keeps them."""
    return load_file(folder / "training" / "extra.safetensors")["progress"].tolist()


# Skipping


def test_a_skipped_step_changes_neither_weights_nor_moments_nor_biases_and_is_counted(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(tokens, 3 * ROWS + 1)(monkeypatch)
    monkeypatch.setattr(checkpoint, "KEEP", STEPS)
    metrics = train(make_job(tokens, tmp_path, "skip", every=1))
    folders = [tmp_path / "checkpoints" / f"step-{step:09d}" for step in (3, 4, 5)]
    for file in ("model/model.safetensors", "training/optimizer.safetensors"):
        before, at, after = ((folder / file).read_bytes() for folder in folders)
        assert before == at != after
    biases = [load_file(folder / "training" / "extra.safetensors")["selection_bias"] for folder in folders]
    assert torch.equal(biases[0], biases[1]) and not torch.equal(biases[1], biases[2])
    assert metrics["skipped_steps"] == 1 and metrics["rollbacks"] == 0 and metrics["steps"] == STEPS
    found = points(tmp_path)
    assert [point.get("train/skipped_steps") for point in found] == [0] * 4 + [1] * 5
    assert [point["step"] for point in found if "train/loss" not in point] == [0, 4]


def test_a_gradient_norm_over_the_limit_is_a_spike_and_one_under_it_is_not(tokens: Path, tmp_path: Path) -> None:
    train(make_job(tokens, tmp_path / "free", "skip"))
    norms = [point["train/grad_norm"] for point in points(tmp_path / "free")[1:]]
    limit = norms[0] * (1 - 1e-6)  # the first step is skipped, and so are later ones over it
    metrics = train(make_job(tokens, tmp_path / "held", "skip", limit))
    held = [point["train/grad_norm"] for point in points(tmp_path / "held")[1:]]
    assert metrics["skipped_steps"] == sum(norm > limit for norm in held) >= 1
    with pytest.raises(UserError, match=rf"train/grad_norm is .*, over spikes.max_grad_norm \({limit}\), at step 1 of"):
        train(make_job(tokens, tmp_path / "stopped", "stop", limit))


def test_more_spikes_than_max_events_stop_the_stage_with_one_line(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(tokens, *range(2 * ROWS, STEPS * ROWS, ROWS))(
        monkeypatch
    )  # each batch from the third on: back to the beginning, twice
    for policy, step in (("skip", 5), ("roll_back", 1)):
        job = make_job(tokens, tmp_path / policy, policy, events=2)
        with pytest.raises(UserError) as raised:
            train(job)
        message = str(raised.value)
        assert message.startswith(f"stage small: train/loss is nan at step {step} of {STEPS}")
        assert "2 times before" in message and "spikes.max_events" in message and "\n" not in message


# Rolling back


def watch_rows(patch: pytest.MonkeyPatch) -> dict[int, np.ndarray]:
    """The rows that each step was taken with, the last time that it was."""
    original, rows_of = TrainStep.step, {}

    def step(self: TrainStep, number: int, rows: np.ndarray) -> dict[str, float]:
        rows_of[number] = rows
        return original(self, number, rows)

    patch.setattr(TrainStep, "step", step)
    return rows_of


@pytest.mark.parametrize(
    ("bad_step", "resumed_at"),
    [
        (6, 4),  # the newest checkpoint
        (5, 2),  # the checkpoint of 4 has the weights of the bad loss: not trusted
        (1, 0),  # there is none: the stage starts over
    ],
)
def test_a_rollback_goes_on_from_the_checkpoint_before_with_the_data_after_the_bad_batch(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad_step: int, resumed_at: int
) -> None:
    spoil(tokens, (bad_step - 1) * ROWS)(monkeypatch)
    rows_of = watch_rows(monkeypatch)
    metrics = train(make_job(tokens, tmp_path, "roll_back"))
    taken = np.concatenate([rows_of[step] for step in range(1, STEPS + 1)])
    before = sequences(tokens, 0, resumed_at * ROWS) if resumed_at else taken[:0]
    after = sequences(tokens, bad_step * ROWS, (STEPS - resumed_at) * ROWS)
    assert np.array_equal(taken, np.concatenate([before, after]))
    assert progress(tmp_path) == [0, 1, (bad_step - resumed_at) * ROWS]
    assert metrics["rollbacks"] == 1 and metrics["skipped_steps"] == 0 and metrics["steps"] == STEPS
    found = points(tmp_path)
    assert [point["step"] for point in found] == list(range(STEPS + 1))
    assert [point["train/rollbacks"] for point in found] == [0] * (resumed_at + bool(resumed_at)) + [1] * (
        STEPS + 1 - resumed_at - bool(resumed_at)
    )


def test_a_gradient_norm_over_the_limit_trusts_the_weights_that_it_was_computed_from(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unlike a loss that is not finite: the checkpoint of step 4 is where the bad step 5 is repeated from."""
    original = TrainStep.measured
    rows_of = watch_rows(monkeypatch)

    def spike(self: TrainStep, values: dict[str, Tensor]) -> dict[str, float]:
        is_bad = np.array_equal(rows_of[max(rows_of)], sequences(tokens, 4 * ROWS, ROWS))
        return original(self, values) | ({"train/grad_norm": 99.0} if is_bad else {})

    monkeypatch.setattr(TrainStep, "measured", spike)
    train(make_job(tokens, tmp_path, "roll_back", limit=50.0))
    assert progress(tmp_path) == [0, 1, ROWS]


def test_weights_that_an_update_spoiled_are_gone_back_before_when_a_validation_shows_it(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, spoiled = TrainStep.step, list[int]()

    def step(self: TrainStep, number: int, rows: np.ndarray) -> dict[str, float]:
        values = original(self, number, rows)
        if number == 6 and not spoiled:
            spoiled.append(number)
            with torch.no_grad():
                self.model.lm_head.weight.fill_(math.inf)
        return values

    monkeypatch.setattr(TrainStep, "step", step)
    assert train(make_job(tokens, tmp_path, "roll_back"))["rollbacks"] == 1
    assert progress(tmp_path) == [0, 1, 2 * ROWS]


@pytest.mark.parametrize("activation_checkpointing", [False, True], ids=["plain", "with cycles of references"])
def test_the_old_model_is_freed_before_a_rollback_builds_another(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, activation_checkpointing: bool
) -> None:
    models: list[weakref.ref[Decoder]] = []
    alive: list[int] = []
    original = ParallelContext.build

    def build(self: ParallelContext, *arguments: Any) -> Decoder:
        alive.append(sum(each() is not None for each in models))
        models.append(weakref.ref(model := original(self, *arguments)))
        return model

    monkeypatch.setattr(ParallelContext, "build", build)
    spoil(tokens, 5 * ROWS)(monkeypatch)
    job = make_job(tokens, tmp_path, "roll_back")
    cluster = job.cluster.model_copy(update={"activation_checkpointing": activation_checkpointing})
    train(dataclasses.replace(job, cluster=cluster))
    assert alive == [0, 0]


def test_mistaken_data_are_refused_before_a_model_is_built(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ParallelContext, "build", lambda *_: pytest.fail("a model was built"))
    job = make_job(tokens, tmp_path / "out", "stop")
    with pytest.raises(UserError, match=r"tokens\.json: no such file"):
        train(dataclasses.replace(job, tokens=tmp_path))


def test_a_source_that_is_spoiled_is_not_rolled_back(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aquilamoe.training.validation.evaluate", lambda *_: math.nan)
    with pytest.raises(UserError, match=f"val/loss is nan at step 0 of {STEPS} "):
        train(make_job(tokens, tmp_path, "roll_back"))


class Killed(BaseException):
    """Not an Exception, so that nothing on the way catches it."""


def run_until(job: Job, event: int) -> bool:
    """Train, and be killed at the given event; return whether training came that far."""
    seen = 0

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == event:
                raise Killed
            return function(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "step", watched(TrainStep.step))
        patch.setattr(PointsFile, "write", watched(PointsFile.write))
        patch.setattr(checkpoint, "save_checkpoint", watched(checkpoint.save_checkpoint))
        patch.setattr(checkpoint, "discard", watched(checkpoint.discard))
        patch.setattr(shutil, "rmtree", watched(shutil.rmtree))
        try:
            train(job)
        except Killed:
            return False
    return True


@pytest.mark.process
@pytest.mark.parametrize(("policy", "bad"), [("skip", (9, 14)), ("roll_back", (17, 25))])
def test_a_run_that_is_killed_once_anywhere_ends_with_the_same_bytes(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, bad: tuple[int, ...]
) -> None:
    """The second rollback is to the checkpoint of the first, before another has kept what that skipped."""
    spoil(tokens, *bad)(monkeypatch)
    metrics = train(make_job(tokens, tmp_path / "whole", policy))
    assert metrics["skipped_steps"] + metrics["rollbacks"] == 2
    event = 1
    while not run_until(broken := make_job(tokens, tmp_path / f"broken-{event}", policy), event):
        train(broken)
        assert_same_result(tmp_path / "whole", broken.out)
        shutil.rmtree(broken.out)
        event += 5
    assert event > 3 * STEPS


# Ranks. Each process of a pair runs this very file as a script.


def run_rank(rank: int, tokens: Path, folder: Path) -> None:
    """Train with a bad sequence that only the second rank reads."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    with pytest.MonkeyPatch.context() as patch:
        spoil(tokens, 5 * ROWS + ROWS - 1)(patch)
        for policy in ("skip", "roll_back"):
            train(make_job(tokens, folder / policy, policy), Rank(rank, 2, rank))
    dist.destroy_process_group()


@pytest.mark.process
def test_two_ranks_do_alike_what_one_would_do(tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also their validation is that of one rank, though they cannot divide its rows evenly."""
    command = [sys.executable, __file__, str(tokens), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    started = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, env=environment) for rank in range(2)
    ]
    spoil(tokens, 5 * ROWS + ROWS - 1)(monkeypatch)
    for policy in ("skip", "roll_back"):
        train(make_job(tokens, tmp_path / f"{policy}-alone", policy), FIRST)
    errors = [process.communicate()[1] for process in started]  # of both, so that none is left
    assert [process.returncode for process in started] == [0, 0], errors
    for policy in ("skip", "roll_back"):
        pairs = zip(points(tmp_path / policy), points(tmp_path / f"{policy}-alone"), strict=True)
        for two, one in pairs:
            assert two == pytest.approx(one, rel=1e-5, abs=1e-6), policy
        assert progress(tmp_path / policy) == progress(tmp_path / f"{policy}-alone")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_rank(int(sys.argv[3]), Path(sys.argv[1]), Path(sys.argv[2]))
