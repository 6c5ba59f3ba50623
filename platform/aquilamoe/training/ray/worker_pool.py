"""Ray Train workers that do one piece of work after the other: what runs in Ray's processes.

Starting workers costs seconds (processes, imports, a process group), a call to a worker that stands milliseconds.
Therefore `fit` is called once for many stages, in an actor of its own: the crew. Its train function gets work
from the crew until there is no more. Ending the crew ends everything that it started. A lost worker makes Ray Train
start the group again, which requests again, gets the current work and resumes it from that work's own checkpoints.
"""

import asyncio
import os
import pickle
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.process import errors
from aquilamoe.training import preemption, sessions
from aquilamoe.training.ray.session import resources_per_worker

if TYPE_CHECKING:
    from ray.actor import ActorHandle
    from ray.train import RunConfig, ScalingConfig, UserCallback
    from ray.train.torch import TorchConfig

# Read by Ray Train in the process that calls `fit`, and by it handed on to the controller and to the workers.
TRAIN_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# An elastic group finds up to 20 s late for how many workers there is room: it must not wait long for what is gone.
ELASTIC_ENVIRONMENT = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "10"}
WATCH_S = 5.0  # as often as Ray Train itself polls


@dataclass(frozen=True)
class Outcome:
    """How a piece of work ended: with a value, a mistake of the user, or failures of workers by rank."""

    value: dict[str, Any] | None = None
    mistake: str | None = None
    failures: Mapping[int, BaseException] | None = None


class WorkerPool:
    """An actor: runs `fit`, hands out one piece of work at a time and takes back how it ended.

    cluster: how many workers, and of what. storage, name: where Ray Train keeps its own notes; nothing is resumed from
    them. label: of the metrics that the workers export to Ray.
    """

    def __init__(self, cluster: ClusterConfig, storage: str, name: str, label: str) -> None:
        self.cluster = cluster
        self.storage = storage
        self.name = name
        self.label = label
        self.number = 0
        self.work = b""
        self.failures_left = cluster.max_failures
        self.outcome: Outcome | None = None  # of the current work
        self.end: Outcome | None = None  # of the whole crew
        self.at_hand = False  # a work waits for its outcome
        self.stands = False  # workers have requested work, and have not been let go
        self.closed = False  # there will be no more work
        self.warned = False  # the cluster takes back a machine of these workers
        self.news = asyncio.Condition()

    async def start(self) -> None:
        """Start the workers and stay with them until they have ended."""
        import ray

        os.environ.update(TRAIN_ENVIRONMENT | (ELASTIC_ENVIRONMENT if _is_elastic(self.cluster) else {}))
        if self.cluster.address is None:  # this machine is not preempted, and the watcher is a process
            os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
        me = ray.get_runtime_context().current_actor
        end = Outcome()
        try:
            await asyncio.to_thread(_fit, self.cluster, self.storage, self.name, self.label, me)
        except Exception as error:
            end = Outcome(failures={0: error})
        async with self.news:
            self.end, self.stands = end, False
            self.news.notify_all()

    async def do(self, work: bytes) -> Outcome:
        """Have every worker call the pickled function with its `Rank`; return what came out, for the first rank."""
        async with self.news:
            self.number += 1
            self.work = work
            self.failures_left = self.cluster.max_failures
            self.outcome, self.at_hand = None, True
            self.news.notify_all()
            await self.news.wait_for(lambda: self.outcome or self.end)
            self.at_hand = False
            found = self.outcome or self.end
            assert found is not None
            return found

    async def is_standing(self) -> bool:
        """Whether workers are there and have requested work."""
        return self.stands

    async def close(self) -> None:
        """Let the workers go; return when they have gone."""
        async with self.news:
            self.closed = True
            self.news.notify_all()
            await self.news.wait_for(lambda: self.end)

    async def next(self, after: int) -> tuple[int, bytes] | None:
        """For workers: the next work after the number that this one has done, or None: no work is left, exit."""
        async with self.news:
            self.stands = True
            if not after:  # these workers are new, and a warning about a machine concerned others
                self.warned = False
            await self.news.wait_for(lambda: self.closed or self._is_open(after))
            return None if self.closed else (self.number, self.work)

    def _is_open(self, after: int) -> bool:
        return self.at_hand and self.outcome is None and self.number > after

    async def done(self, number: int, outcome: Outcome) -> None:
        """For workers: how the work of this number ended. Only the first report of a work counts."""
        async with self.news:
            if self._is_open(number - 1) and number == self.number:
                self.outcome = outcome
                self.news.notify_all()

    async def warn(self) -> None:
        """For workers: the cluster takes back a machine of theirs. How they end then is no failure."""
        self.warned = True

    async def gone(self) -> None:
        """For Ray Train's controller: it ends these workers."""
        self.stands = False

    async def lost(self, failures: Mapping[int, BaseException]) -> None:
        """For Ray Train's controller: these ranks failed, and all are started again."""
        async with self.news:
            self.stands = False
            if self.warned or any(getattr(_lost(failure), "preempted", False) for failure in failures.values()):
                return
            self.failures_left -= 1
            if self.failures_left < 0:
                self.outcome = self.end = Outcome(failures=failures)
                self.news.notify_all()


def _lost(failure: BaseException) -> BaseException | None:
    """What ended a worker, None if it runs and its function raised `failure`."""
    return getattr(failure, "health_check_failure", None)


def cause(name: str, max_failures: int, failures: Mapping[int, BaseException]) -> BaseException:
    """What to report of the last failures of a work, by rank: a lost worker, or else what a worker raised."""
    for rank, failure in sorted(failures.items()):
        if (lost := _lost(failure)) is not None:
            often = f"worker {rank}, restarted {max_failures} times (cluster.max_failures)," if max_failures else ""
            return sessions.lost(name, often or f"worker {rank}", lost)
    first = failures[min(failures)]
    is_rays = type(first).__module__.startswith("ray.") and not hasattr(first, "cause")
    return sessions.lost(name, "Ray's group of workers", first) if is_rays else first


def _fit(cluster: ClusterConfig, storage: str, name: str, label: str, crew: "ActorHandle[WorkerPool]") -> None:
    from ray.train.torch import TorchTrainer

    try:
        TorchTrainer(
            _serve,
            train_loop_config={"crew": crew, "label": label, "watch": cluster.address is not None},
            scaling_config=_scaling(cluster),
            torch_config=_torch_config(cluster, crew),
            run_config=_run_config(storage, name, crew),
        ).fit()
    finally:
        shutil.rmtree(Path(storage, name), ignore_errors=True)


def _is_elastic(cluster: ClusterConfig) -> bool:
    return cluster.min_workers is not None and cluster.min_workers < cluster.workers


def _scaling(cluster: ClusterConfig) -> "ScalingConfig":
    from ray.train import ScalingConfig

    return ScalingConfig(
        num_workers=(cluster.min_workers, cluster.workers) if _is_elastic(cluster) else cluster.workers,  # type: ignore[arg-type]
        use_gpu=cluster.gpus_per_worker > 0,
        resources_per_worker=resources_per_worker(cluster),
    )


def _torch_config(cluster: ClusterConfig, crew: "ActorHandle[WorkerPool]") -> "TorchConfig":
    """Ray's process group; workers that handle a preemption notice (in the main thread, as signals want); and a
    crew that knows when Ray Train lets them go, which is no failure where it expects that their machine will."""
    import ray
    from ray.train.torch import TorchConfig

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]
        def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_training_start(worker_group, backend_config)
            worker_group.execute(preemption.listen)

        def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
            ray.get(crew.gone.remote())
            super().on_shutdown(worker_group, backend_config)

    class CountedTorchConfig(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return CountedTorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo")


def _run_config(storage: str, name: str, crew: "ActorHandle[WorkerPool]") -> "RunConfig":
    from ray.train import FailureConfig, RunConfig

    # How often workers may fail is counted by the crew, for each work separately.
    return RunConfig(
        name=name,
        storage_path=storage,
        failure_config=FailureConfig(max_failures=-1),
        callbacks=[_failure_callback(crew)],  # type: ignore[list-item]
    )


def _failure_callback(crew: "ActorHandle[WorkerPool]") -> "UserCallback":
    """Reports to the crew, from Ray Train's controller, which workers failed and of what."""
    import ray
    from ray.train import UserCallback

    class FailureCallback(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            ray.get(crew.lost.remote({rank: _portable(error) for rank, error in worker_exceptions.items()}))

    return FailureCallback()


def _portable(error: BaseException) -> BaseException:
    """The error, or its text if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _serve(config: dict[str, Any]) -> None:
    """Runs on every rank until the crew is closed."""
    import ray
    from ray.train import get_context

    import aquilamoe.training.loop  # noqa: F401  # what every work needs, while none is there yet
    from aquilamoe.training.job import Rank
    from aquilamoe.training.ray import metrics_exporter

    crew = config["crew"]
    context = get_context()
    number = 0
    place = context.get_world_rank(), context.get_world_size(), context.get_local_rank()
    rank = Rank(*place, preemption.is_due, metrics_exporter.meter(config["label"]))
    if config["watch"]:
        Thread(target=_watch, args=(crew,), daemon=True).start()
    while (found := ray.get(crew.next.remote(number))) is not None:
        number, work = found
        outcome = perform(work, rank)
        if rank.rank == 0 or outcome.mistake is not None:
            ray.get(crew.done.remote(number, outcome))


def _watch(crew: "ActorHandle[WorkerPool]") -> None:
    """Pass on that the cluster takes back a machine of these workers; all ranks call it together."""
    import ray
    from ray.train import get_preemption_info

    known = None
    with suppress(Exception):  # the group ends
        while True:
            if (info := get_preemption_info()) is not None and info != known:
                known = info
                ray.get(crew.warn.remote())
                preemption.notify()
            time.sleep(WATCH_S)


def perform(work: bytes, rank: Any) -> Outcome:
    """Do one work. What would happen again is returned, not raised: raising would make Ray try again."""
    try:
        with preemption.at_work():
            return Outcome(value=pickle.loads(work)(rank))
    except UserError as error:
        return Outcome(mistake=str(error))
    except Exception as error:
        refused = errors.of_system(error)
        if refused is None or refused.errno not in errors.LASTING:
            raise
        return Outcome(mistake=errors.described(error))
