"""Connecting to Ray: how long a run waits for workers, and what it prints meanwhile."""

import pytest

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.training.ray import session

NODE = {"Alive": True, "Resources": {"CPU": 4.0, "memory": 8e9}}


def cluster(workers: int, **changes: object) -> ClusterConfig:
    fields = {
        "executor": "ray",
        "address": "auto",
        "workers": workers,
        "cpus_per_worker": 2,
        "gpus_per_worker": 0,
        "gpu_memory_bytes": 0,
        "max_failures": 2,
        "micro_batch_tokens": 1,
        "checkpoint_every_tokens": 1,
        "compile": False,
        "flops_per_s": 1e9,
    }
    return ClusterConfig.model_validate(fields | changes)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is; and a Ray of two nodes with four cores each, all busy."""
    import ray

    now = [0.0]
    monkeypatch.setattr(session.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(ray, "nodes", lambda: [NODE, NODE, {**NODE, "Alive": False}])
    monkeypatch.setattr(ray, "available_resources", dict)
    return now


@pytest.mark.parametrize(
    ("workers", "changes", "lacks"), [(4, {}, False), (5, {}, True), (9, {"min_workers": 3}, False)]
)
def test_a_cluster_lacks_what_all_its_nodes_together_have_no_room_for(
    clock: list[float], workers: int, changes: dict[str, int], lacks: bool
) -> None:
    found = session.shortage(cluster(workers, **changes))
    assert (found is not None) == lacks
    if found:
        assert found == ("5 workers with 2 CPUs each requested, the cluster has room for 4 (2 nodes, together 8 CPUs)")


def test_a_wait_prints_for_what_and_gives_up_after_the_timeout(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    patience = session.Patience(cluster(4, start_timeout_s=100))
    for clock[0] in (1.0, 29.0, 31.0, 60.0, 95.0):
        patience.look(standing=False)
    printed = capsys.readouterr().err.splitlines()
    assert printed == [
        "waiting for workers: 4 workers with 2 CPUs each not started yet, 0 CPUs free; for 69 s yet",
        "waiting for workers: 4 workers with 2 CPUs each not started yet, 0 CPUs free; for 5 s yet",
    ]
    clock[0] = 101.0
    with pytest.raises(UserError) as raised:
        patience.look(standing=False)
    assert str(raised.value) == (
        "cluster.workers: 4 workers with 2 CPUs each not started yet, 0 CPUs free; waited 101 s of "
        "cluster.start_timeout_s (100); make room, or lower cluster.workers or cluster.min_workers"
    )


def test_a_shortage_is_printed_at_once_and_ends_a_run_on_a_machine_that_cannot_grow(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    session.Patience(cluster(5)).look(standing=False)
    assert capsys.readouterr().err.startswith("waiting for workers: 5 workers with 2 CPUs each requested, the cluster")
    with pytest.raises(UserError, match="the cluster has room for 4"):
        session.Patience(cluster(5, address=None)).look(standing=False)


def test_workers_that_stood_are_waited_for_again(clock: list[float]) -> None:
    patience = session.Patience(cluster(4, start_timeout_s=100))
    for clock[0], standing in ((90.0, False), (95.0, True), (190.0, False)):
        patience.look(standing)
    clock[0] = 196.0
    with pytest.raises(UserError, match="waited 101 s"):
        patience.look(standing=False)
