"""A step's predicted bytes are those that torch exchanges; its FLOPs those that it computes."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aquilamoe.config.schema import ClusterConfig
from aquilamoe.estimates import step_time
from aquilamoe.training import example
from aquilamoe.training import optimizer as optimizers
from aquilamoe.training.job import Job, Rank
from aquilamoe.training.parallel import ParallelContext, initialize
from aquilamoe.training.step import TrainStep

WORKERS = 16
KINDS = {"_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter", "allreduce_": "all-reduce"}
SPEEDS = {
    "device_flops_per_s": 1e15,
    "kernel_efficiency": 0.5,
    "workers_per_node": 8,
    "intra_node_bandwidth": 4e11,
    "inter_node_bandwidth": 5e10,
}


class Exchanged(TorchDispatchMode):
    """Counts bytes of the largest operand of every collective, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (kind := KINDS.get(func._schema.name.removeprefix("c10d::"))) is not None:
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.bytes[kind] += max(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


@pytest.fixture
def fake_group() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=WORKERS, store=FakeStore())
    yield
    dist.destroy_process_group()


def job(**changes: Any) -> Job:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "head_dim": 16, "vocab_size": 128}
    steps = {"batch_tokens": 64 * WORKERS, "sequence_length": 16, "micro_batch_tokens": 32, "total_tokens": 10**6}
    where = {"workers": WORKERS, "executor": "ray", "parallel": "fsdp", **SPEEDS}
    return example.job(**{**sizes, **steps, **where, **changes})


def exchanged(training: Job) -> Counter[str]:
    """By rank 0 in one step."""
    group = ParallelContext(training.cluster, Rank(0, WORKERS, 0))
    model = group.build(training.model, training.stage.precision)
    initialize(model, 0)
    step = TrainStep(training, model, optimizers.build(model, training.stage.optimizer, 1e-3), group)
    tokens = np.zeros((4, training.stage.sequence_length + 1), dtype=np.int64)
    with Exchanged() as found:
        step.step(1, tokens)
    return found.bytes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "changes",
    [
        {"num_experts": 0},
        {"num_experts": 0, "precision": "bf16_master"},
        {"num_experts": 0, "parallel": "hsdp", "shard_size": 4},
        {"num_experts": 0, "activation_checkpointing": True, "tie_word_embeddings": True},
        {"num_experts": 16, "num_experts_per_tok": 2, "router": {"balance_loss_coeff": 0.01}},
    ],
)
def test_the_bytes_of_every_collective_are_those_of_a_step_of_the_loop(
    fake_group: None, changes: dict[str, Any]
) -> None:
    training = job(**changes)
    predicted = step_time.predict(training.model, training.stage, training.cluster)
    assert predicted is not None
    shards = training.cluster.shard_size or WORKERS
    copies = WORKERS // shards
    found = exchanged(training)
    for kind, size in (("all-gather", shards), ("reduce-scatter", shards)):
        assert predicted.traffic[kind] == pytest.approx(found[kind] * (size - 1) / size, rel=0.03)
    if copies > 1:
        assert predicted.traffic["all-reduce"] == pytest.approx(
            found["all-reduce"] * 2 * (copies - 1) / copies, rel=0.03
        )


def predicted(**changes: Any) -> step_time.StepTime:
    training = job(**changes)
    found = step_time.predict(training.model, training.stage, training.cluster)
    assert found is not None
    return found


def test_without_anything_computed_twice_the_executed_flops_are_the_models() -> None:
    for experts in ({"num_experts": 0}, {"num_experts": 8, "num_experts_per_tok": 2}):
        found = predicted(micro_batch_tokens=64, **experts)
        assert sum(found.flops.values()) == pytest.approx(found.model_flops)
        again = predicted(micro_batch_tokens=64, activation_checkpointing=True, **experts)
        assert again.model_flops == found.model_flops
        assert 1.2 < sum(again.flops.values()) / found.model_flops < 4 / 3


def test_counting_what_goes_to_which_expert_is_a_forward_pass_only_where_a_step_has_several_micro_batches() -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "router": {"balance_loss_coeff": 0.01}}
    one, several = (predicted(micro_batch_tokens=tokens, **experts) for tokens in (64, 32))
    assert sum(one.flops.values()) == pytest.approx(one.model_flops)
    assert sum(several.flops.values()) > 1.2 * one.model_flops
    running = predicted(micro_batch_tokens=32, **{**experts, "router": {"balance_scope": "running"}})
    assert sum(running.flops.values()) == pytest.approx(running.model_flops)


def test_rows_travel_to_experts_and_back_forward_and_backward() -> None:
    found = predicted(num_experts=8, num_experts_per_tok=2, expert_parallel=8, micro_batch_tokens=64)
    rows_bytes = 64 * 2 * 64 * 4
    assert found.traffic["all-to-all"] == pytest.approx(3 * 4 * rows_bytes * 7 / 8)


def test_exchanges_within_a_node_take_its_bandwidth_and_those_between_nodes_all_links_of_the_group() -> None:
    links = step_time.Links(intra=100.0, inter=10.0, per_node=8)
    assert links.group(8, 1).ring(800.0).seconds == pytest.approx(7.0)
    assert links.group(16, 1).ring(1600.0).seconds == pytest.approx(max(1500 / 100, 800 / 80))
    assert links.group(2, 8).ring(160.0).seconds == pytest.approx(80 / 10)  # one worker of each of two machines
    assert links.group(4, 1).all_to_all(400.0).seconds == pytest.approx(3.0)
    assert links.group(16, 1).all_to_all(160.0).seconds == pytest.approx(80 / 10)


@pytest.mark.parametrize("missing", ["device_flops_per_s", "kernel_efficiency", "intra_node_bandwidth"])
def test_nothing_is_predicted_where_a_speed_is_not_stated(missing: str) -> None:
    training = job(**{missing: None})
    assert step_time.predict(training.model, training.stage, training.cluster) is None


def test_one_worker_needs_no_bandwidth() -> None:
    alone: ClusterConfig = job(workers=1, parallel="ddp", intra_node_bandwidth=None, inter_node_bandwidth=None).cluster
    training = job()
    found = step_time.predict(training.model, training.stage, alone)
    assert found is not None and found.exposed == 0.0
