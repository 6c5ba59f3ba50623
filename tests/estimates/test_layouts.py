"""Layouts of a stage are ranked by whether they fit and by the predicted time of a step."""

from collections.abc import Callable
from typing import Any

from aquilamoe.cli import capacity
from aquilamoe.config import graph
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.estimates import layouts, memory
from aquilamoe.estimates.layouts import Choice, Training
from aquilamoe.training import example

SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "total_tokens": 10**6,
    "batch_tokens": 2**16,
    "sequence_length": 128,
    "validate_every_tokens": 10**6,
    "validation_tokens": 1024,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
SPEEDS = {
    "device_flops_per_s": 1e15,
    "kernel_efficiency": 0.5,
    "workers_per_node": 8,
    "intra_node_bandwidth": 4e11,
    "inter_node_bandwidth": 5e10,
}


def cluster(**changes: Any) -> ClusterConfig:
    gpus = {"workers": 16, "executor": "ray", "gpus_per_worker": 1, "gpu_memory_bytes": 10**9, "parallel": "fsdp"}
    return example.cluster(**{"micro_batch_tokens": 512, **gpus, **changes})


def stage(where: ClusterConfig, **sizes: Any) -> Training:
    """A stage of a model of 0.1 billion parameters."""
    job = example.job(**{**SIZES, **sizes})
    return Training("big", job.model, job.stage, where)


def best(training: Training) -> Choice:
    found = layouts.rank(training).best
    assert found is not None
    return found


def test_without_speeds_the_nearest_layout_that_fits_changes_one_key_where_one_is_enough() -> None:
    training = stage(cluster(parallel="ddp", gpu_memory_bytes=1_500_000_000))
    ranking = layouts.rank(training)
    assert not ranking.now.fits
    found = best(training)
    assert (found.fits, found.time) == (True, None)
    assert found.overrides("big") == "stages.big.cluster.parallel=fsdp"
    again = layouts.choice(training, found.changes)
    assert again is not None and again.peak == found.peak
    assert capacity.verdict(ranking).endswith("The nearest that does:\nstages.big.cluster.parallel=fsdp")


def test_a_layout_that_fits_is_its_own_nearest_and_nothing_fits_into_nothing() -> None:
    assert best(stage(cluster(gpu_memory_bytes=10**12))).changes == {}
    none = layouts.rank(stage(cluster(gpu_memory_bytes=10**6)))
    assert none.best is None
    assert capacity.verdict(none).endswith("no other layout on 16 workers does; use more of them.")


def test_the_fastest_layout_that_fits_comes_first_and_all_that_do_not_fit_come_last() -> None:
    ranked = layouts.ranked(stage(cluster(gpu_memory_bytes=1_500_000_000, **SPEEDS), **EXPERTS))
    fits = [each.fits for each in ranked]
    assert True in fits and False in fits
    assert fits == sorted(fits, reverse=True)
    seconds = [each.time.seconds for each in ranked if each.fits and each.time]
    assert len(seconds) == fits.count(True) and seconds == sorted(seconds)


def test_what_is_as_fast_as_the_fastest_and_nearer_is_taken_instead() -> None:
    training = stage(cluster(gpu_memory_bytes=10**11, **SPEEDS))
    fastest = layouts.ranked(training)[0]
    found = best(training)
    assert found.time and fastest.time
    assert found.time.seconds <= (1 + layouts.ALIKE) * fastest.time.seconds
    assert len(found.changes) <= len(fastest.changes)


def test_recomputation_is_dropped_where_there_is_room_and_the_gain_is_stated() -> None:
    roomy = cluster(gpu_memory_bytes=10**11, activation_checkpointing=True, **SPEEDS)
    ranking = layouts.rank(stage(roomy))
    assert ranking.best is not None
    assert ranking.best.changes["activation_checkpointing"] is False
    assert "computing" in capacity.verdict(ranking)
    assert "stages.big.cluster.activation_checkpointing=false" in capacity.verdict(ranking)


def test_experts_are_divided_among_workers_only_where_there_are_some_and_take_less_of_a_device() -> None:
    split = {"expert_parallel": 8}
    assert layouts.choice(stage(cluster()), split) is None
    assert layouts.choice(stage(cluster(), num_experts=4, num_experts_per_tok=2), split) is None
    parts, whole = (layouts.choice(stage(cluster(), **EXPERTS), changes) for changes in (split, {}))
    assert parts is not None and whole is not None
    assert parts.peak < whole.peak


def test_a_finer_division_of_the_model_never_takes_more_of_a_device() -> None:
    divisions: list[dict[str, Any]] = [
        {"parallel": "ddp"},
        {"parallel": "hsdp", "shard_size": 8},
        {"parallel": "fsdp"},
    ]
    found = [layouts.choice(stage(cluster()), changes) for changes in divisions]
    peaks = [each.peak for each in found if each is not None]
    assert len(peaks) == 3 and peaks == sorted(peaks, reverse=True)


def test_a_device_has_room_for_rows_of_a_popular_expert() -> None:
    training = stage(cluster(), **EXPERTS)
    where = training.cluster.model_copy(update={"expert_parallel": 8})
    device = memory._Device(training.model, training.stage, where)
    assert device.memory().peak - device._uneven() < device.memory().peak


def test_the_papers_line_ships_with_the_layouts_that_its_plan_ranks_first(compose: Callable[..., Any]) -> None:
    experiment = graph.parse(compose("+experiment=7b"))
    stages = layouts.training(graph.build(experiment).values(), experiment.cluster)
    assert [each.name for each in stages] == ["prepare", "dense", "moe"]
    for each in stages:
        assert best(each).changes == {}, best(each).overrides(each.name)
