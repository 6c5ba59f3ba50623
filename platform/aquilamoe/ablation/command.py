"""What the actions of `workflows/ablations.py` do."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aquilamoe.ablation import plan as planning
from aquilamoe.ablation import screen, trials
from aquilamoe.ablation.results import check_objective, collect, summary
from aquilamoe.ablation.union import Union, build
from aquilamoe.ablation.variants import Compose
from aquilamoe.config import graph
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.messages import UserError, first_problem
from aquilamoe.config.schema import ExperimentConfig
from aquilamoe.pipeline import runner
from aquilamoe.pipeline.store import Store, write_atomically
from aquilamoe.terminal.screen import console

OWN_KEYS = ("seeds", "scheduler", "trial_cpus")  # beside `ablation`, for short commands


def execute(values: Mapping[str, Any], known: list[str], compose: Compose) -> None:
    """Validate a composed ablation and do its action; UserError for anything that the user can repair.

    known: the ablations there are. compose: how a variant's experiment comes to be.
    """
    if not isinstance(values.get("ablation"), dict):
        raise UserError(f"ablation: none is chosen; choose one with +ablation=NAME (valid: {', '.join(known)})")
    config = _parse({**values["ablation"], **{key: values[key] for key in OWN_KEYS}})
    experiment = graph.parse(_experiment(values))
    union = build(config, lambda overrides, seeds: [_experiment(each) for each in compose(overrides, seeds)])
    check_objective(config, experiment)
    if config.scheduler == "asha" and experiment.cluster.executor != "ray":
        raise UserError("scheduler: asha compares trials that run at once, which needs Ray; use cluster=local, or none")
    store = Store(Path(experiment.paths.root).absolute())
    if experiment.action == "plan":
        _show_plan(experiment, union, store, config)
    elif experiment.action == "status":
        screen.show_results(console(), collect(union, store, config), config)
    else:
        with store.lock():
            _run(experiment, union, store, config)


def _show_plan(experiment: ExperimentConfig, union: Union, store: Store, config: AblationConfig) -> None:
    tasks = planning.tasks(union, store, experiment.cluster.flops_per_s)
    out = console()
    out.print(f"{experiment.name}: {experiment.description}\n")
    out.print(screen.plan_table(union, tasks, config))
    out.print(f"\n{screen.plan_summary(union, planning.totals(tasks), _at_once(config))}")


def _run(experiment: ExperimentConfig, union: Union, store: Store, config: AblationConfig) -> None:
    """Data, then what several variants grow from, then variants and controls; and what they say."""
    out, cluster = console(), experiment.cluster
    tasks = planning.tasks(union, store, cluster.flops_per_s)
    out.print(f"{experiment.name}: {experiment.description}\n")
    out.print(f"{screen.plan_summary(union, planning.totals(tasks), _at_once(config))}\n")
    runner.run(planning.data_stages(tasks), store, cluster, [])
    first = planning.sources(tasks)
    told = screen.Progress(out, [*first, *tasks])
    failures = trials.run(first, store, cluster, config.trial_cpus, early_stopping=False, told=told)
    if config.scheduler == "asha":  # which controls are not subject to
        variants = [task for task in tasks if task.leaf.control is None]
        failures |= trials.run(variants, store, cluster, config.trial_cpus, early_stopping=True, told=told)
        tasks = [task for task in tasks if task.leaf.control is not None]
    failures |= trials.run(tasks, store, cluster, config.trial_cpus, early_stopping=False, told=told)
    results = collect(union, store, config)
    path = store.root / "ablations" / f"{experiment.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(summary(results, config), indent=1))
    out.print()
    screen.show_results(out, results, config)
    for failure in failures.values():
        out.print(f"failed: {failure.message} ({os.path.relpath(failure.log)})", style="red", soft_wrap=True)


def _at_once(config: AblationConfig) -> int:
    return max(1, (os.cpu_count() or 1) // config.trial_cpus)


def _experiment(values: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment in a composed ablation."""
    return {key: value for key, value in values.items() if key not in (*OWN_KEYS, "ablation")}


def _parse(values: Mapping[str, Any]) -> AblationConfig:
    try:
        return AblationConfig.model_validate(values)
    except ValidationError as error:
        raise first_problem(error, AblationConfig, values, "ablation") from None
