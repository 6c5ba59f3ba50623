"""Runs the lines of an ablation as trials: in parallel where there is Ray; a failure stops no other trial.

What a trial has done is in the store, under the fingerprints of its stages: an ablation that was killed and is run
again finds finished trials there, and resumes the others from their checkpoints.
"""

from collections.abc import Mapping, Sequence

from aquilamoe.ablation.plan import Task
from aquilamoe.ablation.trial import Failure, Field, OnEnd, Stopping, compute
from aquilamoe.config import stage_cluster
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.pipeline.store import Store


def run(
    tasks: Sequence[Task],
    store: Store,
    cluster: ClusterConfig,
    trial_cpus: int,
    *,
    on_end: OnEnd,
    stopping: Stopping | None = None,
) -> dict[str, Failure]:
    """Compute every task that is not in the store, as many at once as the cluster has room for.

    A trial trains in its own process, on `trial_cpus` cores, or on workers of its own where the cluster has several.
    What early stopping ends has no output, and no failure either. Returns the failures, by the names of their tasks.
    """
    field = Field(tasks, store, on_end)
    if not field.waiting():
        return {}
    in_ray = cluster.executor == "ray"
    stages = [planned.node for task in tasks for planned in task.stages]
    if all(stage_cluster.of(node, cluster).workers == 1 for node in stages):
        cluster = cluster.model_copy(update={"executor": "process", "cpus_per_worker": trial_cpus})
    if in_ray:
        from aquilamoe.ablation import tuning

        tuning.run(field, cluster, stopping)
        return field.failures
    for name in field.waiting():
        compute(field.tasks[name], store, cluster, field.logs, [])
        field.ended(name)
    return field.failures


def without_source(
    tasks: Sequence[Task], sources: Sequence[Task], failures: Mapping[str, Failure], on_end: OnEnd
) -> tuple[list[Task], dict[str, Failure]]:
    """The tasks whose source was made; and the failures of the others, which are not tried."""
    failed = {source.leaf.fingerprint: failures[source.name] for source in sources if source.name in failures}
    left: list[Task] = []
    lost: dict[str, Failure] = {}
    for task in tasks:
        failure = next((failed[stage.fingerprint] for stage in task.stages if stage.fingerprint in failed), None)
        if failure is None:
            left.append(task)
        elif task.leaf.fingerprint not in failed:
            log = failure.log.with_name(f"{task.name}.log")
            lost[task.name] = Failure(f"its source failed: {failure.message}", log)
            log.write_text(f"{lost[task.name].message}\n\nSee {failure.log.name}.\n", encoding="utf-8")
            on_end(task, lost[task.name])
    return left, lost
