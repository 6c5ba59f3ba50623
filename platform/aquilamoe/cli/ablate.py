"""What the actions of `workflows/ablations.py` do."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aquilamoe.ablation import plan as planning
from aquilamoe.ablation import trials
from aquilamoe.ablation.results import check_objective, collect
from aquilamoe.ablation.study import SUMMARY, Study
from aquilamoe.ablation.study import text as study_text
from aquilamoe.ablation.study_graph import StudyGraph, build
from aquilamoe.ablation.trial import Failure, Stopping
from aquilamoe.ablation.variants import Compose
from aquilamoe.cli import ablation_costs, ablation_view, advise, documents, preflight
from aquilamoe.cli.console import console
from aquilamoe.cli.tables import cost_table
from aquilamoe.config import graph
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.messages import UserError, first_problem
from aquilamoe.config.schema import ClusterConfig, ExperimentConfig
from aquilamoe.estimates.duration import StageSpeed
from aquilamoe.files import write_atomically
from aquilamoe.pipeline import runner
from aquilamoe.pipeline.store import Store
from aquilamoe.process import temporary
from aquilamoe.reports import comparison
from aquilamoe.tracking import studies
from aquilamoe.tracking.queries import LOCAL_MLFLOW, comparison_url, ui_command
from aquilamoe.tracking.study_results import compared
from aquilamoe.tracking.view import PARAMETERS

OWN_KEYS = ("seeds", "scheduler", "trial_cpus")  # beside `ablation`, for short commands


def execute(values: Mapping[str, Any], known: list[str], compose: Compose, command: str, shipped: Path) -> None:
    """Validate a composed ablation and do its action; UserError for anything that the user can repair.

    known: the ablations there are. compose: how a variant's experiment comes to be. command: what the user typed.
    shipped: the folder of the studies that come with the platform.
    """
    if values["action"] == "advise":
        advise.run(values, _experiment(values), shipped)
        return
    if not isinstance(values.get("ablation"), dict):
        raise UserError(f"ablation: none selected; choose one with +ablation=NAME (valid: {', '.join(known)})")
    config = _parse({**values["ablation"], **{key: values[key] for key in OWN_KEYS}})
    experiment = graph.parse(_experiment(values))
    union = build(config, lambda overrides, seeds: [_experiment(each) for each in compose(overrides, seeds)])
    check_objective(config, experiment)
    if config.scheduler == "asha" and experiment.cluster.executor != "ray":
        raise UserError("scheduler: asha compares trials that run at once, which needs Ray; use cluster=local, or none")
    store = Store.of(experiment.paths)
    if experiment.as_json:
        _print_document(experiment, union, store, lambda: collect(union, store, config, experiment, command))
    elif experiment.action == "plan":
        _show_plan(experiment, union, store, config)
    elif experiment.action == "status":
        _show_status(experiment, store, collect(union, store, config, experiment, command))
    else:
        if refused := preflight.refused_layouts(union.nodes.values(), experiment.cluster):
            raise UserError(*refused)
        temporary.use(short=experiment.cluster.executor == "ray", keep_compiled=experiment.cluster.compile)
        with store.lock():
            failures = _run(experiment, union, store, config)
            _show(experiment, store, collect(union, store, config, experiment, command), failures)


def _print_document(experiment: ExperimentConfig, union: StudyGraph, store: Store, study: Callable[[], Study]) -> None:
    """Print the plan, or the results so far as `summary.json` holds them, as JSON."""
    if experiment.action == "plan":
        tasks = planning.tasks(union, store, StageSpeed(experiment.cluster))
        print(documents.text(ablation_view.plan_document(experiment.name, union, tasks)))
    elif experiment.action == "status":
        document = json.loads(study_text(study()))
        print(documents.text({"action": "status", "running": store.holder(), "study": document}))
    else:
        raise UserError(f"json: action={experiment.action} has no JSON document; these have: plan, status, advise")


def _show_plan(experiment: ExperimentConfig, union: StudyGraph, store: Store, config: AblationConfig) -> None:
    cluster = experiment.cluster
    tasks = planning.tasks(union, store, StageSpeed(cluster))
    out = console()
    out.print(f"{experiment.name}: {experiment.description}\n")
    out.print(ablation_view.plan_table(union, tasks, config))
    out.print(f"\n{ablation_view.plan_summary(union, planning.totals(tasks), _at_once(cluster, config))}\n")
    out.print(cost_table(ablation_costs.table(union, tasks, cluster), out.width))
    for line in preflight.refused_layouts(union.nodes.values(), cluster):
        out.print(f"\na run would stop: {line}", style="yellow", soft_wrap=True)


def _show_status(experiment: ExperimentConfig, store: Store, study: Study) -> None:
    """The results so far, while it runs too."""
    out = console()
    holder = store.holder()
    page = folder_of(experiment, store) / comparison.PAGE
    leaves = [entry for entry in study.entries for _ in (*entry.seeds, *entry.missing)]
    done = sum(len(entry.seeds) for entry in study.entries)
    state = f"running, {holder}" if holder else "not running"
    out.print(f"{experiment.name}: {state}; {done} of {len(leaves)} results are there\n", soft_wrap=True)
    ablation_view.show_results(out, study)
    if page.exists():
        out.print(f"\nreport  {os.path.relpath(page)}", soft_wrap=True)


def _show(experiment: ExperimentConfig, store: Store, study: Study, failures: Mapping[str, Failure]) -> None:
    """Show what was found, and write it: the summary, and from this alone the page and its figures."""
    out, folder = console(), folder_of(experiment, store)
    page = _written(study, folder)
    ablation_view.show_results(out, study)
    for failure in failures.values():
        out.print(f"failed: {failure.message} ({os.path.relpath(failure.log)})", style="red", soft_wrap=True)
    out.print(f"\nreport   {os.path.relpath(page)}   (open it in a browser)", soft_wrap=True)
    out.print(f"figures  {os.path.relpath(folder / comparison.FIGURES)}", soft_wrap=True)
    out.print(f"numbers  {os.path.relpath(folder / SUMMARY)}", soft_wrap=True)
    if experiment.tracking.enabled:
        _track(experiment, store, study, folder)


def _track(experiment: ExperimentConfig, store: Store, study: Study, folder: Path) -> None:
    """Send the study to MLflow, and print where to look at it."""
    out, uri = console(), experiment.tracking.uri
    receipt = studies.publish(uri, store.root, compared(study, folder))
    out.print(f"MLflow   {ui_command(uri, store.root)}", soft_wrap=True)
    if receipt.experiment_id is not None:
        server = uri if uri is not None and uri.startswith("http") else LOCAL_MLFLOW
        out.print(f"         curves: {comparison_url(server, receipt.experiment_id)}", soft_wrap=True)
        out.print(f"         parameters: {comparison_url(server, receipt.experiment_id, PARAMETERS)}", soft_wrap=True)
    for note in receipt.notes:
        out.print(note, style="yellow", soft_wrap=True)


def folder_of(experiment: ExperimentConfig, store: Store) -> Path:
    """Where an ablation's summary, page and figures are."""
    return store.root / "ablations" / experiment.name


def _written(study: Study, folder: Path) -> Path:
    """The page, rebuilt only for other numbers: drawing takes seconds."""
    summary = folder / SUMMARY
    page = folder / comparison.PAGE
    text = study_text(study)
    if not page.exists() or not summary.exists() or summary.read_text(encoding="utf-8") != text:
        comparison.write(study, folder)
        write_atomically(summary, text)
    return page


def _run(experiment: ExperimentConfig, union: StudyGraph, store: Store, config: AblationConfig) -> dict[str, Failure]:
    """Data, then what several variants grow from, then variants and controls; what failed, by task."""
    out, cluster = console(), experiment.cluster
    tasks = planning.tasks(union, store, StageSpeed(cluster))
    out.print(f"{experiment.name}: {experiment.description}\n")
    out.print(f"{ablation_view.plan_summary(union, planning.totals(tasks), _at_once(cluster, config))}\n")
    runner.run(planning.data_stages(tasks), store, cluster, [])
    first = planning.sources(tasks)
    receipt = ablation_view.TrialLines(out, [*first, *tasks])
    failures = trials.run(first, store, cluster, config.trial_cpus, on_end=receipt)
    tasks, lost = trials.without_source(tasks, first, failures, receipt)
    if config.scheduler == "asha":  # which controls are not subject to
        variants = [task for task in tasks if task.leaf.control is None]
        stopping = Stopping(by_recovery=config.objective.is_recovery)
        failures |= trials.run(variants, store, cluster, config.trial_cpus, on_end=receipt, stopping=stopping)
        tasks = [task for task in tasks if task.leaf.control is not None]
    failures |= lost | trials.run(tasks, store, cluster, config.trial_cpus, on_end=receipt)
    paid = planning.tasks(union, store, StageSpeed(cluster))
    out.print()
    out.print(cost_table(ablation_costs.table(union, paid, cluster), out.width))
    out.print()
    return failures


def _at_once(cluster: ClusterConfig, config: AblationConfig) -> int:
    """Trials that run side by side, as far as this is known before a cluster is queried."""
    each = config.trial_cpus if cluster.workers == 1 else cluster.workers * cluster.cpus_per_worker
    return max(1, (os.cpu_count() or 1) // each) if cluster.executor == "ray" else 1


def _experiment(values: Mapping[str, Any]) -> dict[str, Any]:
    """The experiment in a composed ablation."""
    return {key: value for key, value in values.items() if key not in (*OWN_KEYS, *advise.KEYS, "ablation")}


def _parse(values: Mapping[str, Any]) -> AblationConfig:
    try:
        return AblationConfig.model_validate(values)
    except ValidationError as error:
        raise first_problem(error, AblationConfig, values, "ablation") from None
