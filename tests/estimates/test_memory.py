"""The memory that a plan estimates is what torch's allocator counts in a step of training."""

import gc
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from aquilamoe.config.schema import ClusterConfig
from aquilamoe.config.steps import OptimizerConfig
from aquilamoe.estimates import memory
from aquilamoe.estimates.layouts import Training
from aquilamoe.model.transformer import Decoder
from aquilamoe.training import example
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.job import FIRST, Job, Rank
from aquilamoe.training.parallel import ParallelContext, initialize
from aquilamoe.training.step import TrainStep

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
JOB: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "total_tokens": 10**6,
    "batch_tokens": 512,
    "sequence_length": 128,
    "learning_rate": 1e-3,
    "seed": 0,
    "router": {"balance_loss_coeff": 0.001, "z_loss_coeff": 0.01},
    "validate_every_tokens": 10**6,
    "validation_tokens": 1024,
    "micro_batch_tokens": 512,
}


def make_job(**changes: Any) -> Job:
    """A job of a step; `changes` are fields of the model, the stage, the optimizer or the cluster, by name."""
    optimizer = {key: changes.pop(key) for key in OptimizerConfig.model_fields if key in changes}
    return example.job(**JOB | changes, optimizer=optimizer)


def counted(job: Job, rank: Rank = FIRST) -> int:
    """The most bytes that torch's allocator has handed out in two steps of training, the model among them."""
    gc.collect()  # what is freed meanwhile was not counted when it was taken
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        train(job, rank)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def train(job: Job, rank: Rank) -> None:
    group = ParallelContext(job.cluster, rank)
    model = group.build(job.model, job.stage.precision)
    initialize(model, 0)
    optimizer = optimizers.build(model, job.stage.optimizer, 1e-3)
    stepper = TrainStep(job, model, optimizer, group)
    rows = job.stage.batch_tokens // job.stage.sequence_length // rank.world_size
    tokens = np.random.default_rng(0).integers(0, job.model.vocab_size, (rows, job.stage.sequence_length + 1))
    for step in (1, 2):
        stepper.step(step, tokens)


JOBS: dict[str, dict[str, Any]] = {
    "large vocabulary": {"vocab_size": 4096, "num_hidden_layers": 2},
    "long sequences": {"sequence_length": 512, "num_hidden_layers": 3},
    "micro-batches": {"micro_batch_tokens": 256, "batch_tokens": 1024},
    "checkpointing": {"activation_checkpointing": True, "num_hidden_layers": 8, "batch_tokens": 1024},
    "experts": EXPERTS,
    "bf16": {"precision": "bf16"},
    "bf16 experts": {**EXPERTS, "precision": "bf16", "num_hidden_layers": 3},
    "bf16 over float32": {"precision": "bf16_master", "micro_batch_tokens": 256},
}
MORE_JOBS: dict[str, dict[str, Any]] = {
    "deep": {"num_hidden_layers": 10, "hidden_size": 48, "batch_tokens": 1024, "micro_batch_tokens": 1024},
    "experts, checkpointing": {**EXPERTS, "activation_checkpointing": True, "micro_batch_tokens": 256},
    "tied": {"tie_word_embeddings": True, "vocab_size": 1024},
    "muon": {"name": "muon"},
    "bf16, checkpointing": {"precision": "bf16", "activation_checkpointing": True},
    "a shared expert and norms": {**EXPERTS, "shared_expert_intermediate_size": 96, "mlp_only_layers": (0, 3)},
    "norms of queries and keys": {"qk_norm": "head", "qkv_bias": False},
    "sdpa": {"attention": "sdpa"},
}


@pytest.mark.parametrize("name", [*JOBS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_JOBS)])
def test_the_most_that_a_step_takes_is_estimated_within_a_tenth(name: str) -> None:
    job = make_job(**(JOBS | MORE_JOBS)[name])
    estimated = memory.estimate(job.model, job.stage, job.cluster)
    assert estimated.peak == pytest.approx(counted(job), rel=0.1)


def cluster(**changes: Any) -> ClusterConfig:
    gpus = {"workers": 16, "executor": "ray", "gpus_per_worker": 1, "gpu_memory_bytes": 10**9, "parallel": "fsdp"}
    return example.cluster(micro_batch_tokens=512, **{**gpus, **changes})


def big(**changes: Any) -> Training:
    """A stage of a model of 0.1 billion parameters."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 8, "intermediate_size": 4096, "batch_tokens": 2**16}
    job = make_job(**{**sizes, **changes})
    return Training("big", job.model, job.stage, cluster())


@pytest.mark.parametrize("part", ["weights", "gradients", "optimizer"])
def test_what_is_cut_among_the_devices_is_a_share_of_the_whole(part: str) -> None:
    model, stage = big().model, big().stage
    whole = memory.estimate(model, stage, cluster(parallel="ddp"))
    for size in (2, 8):
        cut = memory.estimate(model, stage, cluster(parallel="hsdp", shard_size=size))
        assert getattr(cut, part) == pytest.approx(getattr(whole, part) / size, rel=0.01)


def test_a_checkpoint_weighs_what_its_files_do() -> None:
    adamw, muon = make_job(), make_job(name="muon")
    assert memory.checkpoint_bytes(adamw.model, adamw.stage) == 12 * adamw.model.num_params
    model = Decoder(muon.model)
    optimizer = optimizers.build(model, muon.stage.optimizer, 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moments = [value for key, value in optimizers.read_state(model, optimizer).items() if not key.endswith("/step")]
    weights = [*model.parameters(), *moments]
    assert memory.checkpoint_bytes(muon.model, muon.stage) == sum(4 * tensor.numel() for tensor in weights)
