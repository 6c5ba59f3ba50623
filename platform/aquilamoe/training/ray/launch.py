"""Runs training, and other work for workers, on Ray Train workers or in this process."""

import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.process import interruption
from aquilamoe.training import sessions
from aquilamoe.training.ray.session import Patience, check_session, start_session

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from aquilamoe.training.job import Job, Rank
    from aquilamoe.training.ray.worker_pool import Outcome, WorkerPool

POLL_S, CLOSE_S = 1.0, 10.0
MADE_HERE = "efficientscale-"  # the names of folders that Ray Train's notes are in begin so

Work = Callable[["Rank"], dict[str, Any]]


def launch(job: "Job", root: Path) -> dict[str, Any]:
    """Train the job on its cluster; return the metrics of rank 0."""
    from aquilamoe.training.loop import train

    return run_on_workers(job.name, partial(train, job), job.cluster, root)


def run_on_workers(name: str, work: Work, cluster: ClusterConfig, root: Path) -> dict[str, Any]:
    """Call the function on the cluster's workers, once on every rank; return what rank 0 returned.

    name: the stage, for messages and Ray's dashboard. work: can be pickled; resumes when called again.
    """
    from aquilamoe.training.job import Rank
    from aquilamoe.training.ray import metrics_exporter

    if cluster.executor == "process":
        return work(Rank(meter=metrics_exporter.meter("trials")))
    return prestart(cluster, root, name).do(name, work)


def prestart(cluster: ClusterConfig, root: Path, label: str, cpus: int = 0) -> "Workers":
    """Let the workers of this cluster begin to start, if they do not stand already; return them at once.

    label: what Ray calls them, and their metrics. Workers of another shape than those that stand take their place.
    cpus: cores that a session of our own has at least, for workers of other stages.
    """
    global _workers
    if _workers is not None and (_workers.shape != _shape(cluster) or _workers.is_over):
        release()
    if _workers is None:
        _workers = Workers(cluster, root, label, cpus)
    return _workers


@contextmanager
def workers_for(clusters: Sequence[ClusterConfig], root: Path, label: str) -> Iterator[None]:
    """For a whole run: let workers start beside whatever comes first, if it will train, and go when it ends.

    clusters: of the stages that will train, in their order. Stages with workers of one shape share them.
    """
    if clusters and clusters[0].executor == "ray":
        prestart(clusters[0], root, label, max(each.workers * each.cpus_per_worker for each in clusters))
    try:
        yield
    finally:
        release()


def release() -> None:
    """Let the workers go, if there are any: nothing stays reserved."""
    global _workers
    workers, _workers = _workers, None
    if workers is not None:
        workers.close()


_workers: "Workers | None" = None


def _shape(cluster: ClusterConfig) -> tuple[Any, ...]:
    least = cluster.min_workers or cluster.workers
    resources = (least, cluster.workers, cluster.cpus_per_worker, cluster.gpus_per_worker)
    return (cluster.address, *resources, cluster.max_failures, cluster.start_timeout_s)


class Workers:
    """The driver's side of a crew, which starts in the background when this is made."""

    def __init__(self, cluster: ClusterConfig, root: Path, label: str, cpus: int = 0) -> None:
        self.cluster = cluster
        self.cpus = cpus
        self.shape = _shape(cluster)
        self.is_over = False
        self.label = label
        self.storage = str(root / "ray")
        self.name = f"{MADE_HERE}{label}-{os.getpid()}-{time.monotonic_ns() // 1_000_000}"
        self.crew: Future[ActorHandle[WorkerPool]] = Future()
        threading.Thread(target=self._start, daemon=True).start()

    def _start(self) -> None:
        try:
            for left in Path(self.storage).glob(f"{MADE_HERE}*-*[0-9]"):  # by killed runs; all else there is not ours
                shutil.rmtree(left, ignore_errors=True)
            start_session(self.cluster, self.cpus)
            self.crew.set_result(_start_crew(self.cluster, self.storage, self.name, self.label))
        except BaseException as error:
            self.crew.set_exception(error)

    def do(self, name: str, work: Work) -> dict[str, Any]:
        """Have the workers do it; return what rank 0 returned.

        UserError for what the work reports as wrong, for workers that are lost too often, and for a cluster that has no
        room for them. After any error no worker works any more.
        """
        import ray

        self.is_over = True  # unless it ends well
        try:
            outcome = self._outcome(name, work)
        except ray.exceptions.RayError as error:
            raise sessions.lost(name, "the process that starts Ray's workers", error) from error
        finally:
            if self.is_over:
                self.kill()
        return outcome

    def _outcome(self, name: str, work: Work) -> dict[str, Any]:
        import ray

        from aquilamoe.training.ray.worker_pool import cause  # here: plans have no time for what it imports

        crew = self.crew.result()
        if threading.current_thread() is threading.main_thread():  # Ray's own SIGTERM handler ends all at once
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)
        pending: Any = crew.do.options(name=name).remote(pickle.dumps(work))
        watch = Patience(self.cluster)
        while not ray.wait([pending], timeout=POLL_S)[0]:
            interruption.check()
            check_session()
            watch.look(ray.get(crew.is_standing.remote()))
        outcome: Outcome = ray.get(pending)
        if outcome.mistake is not None:
            raise UserError(outcome.mistake)
        if outcome.value is None:
            raise cause(name, self.cluster.max_failures, outcome.failures or {0: RuntimeError("the workers went home")})
        self.is_over = False
        return outcome.value

    def close(self) -> None:
        """Let the workers go in order; end them if that takes too long."""
        import ray

        if not self.is_over and self.crew.done() and self.crew.exception() is None:
            ray.wait([self.crew.result().close.remote()], timeout=CLOSE_S)
        self.kill()

    def kill(self) -> None:
        """End the crew, and with it all that it started."""
        self.is_over = True
        self.crew.add_done_callback(self._kill)  # at once, or as soon as it has started

    def _kill(self, started: "Future[ActorHandle[WorkerPool]]") -> None:
        import ray

        if started.exception() is None and ray.is_initialized():
            ray.kill(started.result())
        shutil.rmtree(Path(self.storage, self.name), ignore_errors=True)


def _start_crew(cluster: ClusterConfig, storage: str, name: str, label: str) -> "ActorHandle[WorkerPool]":
    """Where this driver is: whatever other machine is lost, what restarts workers is not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from aquilamoe.training.ray.worker_pool import WorkerPool

    # Ray Train's own watcher over what a crew reserved looks its session up by this; without it, and with a second
    # session on the machine, it ends, and what the crew of a failed work had reserved is never given back.
    context = ray.get_runtime_context()
    options = {
        "num_cpus": 0,
        "max_concurrency": cluster.workers + 8,
        "runtime_env": {"env_vars": {"RAY_ADDRESS": context.gcs_address}},
        "scheduling_strategy": NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False),
    }
    actor = ray.remote(WorkerPool).options(**options)
    crew: Any = actor.remote(cluster, storage, name, label)
    crew.start.remote()
    return crew
