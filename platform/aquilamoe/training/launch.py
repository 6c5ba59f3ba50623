"""The only file that knows Ray Train: runs a training job on workers, or in this process."""

import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.training.environment import WORKER_ENVIRONMENT
from aquilamoe.training.job import Job, Rank
from aquilamoe.training.loop import train

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

# Read by Ray when it is imported: no telemetry, no token file in the home folder, no start-up chatter, quick polls.
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "30",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
CONNECT_TIMEOUT_S = 10.0


def launch(job: Job, root: Path) -> dict[str, Any]:
    """Train the job as its cluster says; return the metrics of rank 0."""
    if job.cluster.executor == "process":
        return train(job)
    start_session(job.cluster)
    return _fit(job, root)


def start_session(cluster: ClusterConfig) -> None:
    """Connect this driver to Ray once: to `cluster.address`, or to a session of its own on this machine."""
    for key, value in {**RAY_ENVIRONMENT, **WORKER_ENVIRONMENT}.items():  # a session of our own inherits them
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return
    if cluster.address is not None:
        _connect(cluster.address)
        return
    needed = cluster.workers * cluster.cpus_per_worker
    ray.init(
        address="local",
        num_cpus=max(needed, os.cpu_count() or 1),
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _connect(address: str) -> None:
    import ray

    try:
        _knock(address)
        environment = {"env_vars": WORKER_ENVIRONMENT}
        ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"cluster.address: no Ray cluster answers at '{address}' ({reason}); start one with "
            "`ray start --head`, or use cluster=local"
        ) from None


def _knock(address: str) -> None:
    """OSError at once if nobody listens at `[ray://]host:port`: Ray itself tries for minutes, and noisily."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()


def _fit(job: Job, root: Path) -> dict[str, Any]:
    from ray.train import WorkerGroupError

    storage, name = root / "ray", f"{job.out.name}-{os.getpid()}"
    try:
        with _interruptible():
            outcome = getattr(_trainer(job, storage, name).fit(), "return_value", None)
    except WorkerGroupError as error:
        raise _cause(job, error.worker_failures) from error
    finally:
        shutil.rmtree(storage / name, ignore_errors=True)  # Ray's own notes: nothing is resumed from them
    assert isinstance(outcome, dict), "rank 0 returns a dictionary"
    if "user_error" in outcome:
        raise UserError(outcome["user_error"])
    return outcome


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C be a KeyboardInterrupt: `fit` ends the run in order, but by `sys.exit(0)`, and leaves its handler."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def _trainer(job: Job, storage: Path, name: str) -> "TorchTrainer":
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cluster = job.cluster
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        _worker,  # type: ignore[arg-type]  # annotated to return nothing, documented to return rank 0's value
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu=cluster.gpus_per_worker > 0, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            # Progress is resumed from our own checkpoints in the stage's directory, so that a run continues in the same
            # way after a lost worker, a killed driver, and on another cluster; Ray only starts and restarts workers.
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )


def _worker(config: dict[Any, Any]) -> dict[str, Any]:
    """Runs on every rank. A mistake of the user is returned, not raised: raising would make Ray try again."""
    from ray.train import get_context
    from ray.train.collective import barrier

    context = get_context()
    try:
        return train(config["job"], Rank(context.get_world_rank(), context.get_world_size(), context.get_local_rank()))
    except UserError as error:
        try:
            barrier()
        except Exception:  # this rank alone has the error, and the others would wait for it without end
            raise error from None
        return {"user_error": str(error)}


def _cause(job: Job, failures: Mapping[int, BaseException]) -> BaseException:
    """What to tell of the last failures of a run, by rank: a lost worker, or else what a worker raised."""
    for rank, failure in sorted(failures.items()):
        lost = getattr(failure, "health_check_failure", None)
        if lost is not None:
            reason = " ".join(str(lost).split())
            return UserError(
                f"stage {job.name}: worker {rank} was lost, and cluster.max_failures ({job.cluster.max_failures}) "
                f"does not allow another restart ({reason[:300]}); see what ended it - memory? - and run again: "
                "the stage continues from its last checkpoint"
            )
    return failures[min(failures)]
