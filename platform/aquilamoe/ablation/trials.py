"""Runs the lines of an ablation as trials of Ray Tune: side by side, each failing for itself.

What a trial has done is in the store, under the fingerprints of its stages: an ablation that was killed and is run
again finds finished trials there, and goes on with the others from their checkpoints.
"""

import os
import shutil
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquilamoe.ablation.plan import Task
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.pipeline import runner
from aquilamoe.pipeline.store import Record, Store

if TYPE_CHECKING:
    from ray.tune import Callback
    from ray.tune.schedulers import ASHAScheduler

# Read by Tune when it is imported: no files of its loggers, no tables of its own in the terminal.
TUNE_ENVIRONMENT = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
LOSS, TOKENS = "loss", "tokens"
# Early stopping: first after an eighth of the tokens, and the worse half each time.
GRACE, REDUCTION = 8, 2


@dataclass(frozen=True)
class Failure:
    """Why a trial made no result: the message, and the file that has the rest."""

    message: str
    log: Path


# Told after every trial: its task, and its failure if it failed.
Told = Callable[[Task, Failure | None], None]


class Reporter:
    """Tells Ray Tune the held-out losses of one stage of a line, for its scheduler."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def stage_started(self, *_: Any) -> None:
        pass

    def stage_progress(self, stage: str, points: Sequence[Mapping[str, Any]]) -> None:
        from ray import tune

        for point in points:
            if stage == self.stage and "val/loss" in point and point["step"]:
                tune.report({LOSS: point["val/loss"], TOKENS: point["tokens"]})

    def stage_finished(self, stage: str, directory: Path, record: Record, cached: bool) -> None:
        pass

    def stage_failed(self, stage: str, message: str) -> None:
        pass


def run(
    tasks: Sequence[Task], store: Store, cluster: ClusterConfig, trial_cpus: int, early_stopping: bool, told: Told
) -> dict[str, Failure]:
    """Compute every task that is not in the store, as many at once as the cluster has room for.

    early_stopping: with asynchronous successive halving (ASHA) on the held-out loss against tokens. What it stops has
    no output, and no failure either. Returns the failures, by the names of their tasks.
    """
    waiting = {task.name: task for task in tasks if store.find(task.leaf.stage, task.leaf.fingerprint) is None}
    ended = _Ended(waiting, store.root / "logs", told)
    alone = cluster.model_copy(update={"executor": "process", "cpus_per_worker": trial_cpus})
    if cluster.executor == "process":
        for name in waiting:
            _trial({"task": name}, tasks=waiting, root=store.root, cluster=alone, logs=ended.logs, reports=False)
            ended.tell(name)
    elif waiting:
        _tune(ended, store.root, cluster, alone, early_stopping)
    return ended.failures


class _Ended:
    """Keeps how each trial ended, and passes it on."""

    def __init__(self, tasks: Mapping[str, Task], logs: Path, told: Told) -> None:
        self.tasks, self.logs, self.told = tasks, logs, told
        self.failures: dict[str, Failure] = {}

    def tell(self, name: str, lost: str | None = None) -> None:
        log = self.logs / f"{name}.log"
        message = lost or (log.read_text(encoding="utf-8").split("\n")[0] if log.exists() else None)
        failure = Failure(message, log) if message else None
        if failure is not None:
            self.failures[name] = failure
        self.told(self.tasks[name], failure)


def _tune(ended: _Ended, root: Path, cluster: ClusterConfig, alone: ClusterConfig, early_stopping: bool) -> None:
    for key, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from ray import tune

    from aquilamoe.training.session import start_session

    start_session(cluster)
    trainable = tune.with_parameters(_trial, tasks=ended.tasks, root=root, cluster=alone, logs=ended.logs, reports=True)
    folder = f"trials-{os.getpid()}"
    try:
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": alone.cpus_per_worker, "gpu": cluster.gpus_per_worker}),
            param_space={"task": tune.grid_search(list(ended.tasks))},
            tune_config=tune.TuneConfig(
                scheduler=_halving(ended.tasks.values()) if early_stopping else None,
                reuse_actors=not early_stopping,  # a worker whose trial was stopped trains on until it is ended
            ),
            run_config=tune.RunConfig(
                name=folder,
                storage_path=str(root / "ray"),
                failure_config=tune.FailureConfig(max_failures=cluster.max_failures),  # of lost workers: see _trial
                callbacks=[_listener(ended)],
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(root / "ray" / folder, ignore_errors=True)  # Tune's own notes: nothing is resumed from them


def _trial(
    config: Mapping[str, str],
    *,
    tasks: Mapping[str, Task],
    root: Path,
    cluster: ClusterConfig,
    logs: Path,
    reports: bool,
) -> None:
    """Runs in a worker. What it raises would come again if it were tried again: it is written down instead."""
    task, store = tasks[config["task"]], Store(root)
    log = logs / f"{task.name}.log"
    log.unlink(missing_ok=True)
    try:
        runner.run(
            task.stages,
            store,
            cluster,
            [Reporter(task.leaf.stage)] if reports else [],
            alone=lambda planned: store.stage_lock(planned.fingerprint),
        )
    except Exception as error:
        logs.mkdir(parents=True, exist_ok=True)
        message = " ".join(str(error).split()) or type(error).__name__
        log.write_text(f"{message}\n\n{traceback.format_exc()}", encoding="utf-8")


def _halving(tasks: Iterable[Task]) -> "ASHAScheduler":
    from ray.tune.schedulers import ASHAScheduler

    longest = max(task.leaf.nodes[task.leaf.stage].tokens for task in tasks)
    return ASHAScheduler(
        time_attr=TOKENS,
        metric=LOSS,
        mode="min",
        max_t=longest,
        grace_period=max(1, longest // GRACE),
        reduction_factor=REDUCTION,
    )


def _listener(ended: _Ended) -> "Callback":
    from ray.tune import Callback
    from ray.tune.experiment import Trial

    class Listener(Callback):
        """Passes on how each trial ended, while others run."""

        def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:  # noqa: ARG002
            ended.tell(trial.config["task"])

        def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:  # noqa: ARG002
            ended.tell(trial.config["task"], "its worker was lost, more often than cluster.max_failures allows")

        def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
            return Callback, ()  # Tune keeps a copy for resuming, which is not how we resume

    return Listener()
