"""The only file that knows Ray Train: runs a training job on workers, or in this process."""

import logging
import os
from pathlib import Path
from typing import Any

from aquilamoe.config.messages import UserError
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.training.loop import Job, Rank, train

# Read by Ray when it is imported: no telemetry, no token file in the home folder, no start-up chatter, quick polls.
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def launch(job: Job, root: Path) -> dict[str, Any]:
    """Train the job as its cluster says; return the metrics of rank 0."""
    if job.cluster.executor == "process":
        return train(job)
    start_session(job.cluster)
    return _fit(job, root)


def start_session(cluster: ClusterConfig) -> None:
    """Connect this driver to Ray once: to `cluster.address`, or to a session of its own on this machine."""
    for key, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return
    if cluster.address is not None:
        try:
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise UserError(
                f"cluster.address: no Ray cluster answers at '{cluster.address}' ({error}); start one with "
                "`ray start --head`, or use cluster=local"
            ) from None
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


def _fit(job: Job, root: Path) -> dict[str, Any]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources: dict[str, float] = {"CPU": job.cluster.cpus_per_worker}
    if job.cluster.gpus_per_worker:
        resources["GPU"] = job.cluster.gpus_per_worker
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]  # annotated to return nothing, documented to return rank 0's value
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=job.cluster.workers,
            use_gpu=job.cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="nccl" if job.cluster.gpus_per_worker else "gloo"),
        run_config=RunConfig(
            # Progress is resumed from our own checkpoints in the stage's directory, so that a run continues in the same
            # way after a lost worker, a killed driver, and on another cluster; Ray only starts and restarts workers.
            name=f"{job.out.name}-{os.getpid()}",
            storage_path=str(root / "ray"),
            failure_config=FailureConfig(max_failures=job.cluster.max_failures),
        ),
    )
    outcome = getattr(trainer.fit(), "return_value", None)
    assert isinstance(outcome, dict), "rank 0 returns a dictionary"
    if "user_error" in outcome:
        raise UserError(outcome["user_error"])
    return outcome


def _worker(config: dict[Any, Any]) -> dict[str, Any]:
    """Runs on every rank. A mistake of the user is returned, not raised: raising would make Ray try again."""
    from ray.train import get_context

    context = get_context()
    try:
        return train(config["job"], Rank(context.get_world_rank(), context.get_world_size(), context.get_local_rank()))
    except UserError as error:
        return {"user_error": str(error)}
