"""Trials under Ray Tune: only this file uses Tune."""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aquilamoe.ablation.plan import Task
from aquilamoe.ablation.trial import Field, Stopped, Stopping, compute
from aquilamoe.config import stage_cluster
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.pipeline import integrity
from aquilamoe.pipeline.store import METRICS, Record, Store, read_points
from aquilamoe.process import interruption

if TYPE_CHECKING:
    from ray.tune import Callback
    from ray.tune.schedulers import ASHAScheduler

# Read by Tune when it is imported: no files of its loggers, no tables of its own in the terminal.
# No handler of its own for Ctrl-C: with it, Tune returns partial results as if all trials had finished.
TUNE_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
LOSS = "loss"
ABOVE_SOURCE = "above_source"
TOKENS = "tokens"
# Early stopping: first after an eighth of the tokens, and the worse half each time.
GRACE, REDUCTION = 8, 2


class TuneReporter:
    """Reports to Ray Tune the held-out losses of one stage of a line, for its scheduler.

    The last, after `tokens`, is not reported: a trial that gets there writes its result, however it compares.
    """

    def __init__(self, stage: str, tokens: int) -> None:
        self.stage, self.tokens = stage, tokens
        self.goal = 0.0  # the final loss of what was grown

    def stage_started(self, *_: Any) -> None:
        pass

    def stage_progress(self, stage: str, points: Sequence[Mapping[str, Any]]) -> None:
        from ray import tune

        for point in points:
            if stage == self.stage and "val/loss" in point and 0 < point["tokens"] < self.tokens:
                tune.report(self.measures(point))

    def measures(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """What trials are compared by at a point: less is better; a trial back at the source's loss has recovered."""
        loss = point["val/loss"]
        return {LOSS: loss, ABOVE_SOURCE: max(0.0, loss - self.goal), TOKENS: point["tokens"]}

    def stage_finished(self, stage: str, directory: Path, record: Record, cached: bool) -> None:
        """Report again what a trial that ended before this run reported then: others are compared with it."""
        self.goal = record["metrics"].get("source_final_loss") or self.goal
        if cached and stage == self.stage:
            integrity.check(directory, record, "early stopping", [METRICS])
            self.stage_progress(stage, read_points(directory / METRICS))

    def stage_failed(self, stage: str, message: str) -> None:
        pass


def run(field: Field, cluster: ClusterConfig, stopping: Stopping | None) -> None:
    """Run what waits in the field; with early stopping, what has a result reports it once more."""
    for key, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from ray import tune

    from aquilamoe.training.ray.session import start_session

    start_session(cluster)
    cluster = cluster.model_copy(update={"runtime_env": {}})  # the session has it; Tune's notes on the disk need not
    again = [name for name in field.tasks if stopping and field.is_done(name)]
    names = [*again, *field.waiting()]
    nested = cluster.executor == "ray"  # then a trial's workers have what it computes with
    own = {"cpu": float(cluster.cpus_per_worker), "gpu": float(cluster.gpus_per_worker)}
    if nested:
        own = {"memory": 1.0}  # one byte, because Tune requires every trial to reserve a resource
    trainable = tune.with_parameters(
        _trial, tasks=field.tasks, store=field.store, cluster=cluster, logs=field.logs, reports=stopping is not None
    )
    notes = field.store.root / "trials" / f"tune-{os.getpid()}"
    try:
        tune.Tuner(
            tune.with_resources(trainable, own),
            param_space={"task": tune.grid_search(names)},
            tune_config=tune.TuneConfig(
                scheduler=_halving(field.tasks.values(), stopping) if stopping else None,
                max_concurrent_trials=_room(field, cluster) if nested else None,
                reuse_actors=stopping is None,  # the worker of a stopped trial continues training until it is ended
            ),
            run_config=tune.RunConfig(
                name=notes.name,
                storage_path=str(notes.parent),
                failure_config=tune.FailureConfig(max_failures=cluster.max_failures),  # of lost workers: see `compute`
                callbacks=[_listener(field, again)],
                verbose=0,
            ),
        ).fit()
    finally:
        shutil.rmtree(notes, ignore_errors=True)  # Tune's own notes: nothing is resumed from them


def _room(field: Field, cluster: ClusterConfig) -> int:
    """How many trials' workers the cluster has room for at once; at least 1, which then reports what is missing."""
    import ray

    from aquilamoe.training.ray.session import resources_per_worker

    has, rooms = ray.cluster_resources(), []
    for own in (stage_cluster.of(planned.node, cluster) for task in field.tasks.values() for planned in task.stages):
        each = resources_per_worker(own)
        rooms += [int(has.get(name, 0.0) // (amount * own.workers)) for name, amount in each.items()]
    return max(1, min(rooms))


def _trial(
    config: Mapping[str, str],
    *,
    tasks: Mapping[str, Task],
    store: Store,
    cluster: ClusterConfig,
    logs: Path,
    reports: bool,
) -> None:
    """Runs in a worker."""
    task = tasks[config["task"]]
    leaf = task.leaf
    observers = [TuneReporter(leaf.stage, leaf.nodes[leaf.stage].tokens)] if reports else []
    compute(task, store, cluster, logs, observers)


def _halving(tasks: Iterable[Task], stopping: Stopping) -> "ASHAScheduler":
    from ray.tune.schedulers import ASHAScheduler

    longest = max(task.leaf.nodes[task.leaf.stage].tokens for task in tasks)
    return ASHAScheduler(
        time_attr=TOKENS,
        metric=ABOVE_SOURCE if stopping.by_recovery else LOSS,
        mode="min",
        max_t=longest,
        grace_period=max(1, longest // GRACE),
        reduction_factor=REDUCTION,
    )


def _listener(field: Field, again: Sequence[str]) -> "Callback":
    from ray.tune import Callback
    from ray.tune.experiment import Trial

    class Listener(Callback):
        """Reports how each trial ended while others run."""

        def on_step_begin(self, iteration: int, trials: list[Trial], **_: Any) -> None:  # noqa: ARG002
            interruption.check()

        def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:  # noqa: ARG002
            name, last = trial.config["task"], trial.last_result or {}
            stopped = Stopped(int(last[TOKENS]), float(last[LOSS])) if LOSS in last else None
            if name not in again:
                field.ended(name, stopped=stopped)

        def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:  # noqa: ARG002
            field.ended(trial.config["task"], "its worker was lost more often than cluster.max_failures allows")

        def __reduce__(self) -> tuple[type[Callback], tuple[()]]:
            return Callback, ()  # Tune pickles this for resuming, which is not used here

    return Listener()
