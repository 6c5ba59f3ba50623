"""The training loop: it learns, it resumes bit for bit wherever it was stopped, and it stops where it must."""

import inspect
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from aquilamoe.checkpoint.hf_config import read_config
from aquilamoe.checkpoint.state_dict import load_model, save_model
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig, EvaluateStage, ModelConfig, PretrainStage
from aquilamoe.data.loader import Batches
from aquilamoe.data.tokens import TokenCounts, TokensRecord, write_record
from aquilamoe.model.transformer import Attention, Decoder, Experts
from aquilamoe.pipeline.stage import Context, Input
from aquilamoe.stages import evaluate as evaluate_stage
from aquilamoe.stages import pretrain as pretrain_stage
from aquilamoe.training import checkpoint as checkpointing
from aquilamoe.training import loop, validation
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.dcp_storage import SafetensorsWriter
from aquilamoe.training.job import Job
from aquilamoe.training.loop import train
from aquilamoe.training.metrics import PointsFile
from aquilamoe.training.objective import RouterObjective
from aquilamoe.training.parallel import ParallelContext
from aquilamoe.training.spikes import TrainProgress
from aquilamoe.training.step import TrainStep
from aquilamoe.training.validation import evaluate
from token_files import write_token_file
from waiting import PATIENCE_S, until

VOCABULARY, END = 64, 63
LENGTH, ROWS = 8, 4
BATCH = LENGTH * ROWS
STEPS = 8
DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "qkv_bias": True,
    "tie_word_embeddings": False,
    "num_experts": 0,
    "num_experts_per_tok": 0,
}
MOE = {**DENSE, "num_experts": 4, "num_experts_per_tok": 2}
CONSTANT = {"name": "constant", "warmup_tokens": 0, "decay_tokens": 0, "min_lr_ratio": 1.0}
# What a repeated run measures again.
ADAMW = {
    "name": "adamw",
    "betas": (0.9, 0.95),
    "momentum": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
}
TIMES = ("time", "train/tokens_per_s", "train/data_wait_share", "val/seconds", "checkpoint/seconds")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two languages: in "en" a token follows another by one rule, in "zh" by a different one, with some noise."""
    folder = tmp_path_factory.mktemp("tokens")
    generator = np.random.default_rng(5)
    sources: dict[str, dict[str, TokenCounts]] = {}
    for source, factor in (("en", 5), ("zh", 11)):
        for split, size in (("train", 6000), ("validation", 500)):
            stream = np.empty(size, dtype=np.int64)
            stream[0] = 1
            for index in range(1, size):
                follows = generator.random() < 0.9
                stream[index] = (stream[index - 1] * factor + 7) % END if follows else generator.integers(0, END)
            stream[99::100] = END
            documents = np.array_split(stream, size // 100)
            write_token_file(folder / f"{split}-{source}", VOCABULARY, documents)
            sources.setdefault(source, {})[split] = TokenCounts(size, size // 100, 3 * size)
    write_record(folder, TokensRecord(VOCABULARY, END, sources))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return folder


def make_job(tokens: Path, out: Path, model: dict[str, Any] = DENSE, **changes: Any) -> Job:
    """A job of STEPS steps; `changes` are fields of the stage, the cluster or the job, by name."""
    stage: dict[str, Any] = {
        "kind": "pretrain",
        "inputs": {"tokens": "tokens"} | ({"source": "source"} if changes.get("source") else {}),
        "model": None if changes.get("source") else model,
        "total_tokens": STEPS * BATCH,
        "equal_flops": None,
        "batch_tokens": BATCH,
        "sequence_length": LENGTH,
        "mixture": {"en": 3.0, "zh": 1.0},
        "learning_rate": 0.01,
        "precision": "fp32",
        "optimizer_state": "reset",
        "seed": 1,
        "optimizer": ADAMW,
        "schedule": {"name": "wsd", "warmup_tokens": 2 * BATCH, "decay_tokens": 3 * BATCH, "min_lr_ratio": 0.1},
        "router": {"balance_loss_coeff": 0.01, "balance_scope": "global_batch", "z_loss_coeff": 0.001},
        "validate_every_tokens": 3 * BATCH,
        "validation_tokens": 4 * LENGTH,
    }
    cluster: dict[str, Any] = {
        "executor": "process",
        "address": None,
        "workers": 1,
        "cpus_per_worker": 1,
        "gpus_per_worker": 0,
        "gpu_memory_bytes": 0,
        "max_failures": 0,
        "micro_batch_tokens": BATCH,
        "checkpoint_every_tokens": 2 * BATCH,
        "compile": False,
        "flops_per_s": 1e9,
        "attention": "auto",
        "experts": "auto",
    }
    job: dict[str, Any] = {"name": "small", "source": None, "ancestor_tokens": 0, "ancestor_flops": 0}
    for key, value in changes.items():
        next(fields for fields in (stage, cluster, job) if key in fields)[key] = value
    return Job(
        stage=PretrainStage.model_validate(stage),
        model=ModelConfig.model_validate(model),
        tokens=tokens,
        out=out,
        cluster=ClusterConfig.model_validate(cluster),
        **job,
    )


def points(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def without_times(out: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in point.items() if key not in TIMES} for point in points(out)]


def assert_same_result(one: Path, other: Path) -> None:
    """The same bytes in every file of model/ and training/, and the same points but for times."""
    files = sorted(path.relative_to(one) for part in ("model", "training") for path in (one / part).rglob("*"))
    assert len(files) >= 5
    assert files == sorted(
        path.relative_to(other) for part in ("model", "training") for path in (other / part).rglob("*")
    )
    for file in files:
        assert not (one / file).is_file() or (one / file).read_bytes() == (other / file).read_bytes(), file
    assert without_times(one) == without_times(other)
    if (one / "router.jsonl").exists():
        assert (one / "router.jsonl").read_bytes() == (other / "router.jsonl").read_bytes()


# Learning


@pytest.mark.parametrize(
    ("model", "precision"),
    [(DENSE, "fp32"), (MOE, "bf16"), (DENSE, "bf16_master")],
    ids=["dense fp32", "moe bf16", "dense bf16_master"],
)
def test_the_loss_falls(tokens: Path, tmp_path: Path, model: dict[str, Any], precision: str) -> None:
    job = make_job(
        tokens, tmp_path, model, total_tokens=60 * BATCH, precision=precision, validate_every_tokens=30 * BATCH
    )
    metrics = train(job)
    assert abs(metrics["loss_start"] - math.log(VOCABULARY)) < 0.3
    assert metrics["loss_end"] < metrics["loss_start"] - 1.0
    train_losses = [point["train/loss"] for point in points(tmp_path)[1:]]
    assert sum(train_losses[-5:]) / 5 < sum(train_losses[:5]) / 5 - 1.0


def test_the_metrics_of_the_stage_are_those_of_its_points(tokens: Path, tmp_path: Path) -> None:
    metrics = train(make_job(tokens, tmp_path, ancestor_tokens=640, ancestor_flops=77))
    first, last = points(tmp_path)[0], points(tmp_path)[-1]
    per_token = ModelConfig.model_validate(DENSE).flops_per_token(LENGTH)
    assert metrics["steps"] == STEPS and metrics["tokens"] == STEPS * BATCH
    assert metrics["flops"] == STEPS * BATCH * per_token
    assert metrics["lineage_tokens"] == last["lineage_tokens"] == 640 + STEPS * BATCH
    assert metrics["lineage_flops"] == last["lineage_flops"] == 77 + STEPS * BATCH * per_token
    assert metrics["loss_start"] == first["val/loss"] and metrics["loss_end"] == last["val/loss"]
    assert metrics["loss_end/zh"] == last["val/loss/zh"]
    assert metrics["tokens_per_s"] > 0


def test_a_last_partial_batch_is_not_trained(tokens: Path, tmp_path: Path) -> None:
    metrics = train(make_job(tokens, tmp_path, total_tokens=STEPS * BATCH + BATCH - 1))
    assert metrics["steps"] == STEPS and points(tmp_path)[-1]["step"] == STEPS


def test_micro_batches_change_the_losses_by_rounding_alone(tokens: Path, tmp_path: Path) -> None:
    train(make_job(tokens, tmp_path / "whole"))
    train(make_job(tokens, tmp_path / "parts", micro_batch_tokens=1))
    for one, other in zip(points(tmp_path / "whole"), points(tmp_path / "parts"), strict=True):
        assert all(abs(one[key] - other[key]) < 1e-5 for key in one if key.endswith(("loss", "/en", "/zh")))


def test_gradients_are_clipped_to_max_grad_norm_and_reported_unclipped(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    optimizer = ADAMW | {"max_grad_norm": 0.01}
    job = make_job(tokens, out, optimizer=optimizer, total_tokens=BATCH, schedule=CONSTANT)
    train(job)
    assert points(out)[-1]["train/grad_norm"] > 0.1
    model = load_model(out / "model")
    adam = optimizers.build(model, job.stage.optimizer, 0.01)
    assert isinstance(adam, torch.optim.Optimizer)
    checkpointing.load_moments(out, model, adam)
    first_moments = [adam.state[parameter]["exp_avg"] for parameter in model.parameters()]
    assert math.isclose(torch.nn.utils.get_total_norm(first_moments).item(), 0.1 * 0.01, rel_tol=1e-4)


# What is measured, and when


def test_there_is_one_line_a_step_and_the_first_is_a_validation_before_any_training(
    tokens: Path, tmp_path: Path
) -> None:
    train(make_job(tokens, tmp_path))
    found = points(tmp_path)
    assert [point["step"] for point in found] == list(range(STEPS + 1))
    assert [point["tokens"] for point in found] == [step * BATCH for step in range(STEPS + 1)]
    assert "val/loss" in found[0] and not any(key.startswith("train/") for key in found[0])
    measured = {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_s"}
    assert all(measured <= point.keys() for point in found[1:])


def test_experts_report_their_balance_and_their_load(tokens: Path, tmp_path: Path) -> None:
    train(make_job(tokens, tmp_path, MOE))
    tables = points(tmp_path, "router.jsonl")
    for point, table in zip(points(tmp_path)[1:], tables, strict=True):
        assert 0.9 < point["train/balance_loss"] < 2.0 and point["train/z_loss"] > 0
        assert 1.0 <= point["router/load_max_over_mean"] <= 2.0  # experts / k at most
        assert 0.0 <= point["router/load_min_over_mean"] <= 1.0 and point["router/dropped_tokens"] == 0
        assert math.log(2) < point["router/entropy"] <= math.log(4)
        assert (table["step"], table["tokens"]) == (point["step"], point["tokens"])
        assert math.isclose(sum(table["load"][0]), 1, abs_tol=1e-5) and len(table["load"][0]) == 4
        assert math.isclose(4 * max(table["load"][0]), point["router/load_max_over_mean"], abs_tol=1e-5)
        assert table["entropy"] == [round(point["router/entropy"], 6)] and table["dropped"] == [0]


def test_a_selection_bias_evens_the_load_without_any_balance_loss(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training: what is validated, and published, is the model without the bias."""
    monkeypatch.setattr(loop, "LOG_POINTS", 2)
    uneven: dict[float, float] = {}
    for rate in (0.0, 0.03):
        router = {"balance_loss_coeff": 0.0, "balance_scope": "global_batch", "z_loss_coeff": 0.0}
        job = make_job(
            tokens,
            tmp_path / str(rate),
            MOE,
            total_tokens=60 * BATCH,
            schedule=CONSTANT,
            validate_every_tokens=30 * BATCH,
            router=router | {"bias_update_rate": rate},
        )
        metrics = train(job)
        uneven[rate] = points(job.out)[-1]["router/load_max_over_mean"] - 1  # over the last 30 steps
        published = load_model(job.out / "model")
        assert (
            validation.validate(job, published, TrainProgress(60), ParallelContext(job.cluster))["val/loss"]
            == metrics["loss_end"]
        )
    assert uneven[0.03] < uneven[0.0] / 2


def test_the_kernels_that_the_cluster_names_compute_and_are_logged(
    tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str] = set()
    for module in (Attention, Experts):
        original = module.forward

        def forward(self: Any, *arguments: Any, original: Callable[..., Any] = original) -> Any:
            used.add(f"{self.kernels.attention} {self.kernels.experts}")
            return original(self, *arguments)

        monkeypatch.setattr(module, "forward", forward)
    with caplog.at_level("INFO", logger=loop.__name__):
        train(make_job(tokens, tmp_path, MOE, total_tokens=BATCH, schedule=CONSTANT, attention="sdpa", experts="loop"))
    assert used == {"sdpa loop"}
    assert "attention sdpa (configured for cpu, 8 tokens), experts loop (configured for cpu)" in caplog.text


def test_seconds_of_validating_and_saving_are_reported_and_no_part_of_the_speed(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = 0.05
    calls: dict[str, Callable[..., Any]] = {"validate": loop.validate}
    calls |= {"save_checkpoint": checkpointing.save_checkpoint}
    for place, name in ((loop, "validate"), (checkpointing, "save_checkpoint")):

        def call(*arguments: Any, function: Callable[..., Any] = calls[name], **named: Any) -> Any:
            time.sleep(slow)
            return function(*arguments, **named)

        monkeypatch.setattr(place, name, call)
    train(make_job(tokens, tmp_path))
    for point in points(tmp_path):
        assert ("val/seconds" in point) == ("val/loss" in point) and point.get("val/seconds", slow) >= slow
        # A checkpoint is written after the point of its step.
        assert ("checkpoint/seconds" in point) == (point["step"] in (3, 5, 7))
        assert point.get("checkpoint/seconds", slow) >= slow
        assert 0 <= point.get("train/data_wait_share", 0) < 1
    first, *later = points(tmp_path)
    assert [point["step"] for point in later] == list(range(1, len(later) + 1))  # each speed is of one step
    steps_s = sum(BATCH / point["train/tokens_per_s"] for point in later)
    others_s = sum(point.get("val/seconds", 0) + point.get("checkpoint/seconds", 0) for point in later)
    assert steps_s + others_s <= later[-1]["time"] - first["time"]


def test_a_long_stage_logs_some_of_its_steps_and_always_the_last(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_POINTS", 5)
    train(make_job(tokens, tmp_path, total_tokens=21 * BATCH, validate_every_tokens=10**9))
    assert [point["step"] for point in points(tmp_path)] == [0, 4, 8, 12, 16, 20, 21]


@pytest.mark.parametrize("every", [1, BATCH, BATCH + 1, 2 * BATCH, 2 * BATCH + BATCH // 2, 5 * BATCH, 10**9])
def test_validations_and_checkpoints_come_once_in_so_many_tokens(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    saved: list[int] = []
    monkeypatch.setattr(checkpointing, "save_checkpoint", lambda *arguments, **_: saved.append(arguments[3]))
    train(make_job(tokens, tmp_path, validate_every_tokens=every, checkpoint_every_tokens=every))
    due = {math.ceil(multiple / BATCH) for multiple in range(every, STEPS * BATCH + 1, every)}
    assert [point["step"] for point in points(tmp_path) if "val/loss" in point] == sorted(due | {0, STEPS})
    assert saved == sorted(due - {STEPS})  # the end is saved as the result


def test_the_validation_loss_is_the_mean_over_languages_weighted_as_the_mixture(tokens: Path, tmp_path: Path) -> None:
    train(make_job(tokens, tmp_path))
    for point in points(tmp_path):
        if "val/loss" in point:
            assert math.isclose(point["val/loss"], (3 * point["val/loss/en"] + point["val/loss/zh"]) / 4)
            assert point["val/loss/en"] != point["val/loss/zh"]


def test_validation_reads_the_same_held_out_tokens_in_passes_of_a_micro_batch(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []

    def spy(model: Decoder, batches: Iterator[np.ndarray], precision: str, group: ParallelContext) -> float:
        seen.extend(batches)
        return 1.0

    monkeypatch.setattr(validation, "evaluate", spy)
    job = make_job(tokens, tmp_path, micro_batch_tokens=2 * LENGTH, validation_tokens=5 * LENGTH)
    validation.validate(job, Decoder(job.model), TrainProgress(), ParallelContext(job.cluster))
    assert [len(rows) for rows in seen] == [2, 2, 1] * 2
    written = [np.fromfile(tokens / f"validation-{name}.bin", "<u2")[: 5 * LENGTH] for name in ("en", "zh")]
    assert np.array_equal(np.concatenate([rows[:, :-1] for rows in seen]).flatten(), np.concatenate(written))


def test_evaluation_is_the_mean_over_tokens_and_leaves_no_gradients() -> None:
    model = Decoder(ModelConfig.model_validate(DENSE))
    model.initialize(1)
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (7, LENGTH + 1))
    whole, parts = evaluate(model, [rows], "fp32"), evaluate(model, [rows[:5], rows[5:]], "fp32")
    assert math.isclose(whole, parts, rel_tol=1e-6)
    with torch.no_grad():
        logits_btv, _ = model(torch.from_numpy(rows[:, :-1]))
    expected = F.cross_entropy(logits_btv.flatten(0, 1), torch.from_numpy(rows[:, 1:]).flatten()).item()
    assert math.isclose(whole, expected, rel_tol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_at_most_three_frames_of_the_platform_are_between_the_loop_and_the_forward_pass(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop's own counted: `fit`, the step, its micro-batches. Who reads the loop finds the network at once."""
    original, stacks = Decoder.forward, []

    def forward(self: Decoder, *arguments: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            frames = [frame for frame in inspect.stack() if frame.frame.f_globals["__name__"].startswith("aquilamoe.")]
            names = [frame.function for frame in frames]
            stacks.append(names[: names.index("fit") + 1])
        return original(self, *arguments)

    monkeypatch.setattr(Decoder, "forward", forward)
    train(make_job(tokens, tmp_path, MOE, total_tokens=BATCH, schedule=CONSTANT, micro_batch_tokens=BATCH // 2))
    assert stacks == [["accumulate", "step", "fit"]] * 2


def test_no_thread_is_left_after_training(tokens: Path, tmp_path: Path) -> None:
    before = set(threading.enumerate())  # of which one or the other may end meanwhile
    train(make_job(tokens, tmp_path))
    until(lambda: set(threading.enumerate()) <= before)


# Resuming


class Killed(BaseException):
    """Not an Exception, so that nothing on the way catches it."""


def run_until(job: Job, event: int) -> bool:
    """Train, and be killed at the given event; return whether training came that far.

    Events are the borders of all that leaves a trace: a step, a point of metrics, each file of a checkpoint, its new
    name, the removal of an older one.
    """
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
        patch.setattr(SafetensorsWriter, "write_data", watched(SafetensorsWriter.write_data))
        patch.setattr(checkpointing, "_write_rest", watched(checkpointing._write_rest))
        patch.setattr(checkpointing, "_write_hashes", watched(checkpointing._write_hashes))
        patch.setattr(checkpointing, "save_checkpoint", at_once(checkpointing.save_checkpoint))
        patch.setattr(Path, "rename", watched(Path.rename))
        patch.setattr(shutil, "rmtree", watched(shutil.rmtree))
        try:
            train(job)
        except Killed:
            return False
    return True


def at_once(save_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Let training wait for its checkpoints, so that events come in one order."""

    def call(*arguments: Any, **named: Any) -> Path:
        made = save_checkpoint(*arguments, **named)
        checkpointing.wait()
        return made

    return call


@pytest.mark.parametrize(("model", "precision"), [(DENSE, "fp32"), (MOE, "bf16")], ids=["dense fp32", "moe bf16"])
def test_a_run_that_is_killed_at_every_place_in_turn_ends_with_the_same_bytes(
    tokens: Path, tmp_path: Path, model: dict[str, Any], precision: str
) -> None:
    train(make_job(tokens, tmp_path / "whole", model, precision=precision))
    broken = make_job(tokens, tmp_path / "broken", model, precision=precision)
    # Each run is killed one event later than the one before, counted from where that one's checkpoint stands.
    event, runs = 1, 0
    while not run_until(broken, event):
        event, runs = event + 1, runs + 1
    assert runs > STEPS
    assert_same_result(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    ("name", "precision", "log_points"), [("adamw", "bf16", loop.LOG_POINTS), ("muon", "bf16_master", 2)]
)
def test_a_run_that_is_killed_once_anywhere_ends_with_the_same_bytes(
    name: str, precision: str, log_points: int, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a selection bias; also where checkpoints come between two points, so that loads are half counted."""
    monkeypatch.setattr(loop, "LOG_POINTS", log_points)
    router = {
        "balance_loss_coeff": 0.01,
        "balance_scope": "global_batch",
        "z_loss_coeff": 0.001,
        "bias_update_rate": 0.01,
    }
    changes = {"precision": precision, "optimizer": ADAMW | {"name": name}, "router": router}
    train(make_job(tokens, tmp_path / "whole", MOE, **changes))
    event = 1
    while not run_until(broken := make_job(tokens, tmp_path / f"broken-{event}", MOE, **changes), event):
        train(broken)
        assert_same_result(tmp_path / "whole", broken.out)
        event += 5  # not a multiple of what a step leaves
    assert event > 3 * STEPS


def test_a_resumed_run_computes_no_step_before_its_checkpoint_again(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(tokens, tmp_path, checkpoint_every_tokens=3 * BATCH)
    assert not run_until(job, 12)  # a validation, 5 steps with a point each, and the files of a checkpoint
    resumed_from = checkpointing.step_of(checkpointing.checkpoints(tmp_path)[0])
    steps: list[int] = []
    original = TrainStep.step

    def spy(self: TrainStep, step: int, rows: np.ndarray) -> dict[str, float]:
        steps.append(step)
        return original(self, step, rows)

    monkeypatch.setattr(TrainStep, "step", spy)
    train(job)
    assert resumed_from == 3 and steps == list(range(4, STEPS + 1))


def test_a_checkpoint_cadence_that_changes_between_interruptions_changes_no_byte(tokens: Path, tmp_path: Path) -> None:
    train(make_job(tokens, tmp_path / "whole"))
    for every, event in ((BATCH, 9), (3 * BATCH, 5), (2 * BATCH, 7)):
        assert not run_until(make_job(tokens, tmp_path / "broken", checkpoint_every_tokens=every), event)
    train(make_job(tokens, tmp_path / "broken"))
    assert_same_result(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.process
def test_a_process_that_is_killed_while_it_writes_a_checkpoint_ends_with_the_same_bytes_when_started_again(
    tokens: Path, tmp_path: Path
) -> None:
    """On two threads, and every run in a process of its own; the sizes give both threads work."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    long = {"batch_tokens": 1024, "sequence_length": 32, "total_tokens": 10 * 1024, "micro_batch_tokens": 1024}
    often = {"checkpoint_every_tokens": 1024, "validate_every_tokens": 4096}
    whole, broken = (
        make_job(tokens, tmp_path / name, MOE | sizes, cpus_per_worker=2, precision="bf16", **long, **often)
        for name in ("whole", "broken")
    )
    held = tmp_path / "held"
    undisturbed, killed = start(whole, tmp_path), start(broken, tmp_path, str(held))
    folder = broken.out / "checkpoints"
    until(held.exists, killed)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert len(list(folder.glob(".step-*"))) == 1  # it was being written
    assert checkpointing.checkpoints(broken.out) and not (broken.out / "model").exists()
    assert start(broken, tmp_path).wait(PATIENCE_S) == 0
    assert undisturbed.wait(PATIENCE_S) == 0
    assert_same_result(whole.out, broken.out)


def start(job: Job, folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """Train the job in another process, which runs this very file as a script."""
    pickled = folder / f"{job.out.name}.pickle"
    pickled.write_bytes(pickle.dumps(job))
    command = [sys.executable, __file__, str(pickled), *words]
    support = str(Path(__file__).parents[1] / "support")
    return subprocess.Popen(command, env={**os.environ, "GOMP_SPINCOUNT": "0", "PYTHONPATH": support})


def held_pwrite(held: Path, descriptor: int, data: Any, offset: int) -> int:
    """Write, but for the third checkpoint: make a file, and wait to be killed."""
    if ".step-000000003/" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
        held.touch()
        threading.Event().wait()
    return pwrite(descriptor, data, offset)


pwrite = os.pwrite


# Continuing a source


def test_two_stages_that_keep_the_optimizer_state_are_one_long_stage(tokens: Path, tmp_path: Path) -> None:
    """Weights, moments, biases and the position in the data go on where the first stage stopped, to the last bit."""
    router = {"balance_loss_coeff": 0.0, "balance_scope": "running", "z_loss_coeff": 0.0, "bias_update_rate": 0.1}
    settings: dict[str, Any] = {"model": MOE, "schedule": CONSTANT, "router": router}
    train(make_job(tokens, tmp_path / "long", total_tokens=8 * BATCH, **settings))
    train(make_job(tokens, tmp_path / "first", total_tokens=5 * BATCH, **settings))
    train(
        make_job(
            tokens,
            tmp_path / "second",
            source=tmp_path / "first",
            optimizer_state="keep",
            ancestor_tokens=5 * BATCH,
            total_tokens=3 * BATCH,
            **settings,
        )
    )
    for file in ("model/model.safetensors", "training/optimizer.safetensors", "training/extra.safetensors"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "long" / file).read_bytes()
    losses = [point["train/loss"] for point in points(tmp_path / "long")[6:]]
    assert [point["train/loss"] for point in points(tmp_path / "second")[1:]] == losses


@pytest.mark.parametrize("kept", ["keep", "reset"])
def test_a_stage_begins_with_the_loss_of_its_source_and_with_or_without_its_moments(
    tokens: Path, tmp_path: Path, kept: str
) -> None:
    first = train(make_job(tokens, tmp_path / "first"))
    metrics = train(
        make_job(
            tokens,
            tmp_path / "second",
            source=tmp_path / "first",
            optimizer_state=kept,
            total_tokens=BATCH,
            schedule=CONSTANT,
        )
    )
    assert metrics["loss_start"] == first["loss_end"]
    moments = checkpointing.load_file(tmp_path / "second" / "training" / "optimizer.safetensors")
    assert moments["lm_head.weight/step"].item() == (STEPS + 1 if kept == "keep" else 1)


def test_a_stage_that_continues_a_source_also_resumes_bit_for_bit(tokens: Path, tmp_path: Path) -> None:
    train(make_job(tokens, tmp_path / "source"))
    jobs = [
        make_job(
            tokens, tmp_path / name, source=tmp_path / "source", optimizer_state="keep", ancestor_tokens=STEPS * BATCH
        )
        for name in ("whole", "broken")
    ]
    train(jobs[0])
    assert not run_until(jobs[1], 15)
    shutil.rmtree(tmp_path / "source")  # a checkpoint of its own is all that a resume reads
    train(jobs[1])
    assert_same_result(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(("ancestors", "length"), [(0, 8), (160, 8), (163, 8), (160, 16)])
def test_the_data_go_on_after_the_tokens_of_all_ancestors(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ancestors: int, length: int
) -> None:
    seen: list[np.ndarray] = []

    def spy(self: TrainStep, step: int, rows: np.ndarray) -> dict[str, float]:
        seen.append(rows)
        return {"train/loss": 1.0}

    monkeypatch.setattr(TrainStep, "step", spy)
    monkeypatch.setattr(checkpointing, "save_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(checkpointing, "save", lambda *_, **__: None)
    train(make_job(tokens, tmp_path, ancestor_tokens=ancestors, sequence_length=length))
    stream = Batches(tokens, {"en": 3.0, "zh": 1.0}, length, STEPS * BATCH // length, seed=1)
    assert np.array_equal(np.concatenate(seen), stream.read(ancestors // length))


def test_a_source_without_optimizer_state_is_refused_with_the_setting_to_change(tokens: Path, tmp_path: Path) -> None:
    model = Decoder(ModelConfig.model_validate(DENSE))
    model.initialize(1)
    save_model(model, tmp_path / "source" / "model")
    with pytest.raises(UserError, match="optimizer_state=reset"):
        train(make_job(tokens, tmp_path / "out", source=tmp_path / "source", optimizer_state="keep"))


# Values that are not finite


def poison_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the weights be spoiled by the update of one step."""
    original = TrainStep.step

    def spoil(self: TrainStep, at: int, rows: np.ndarray) -> dict[str, float]:
        values = original(self, at, rows)
        if at == step:
            with torch.no_grad():
                self.model.lm_head.weight.fill_(math.inf)
        return values

    monkeypatch.setattr(TrainStep, "step", spoil)


def assert_nothing_half_written(out: Path, last_point: int) -> None:
    assert [point["step"] for point in points(out)] == list(range(last_point + 1))
    assert all(math.isfinite(value) for point in points(out) for value in point.values())
    assert {path.name for path in out.iterdir()} <= {"metrics.jsonl", "checkpoints"}
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("poisoned", "cadence", "found_at", "good"),
    [
        (5, 2, 6, 4),  # checkpoints of 2 and 4, spoiled after
        (4, 2, 5, 2),  # the checkpoint of 4 is spoiled: the one before it is the last good one
        (1, 2, 2, None),
        (6, 2, 6, 4),  # a validation finds it before the checkpoint of 6 is written
        (8, 2, 8, 6),  # in the very last step
    ],
)
def test_a_loss_that_is_not_finite_stops_the_stage_and_names_step_and_last_good_checkpoint(
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    poisoned: int,
    cadence: int,
    found_at: int,
    good: int | None,
) -> None:
    poison_after(poisoned, monkeypatch)
    with pytest.raises(UserError) as raised:
        train(make_job(tokens, tmp_path, checkpoint_every_tokens=cadence * BATCH))
    message = str(raised.value)
    assert message.startswith("stage small: ") and "\n" not in message
    assert f" is nan at step {found_at} of 8 ({found_at * BATCH} tokens)" in message
    checkpoint = tmp_path / "checkpoints" / f"step-{good or 0:09d}"
    assert (f"last good checkpoint: {checkpoint};" in message) == (good is not None)
    assert good is None or checkpointing.load(checkpoint, *fresh()) == good
    assert "lower its learning_rate (0.01)" in message
    assert_nothing_half_written(tmp_path, found_at - 1)


def fresh() -> tuple[Decoder, torch.optim.Optimizer]:
    model = Decoder(ModelConfig.model_validate(DENSE))
    optimizer = optimizers.build(model, make_job(Path(), Path()).stage.optimizer, 0.01)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return model, optimizer


def test_a_gradient_that_is_not_finite_stops_the_stage_before_it_spoils_the_weights(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = TrainStep.accumulate, 0

    def overflow(self: TrainStep, rows: np.ndarray, router: RouterObjective) -> dict[str, torch.Tensor]:
        nonlocal seen
        values, seen = original(self, rows, router), seen + 1
        if seen == 4:
            gradient = self.model.lm_head.weight.grad
            assert gradient is not None
            gradient[0, 0] = math.inf
        return values

    monkeypatch.setattr(TrainStep, "accumulate", overflow)
    with pytest.raises(UserError, match=r"train/grad_norm is inf at step 4 of 8 .*step-000000002;"):
        train(make_job(tokens, tmp_path))
    assert_nothing_half_written(tmp_path, 3)


def test_an_absurd_learning_rate_is_stopped_and_running_again_prints_the_same(tokens: Path, tmp_path: Path) -> None:
    job = make_job(tokens, tmp_path, learning_rate=1e30, precision="bf16", checkpoint_every_tokens=BATCH)
    messages = []
    for _ in range(2):
        with pytest.raises(UserError, match=r"is (nan|inf) at step \d of 8") as raised:
            train(job)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_a_source_with_a_spoiled_weight_is_refused_before_any_training(tokens: Path, tmp_path: Path) -> None:
    model = Decoder(ModelConfig.model_validate(DENSE))
    model.initialize(1)
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    save_model(model, tmp_path / "source" / "model")
    with pytest.raises(UserError, match=r"val/loss is nan at step 0 of 8 .*no good checkpoint before it"):
        train(make_job(tokens, tmp_path / "out", source=tmp_path / "source"))
    assert points(tmp_path / "out") == []


# The stages around the loop


def stage_context(tokens: Path, out: Path, job: Job, **inputs: Input) -> Context:
    model = job.model
    node = Node(
        name="small",
        stage=job.stage,
        model=model,
        ancestor_tokens=job.ancestor_tokens,
        ancestor_flops=job.ancestor_flops,
    )
    return Context(node, {"tokens": Input("tokens", tokens, {"metrics": {}}), **inputs}, out, job.cluster, out.parent)


def test_the_pretrain_stage_leaves_a_complete_checkpoint(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    metrics = pretrain_stage.run(stage_context(tokens, out, make_job(tokens, out, MOE)))
    model = ModelConfig.model_validate(MOE)
    assert metrics["params_total"] == model.num_params and metrics["params_active"] == model.num_active_params
    assert "recovery_tokens" not in metrics
    # The store takes `checkpoints` away when it publishes: until then a killed run resumes from them.
    assert {path.name for path in out.iterdir()} == {
        "model",
        "training",
        "metrics.jsonl",
        "router.jsonl",
        "checkpoints",
    }
    assert read_config(out / "model") == model
    for file in ("config.json", "generation_config.json"):
        assert json.loads((out / "model" / file).read_text())["eos_token_id"] == END
    assert (out / "model" / "tokenizer.json").read_text() == "{}"


def test_the_disk_that_a_stage_estimates_is_what_it_takes(tokens: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    wide = DENSE | {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256}
    context = stage_context(tokens, out, make_job(tokens, out, wide, total_tokens=BATCH, schedule=CONSTANT))
    pretrain_stage.run(context)
    taken = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert 0.95 < pretrain_stage.estimate(context.node).disk_bytes / taken < 1.0


def test_recovery_is_counted_to_the_loss_that_the_source_had_before_it_grew(tokens: Path, tmp_path: Path) -> None:
    train(make_job(tokens, tmp_path / "source", total_tokens=BATCH, schedule=CONSTANT))
    for goal in (3.9, 0.0):
        out = tmp_path / f"out-{goal}"
        job = make_job(tokens, out, source=tmp_path / "source", total_tokens=30 * BATCH)
        source = Input("grown", tmp_path / "source", {"metrics": {"source_final_loss": goal}})
        metrics = pretrain_stage.run(stage_context(tokens, out, job, source=source))
        if not goal:
            assert metrics["recovery_tokens"] is metrics["recovery_flops"] is None
            continue
        recovery = metrics["recovery_tokens"]
        assert isinstance(recovery, int) and 0 < recovery < 30 * BATCH
        assert metrics["recovery_flops"] == recovery * job.model.flops_per_token(LENGTH)
        before = [point for point in points(out) if "val/loss" in point and point["tokens"] < recovery]
        assert before and all(point["val/loss"] > goal for point in before)


def test_the_evaluate_stage_gives_nats_per_token_and_bits_per_byte_of_every_checkpoint(
    tokens: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        train(
            make_job(
                tokens, tmp_path / name, MOE if name == "two" else DENSE, total_tokens=2 * BATCH, schedule=CONSTANT
            )
        )
    fields = {
        "kind": "evaluate",
        "inputs": {"tokens": "t", "a": "x", "b": "y"},
        "sequence_length": 8,
        "precision": "fp32",
    }
    checkpoints = {"a": Input("x", tmp_path / "one", {}), "b": Input("y", tmp_path / "two", {})}
    cluster = make_job(tokens, tmp_path).cluster
    node = Node(name="evaluate", stage=EvaluateStage.model_validate(fields))
    inputs = {"tokens": Input("tokens", tokens, {}), **checkpoints}
    metrics = evaluate_stage.run(Context(node, inputs, tmp_path, cluster, tmp_path))
    for role, name in (("a", "one"), ("b", "two")):
        network = load_model(tmp_path / name / "model")
        for source in ("en", "zh"):
            stream = np.fromfile(tokens / f"validation-{source}.bin", "<u2").astype(np.int64)
            windows = np.stack([stream[start : start + 9] for start in range(0, len(stream) - 8, 8)])
            nats = evaluate(network, [windows], "fp32")
            assert metrics[f"{role}/{source}/nats_per_token"] == pytest.approx(nats, rel=1e-6)
            # 500 tokens are 1500 bytes
            assert metrics[f"{role}/{source}/bits_per_byte"] == pytest.approx(nats / math.log(2) / 3, rel=1e-6)
        for unit in ("nats_per_token", "bits_per_byte"):
            languages = [float(str(metrics[f"{role}/{source}/{unit}"])) for source in ("en", "zh")]
            assert metrics[f"{role}/{unit}"] == pytest.approx(sum(languages) / 2)
    done = [json.loads(line)["done"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert done == [0, 1, 2]


if __name__ == "__main__":
    if sys.argv[2:]:
        os.pwrite = partial(held_pwrite, Path(sys.argv[2]))
    train(pickle.loads(Path(sys.argv[1]).read_bytes()))
