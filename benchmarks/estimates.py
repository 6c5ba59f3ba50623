"""How far a plan's estimates are from what is measured: time and memory of training, as ratios, estimate to measured.

python benchmarks/estimates.py                   about a minute on one core

Time: one training calibrates the speed, as the first record of a store does (`pipeline.plan`), and estimates the
others, which have other shapes. Seconds are those of this process on one thread, which other processes hardly change.
Memory: what torch's allocator counts in a step against `estimates.memory`.
"""

import gc
import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from aquilamoe.checkpoint.allocator import keep_large_buffers
from aquilamoe.estimates import memory
from aquilamoe.estimates.work import per_token
from aquilamoe.training import example
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.job import Job
from aquilamoe.training.parallel import ParallelContext, initialize
from aquilamoe.training.step import TrainStep

STEPS, TOKENS = 3, 512


@dataclass(frozen=True)
class Shape:
    """What is trained."""

    hidden: int
    neurons: int
    layers: int
    length: int = 128
    experts: int = 0
    vocabulary: int = 2048

    def job(self) -> Job:
        return example.job(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=self.hidden // 8,
            max_position_embeddings=1024,
            num_experts=self.experts,
            total_tokens=10**6,
            batch_tokens=TOKENS,
            sequence_length=self.length,
            learning_rate=1e-3,
            router={"balance_loss_coeff": 0.001, "z_loss_coeff": 0.01},
            validate_every_tokens=10**6,
            micro_batch_tokens=TOKENS,
        )


CALIBRATION = Shape(128, 352, 4)
# `FLOPS_A_BYTE` was fitted to the first five; the others it has not seen.
SHAPES = {
    "wider": Shape(256, 704, 4),
    "deeper": Shape(128, 352, 10),
    "longer sequences": Shape(128, 352, 4, length=512),
    "a larger vocabulary": Shape(128, 352, 4, vocabulary=8192),
    "8 experts": Shape(128, 352, 4, experts=8),
    "narrower": Shape(64, 176, 4),
    "narrow and deep": Shape(64, 176, 10, vocabulary=4096),
    "half as wide again": Shape(192, 512, 6, length=256),
    "wide, 4 experts": Shape(256, 704, 3, experts=4, vocabulary=4096),
}


def stepper(job: Job) -> tuple[TrainStep, np.ndarray]:
    """What takes steps, and the tokens of one."""
    group = ParallelContext(job.cluster)
    model = group.build(job.model, job.stage.precision)
    initialize(model, 0)
    rows = job.stage.batch_tokens // job.stage.sequence_length
    tokens = np.random.default_rng(0).integers(0, job.model.vocab_size, (rows, job.stage.sequence_length + 1))
    return TrainStep(job, model, optimizers.build(model, job.stage.optimizer, 1e-3), group), tokens


def seconds(job: Job) -> float:
    """Of a step: the median of STEPS, after one that warms up."""
    steps, tokens = stepper(job)
    times = []
    for step in range(STEPS + 1):
        started = time.process_time()
        steps.step(step + 1, tokens)
        times.append(time.process_time() - started)
    return statistics.median(times[1:])


def peak_bytes(job: Job) -> int:
    """The most that torch's allocator has handed out in two steps, the model among them."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        steps, tokens = stepper(job)
        for step in (1, 2):
            steps.step(step, tokens)
        del steps
    assert profiled.profiler is not None
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return int(np.cumsum([event.nbytes() for event in events]).max())


def main() -> None:
    torch.set_num_threads(1)
    keep_large_buffers()
    calibration = CALIBRATION.job()
    speed = work(calibration) / seconds(calibration)
    print(f"{'':22}{'time':>8}{'memory':>8}   estimate to measured")
    for name, shape in SHAPES.items():
        job = shape.job()
        of_time = work(job) / speed / seconds(job)
        of_memory = memory.estimate(job.model, job.stage, job.cluster).peak / peak_bytes(job)
        print(f"{name:22}{of_time:8.2f}{of_memory:8.2f}", flush=True)


def work(job: Job) -> float:
    """Of a step."""
    return per_token(job.model, job.stage) * job.stage.batch_tokens


if __name__ == "__main__":
    main()
