"""What the actions of `workflows/ablations.py` do."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aquilamoe.ablation import plan as planning
from aquilamoe.ablation import screen
from aquilamoe.ablation.union import build
from aquilamoe.ablation.variants import Compose
from aquilamoe.config import graph
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.messages import UserError, first_problem
from aquilamoe.pipeline.store import Store
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
    store = Store(Path(experiment.paths.root).absolute())
    tasks = planning.tasks(union, store, experiment.cluster.flops_per_s)
    out = console()
    out.print(f"{experiment.name}: {experiment.description}\n")
    out.print(screen.plan_table(union, tasks, config))
    concurrency = max(1, (os.cpu_count() or 1) // config.trial_cpus)
    out.print(f"\n{screen.plan_summary(union, planning.totals(tasks), concurrency)}")


def _experiment(values: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment in a composed ablation."""
    return {key: value for key, value in values.items() if key not in (*OWN_KEYS, "ablation")}


def _parse(values: Mapping[str, Any]) -> AblationConfig:
    try:
        return AblationConfig.model_validate(values)
    except ValidationError as error:
        raise first_problem(error, AblationConfig, values, "ablation") from None
