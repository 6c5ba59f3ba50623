"""A cluster of several machines, for real: raylets on this one that come, are killed, or are taken back with notice.

They take minutes: `make rehearse-cluster`.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ray_workers
from aquilamoe.data.tokens import TokenCounts, TokensRecord, write_record
from aquilamoe.training import checkpoint, example
from aquilamoe.training.loop import train
from aquilamoe.training.ray import session
from aquilamoe.training.ray.environment import WORKER_ENVIRONMENT
from aquilamoe.training.ray.launch import prestart, release, run_on_workers
from held_training import HeldTraining
from ports import free_port
from token_files import write_token_file

pytestmark = [
    pytest.mark.slow,
    # Ray Data, which Ray Train imports, warns of its own options, which are at their defaults.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

LOSSES = ("train/loss", "train/balance_loss", "train/grad_norm", "val/loss")
STEPS, NEVER, PATIENCE_S, SLOWLY_S, NOTICE_S = 300, 10**9, 240.0, 0.6, 40.0
PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
DEAD_AFTER = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def machine() -> dict[str, Any]:
    """Of a raylet. On a busy machine Ray does not wait long enough for the ports that its agents choose."""
    ports = {name: free_port() for name in PORTS}
    return {"num_cpus": 1, "node_ip_address": "127.0.0.1", "include_log_monitor": False, **ports}


class Machines:
    """A Ray cluster on loopback: raylets with a core each. All but the first, where the driver is, can be lost."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        only = {"_system_config": DEAD_AFTER, "no_monitor": True, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=machine() | only)
        self.address: str = self.cluster.address
        head: Any = self.cluster.head_node
        self.first: str = head.node_id

    def add(self) -> str:
        """Another machine; its id."""
        identity: str = self.cluster.add_node(**machine()).node_id
        return identity

    def kill(self, machine: str) -> None:
        """SIGKILL its raylet, and with that what runs under it."""
        (node,) = (node for node in self.cluster.worker_nodes if node.node_id == machine)
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    def take_back(self, machine: str, at: float) -> None:
        """Announce, as clouds do, that the machine will be taken away at a time; it is not."""
        import ray._raylet as raylet  # written in Cython: it has no types
        from ray.core.generated import autoscaler_pb2

        client: Any = vars(raylet)["GcsClient"](address=self.address)
        accepted, why = client.drain_node(
            machine, vars(autoscaler_pb2)["DRAIN_NODE_REASON_PREEMPTION"], "the price has risen", int(at * 1000)
        )
        assert accepted, why

    def at_work(self) -> set[str]:
        """The machines of the training workers that live."""
        return {worker["Address"]["NodeID"] for worker in ray_workers.alive()}

    def end(self) -> None:
        import ray

        release()
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    quick = session.OWN_SESSION_ENVIRONMENT | {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5"}
    for key, value in {**session.RAY_ENVIRONMENT, **WORKER_ENVIRONMENT, **quick}.items():
        monkeypatch.setenv(key, value)
    found = Machines()
    yield found
    found.end()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    counts = {}
    for split, size in (("train", 5000), ("validation", 400)):
        numbers = np.arange(size, dtype=np.int64)
        stream = (numbers * 7 + numbers // 9) % (example.VOCABULARY - 1)
        write_token_file(folder / f"{split}-en", example.VOCABULARY, np.array_split(stream, size // 100))
        counts[split] = TokenCounts(size, size // 100, size)
    write_record(folder, TokensRecord(example.VOCABULARY, example.VOCABULARY - 1, {"en": counts}))
    return folder


class Run:
    """A stage that trains in the background on the machines."""

    def __init__(self, tokens: Path, folder: Path, machines: Machines, **cluster: Any) -> None:
        fields = {"executor": "ray", "address": machines.address, **cluster}
        self.job = example.job(tokens, folder / "run", num_experts=4, total_tokens=STEPS * example.BATCH, **fields)
        self.machines, self.training = machines, HeldTraining(self.job, folder / "held", pace_s=SLOWLY_S)
        prestart(self.job.cluster, folder, "rehearsal")
        self.result: Future[dict[str, Any]] = Future()
        threading.Thread(target=self.train, args=(folder,), daemon=True).start()

    def train(self, folder: Path) -> None:
        try:
            self.result.set_result(run_on_workers("rehearsal", self.training, self.job.cluster, folder))
        except BaseException as error:
            self.result.set_exception(error)

    def until(self, what: Callable[[], Any]) -> Any:
        """Wait until something is there, and return it."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := what()):
            assert not self.result.done(), self.result.result()
            assert time.monotonic() < deadline, f"{self.machines.at_work()} at work, checkpoints {self.steps()}"
            time.sleep(0.1)
        return found

    def steps(self) -> list[int]:
        """Of its checkpoints, newest first."""
        return [checkpoint.step_of(path) for path in checkpoint.checkpoints(self.job.out)]

    def until_at_work_on(self, *machines: str) -> None:
        """Wait until these machines and no others train, and a step is done."""
        self.until(lambda: self.machines.at_work() == set(machines))
        since = time.time()
        self.until(lambda: self.points() and self.points()[-1]["time"] > since)

    def points(self) -> list[dict[str, Any]]:
        path = self.job.out / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def went_on_from(self, step: int, lost_at: float) -> bool:
        """Whether this is the step after which all was done again, or for the first time, when something was lost."""
        return all((point["time"] > lost_at) == (point["step"] > step) for point in self.points())

    def end(self) -> dict[str, Any]:
        """Let it hurry; what it returns."""
        self.training.go()
        return self.result.result(timeout=PATIENCE_S)


def assert_losses_of_one_process(run: Run, folder: Path) -> None:
    alone = replace(run.job, out=folder / "alone", cluster=example.cluster())
    train(alone)
    expected = [json.loads(line) for line in (alone.out / "metrics.jsonl").read_text().splitlines()]
    assert len(expected) == STEPS + 1
    for here, there in zip(run.points(), expected, strict=True):
        assert here["step"] == there["step"]
        assert [here[key] for key in LOSSES if key in there] == pytest.approx(
            [there[key] for key in LOSSES if key in there], abs=1e-5
        )


def test_an_elastic_stage_goes_on_with_the_machines_that_are_left_and_takes_one_that_comes(
    tokens: Path, tmp_path: Path, machines: Machines
) -> None:
    second = machines.add()
    elastic = {"workers": 2, "min_workers": 1, "max_failures": 1}
    run = Run(tokens, tmp_path, machines, **elastic, checkpoint_every_tokens=5 * example.BATCH)
    run.until_at_work_on(machines.first, second)
    run.until(lambda: len(run.steps()) == 2)
    saved, lost_at = max(run.steps()), time.time()
    machines.kill(second)
    run.until_at_work_on(machines.first)
    assert run.went_on_from(saved, lost_at) or run.went_on_from(saved + 5, lost_at)
    run.until_at_work_on(machines.first, machines.add())
    assert run.points()[-1]["step"] < STEPS - 5
    run.end()
    assert_losses_of_one_process(run, tmp_path)


def test_a_machine_that_is_taken_back_with_notice_costs_no_step_before_it_and_no_failure(
    tokens: Path, tmp_path: Path, machines: Machines
) -> None:
    """One stays until its deadline; another is gone before it, while the ranks wait for each other."""
    second = machines.add()
    run = Run(tokens, tmp_path, machines, workers=2, max_failures=0, checkpoint_every_tokens=NEVER)
    run.until_at_work_on(machines.first, second)
    assert run.steps() == []
    third, lost_at = machines.add(), time.time() + NOTICE_S
    machines.take_back(second, lost_at)
    (saved,) = run.until(run.steps)
    assert time.time() < lost_at
    run.until_at_work_on(machines.first, third)
    assert run.went_on_from(saved, lost_at)

    fourth = machines.add()
    machines.take_back(third, time.time() + 10 * NOTICE_S)
    again = run.until(lambda: max(run.steps()) > saved and max(run.steps()))
    lost_at = time.time()
    machines.kill(third)
    run.until_at_work_on(machines.first, fourth)
    assert run.went_on_from(again, lost_at)
    run.end()
    assert_losses_of_one_process(run, tmp_path)
