"""What `action=run`, `plan`, `status` and the queries about lineage do with a validated experiment."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aquilamoe import format
from aquilamoe.cli import capacity, console, documents, live, preflight, tables, watch
from aquilamoe.cli import evaluate as evaluation
from aquilamoe.cli import lineage as lineage
from aquilamoe.config import graph
from aquilamoe.config.graph import Node
from aquilamoe.config.messages import UserError
from aquilamoe.config.passwords import masked
from aquilamoe.config.paths import shown
from aquilamoe.config.schema import ExperimentConfig, PretrainStage
from aquilamoe.estimates.dry_run_graph import shrunk
from aquilamoe.estimates.duration import StageSpeed
from aquilamoe.files import write_atomically
from aquilamoe.lineage.artifacts import Artifact
from aquilamoe.lineage.expected import expected_stages
from aquilamoe.lineage.graph import ArtifactGraph, read_graph
from aquilamoe.lineage.unused import Unused, remove, unused
from aquilamoe.pipeline import plan as planning
from aquilamoe.pipeline import runner
from aquilamoe.pipeline.plan import Planned
from aquilamoe.pipeline.stage import Input
from aquilamoe.pipeline.store import Store
from aquilamoe.process import errors, temporary
from aquilamoe.reports import conclusion, costs
from aquilamoe.tracking.observer import Tracker
from aquilamoe.tracking.queries import LOCAL_MLFLOW, comparison_url, ui_command
from aquilamoe.training.ray.environment import WORKER_ENVIRONMENT
from aquilamoe.training.ray.launch import workers_for


def execute(values: Mapping[str, Any], command: str) -> None:
    """Validate a composed configuration and do its action; UserError for anything that the user can repair.

    command: what the user typed, for the report's line on how to reproduce it.
    """
    experiment = graph.parse(values)
    nodes = graph.until(graph.build(experiment), experiment.until)
    store = Store.of(experiment.paths)
    if experiment.as_json and experiment.action not in documents.ACTIONS:
        raise UserError(
            f"json: action={experiment.action} has no JSON document; these have: {', '.join(documents.ACTIONS)}"
        )
    if experiment.action == "list":
        _list(experiment, store)
        return
    if experiment.action == "stop":
        console.console().print(watch.stop(store), soft_wrap=True)
        return
    if experiment.action == "clean":
        _clean(experiment, graph.build(experiment), store)
        return
    if experiment.action in lineage.ACTIONS:
        _query_lineage(experiment, nodes, store)
        return
    if experiment.action in evaluation.ACTIONS:
        _examine(experiment, nodes, store)
        return
    if experiment.action == "dryrun":
        _rehearse(values, experiment, nodes)
        return
    cluster = experiment.cluster
    plan = planning.make(nodes, store, StageSpeed(cluster), cluster)
    if experiment.action == "plan":
        _show_plan(experiment, plan, store)
    elif experiment.action == "status":
        _show_status(experiment, plan, store)
    elif experiment.action == "report":
        _write_report(experiment, plan, store, command)
    else:
        preflight.check(experiment, plan, store.root)
        with _held(store, plan) as is_writable:
            # Planned again under the lock: what another run has finished meanwhile is cached now.
            plan = planning.make(nodes, store, StageSpeed(cluster), cluster)
            with watch.announced(store, experiment.name, plan) if is_writable else nullcontext():
                _run(experiment, plan, store, command)


def _list(experiment: ExperimentConfig, store: Store) -> None:
    """All outputs of the store, whichever experiment they are of."""
    library = read_graph(store.stages)
    out = console.console()
    if experiment.as_json:
        print(documents.text(documents.outputs(library)))
        return
    out.print(tables.output_table(library.newest_first(), out.width))
    for reason in library.damaged.values():
        out.print(f"damaged: {reason}", style="yellow", soft_wrap=True)
    out.print(f"\n{len(library.entries)} outputs in {shown(store.stages)}")


def _clean(experiment: ExperimentConfig, nodes: Mapping[str, Node], store: Store) -> None:
    """List what nothing in the store needs any more; remove it if the user has confirmed."""
    with store.lock() if experiment.confirm else nullcontext():
        planned = {stage.fingerprint for stage in expected_stages(nodes).values()}
        found = unused(store, read_graph(store.stages), planned)
        if experiment.as_json:
            print(documents.text(documents.unused(found, experiment.confirm)))
        else:
            _show_unused(experiment, found, store)
        if experiment.confirm:
            for each in found:
                remove(each)


def _show_unused(experiment: ExperimentConfig, outputs: Sequence[Unused], store: Store) -> None:
    out = console.console()
    if not outputs:
        out.print(f"Everything in {shown(store.stages)} is needed by a report, an ablation or this experiment.")
        return
    out.print(tables.unused_table(outputs, out.width))
    if experiment.confirm:
        out.print(f"\nRemoving these {len(outputs)} directories of {shown(store.stages)}.", soft_wrap=True)
    else:
        out.print(
            f"\nNothing was removed. To remove these {len(outputs)} directories of {shown(store.stages)}, "
            "repeat the command with confirm=true.",
            soft_wrap=True,
        )


def _write_report(experiment: ExperimentConfig, plan: Sequence[Planned], store: Store, command: str) -> None:
    """Write the report of finished stages again, without running anything."""
    done = {
        planned.name: Input(planned.name, planned.directory, planned.record)
        for planned in plan
        if planned.state == "cached" and planned.record is not None
    }
    missing = [planned.name for planned in plan if planned.name not in done]
    if missing:
        raise UserError(
            f"report: {', '.join(missing)} of experiment {experiment.name} {'has' if len(missing) == 1 else 'have'} no "
            "output yet; run them first (action=status shows what is complete)"
        )
    console.console().print(f"report  {shown(_report(experiment, done, store, command))}", soft_wrap=True)


@contextmanager
def _held(store: Store, plan: Sequence[Planned]) -> Iterator[bool]:
    """Hold the store's lock; yield whether it could be written: a run that finds all complete needs only to read."""
    with ExitStack() as stack:
        try:
            with errors.at(store.root):
                stack.enter_context(store.lock())
            is_writable = True
        except OSError as error:
            if error.errno not in errors.READ_ONLY or any(planned.is_computed for planned in plan):
                raise
            is_writable = False
        yield is_writable


def _query_lineage(experiment: ExperimentConfig, nodes: Mapping[str, Node], store: Store) -> None:
    """Answer a query about outputs; a rebuild runs stages as any run does, in a store of its own, untracked."""
    out = console.console()

    def run(plan: Sequence[Planned], scratch: Store) -> dict[str, Input]:
        preflight.check(experiment, plan, scratch.root)
        _set_environment(experiment)
        view = live.LiveView(out, experiment.name, plan)
        with _workers(experiment, plan, scratch):
            return runner.run(plan, scratch, experiment.cluster, [view])

    lineage.run_query(
        experiment,
        nodes,
        store,
        print_line=lambda line: out.print(line, soft_wrap=True),
        run=run,
        as_json=_lineage_text,
    )


def _lineage_text(library: ArtifactGraph, entry: Artifact) -> str:
    return documents.text(documents.lineage(library, entry))


def _examine(experiment: ExperimentConfig, nodes: Mapping[str, Node], store: Store) -> None:
    """Let a checkpoint write, or evaluate it on tasks."""
    _set_environment(experiment)
    out = console.console()
    if experiment.action == "generate":
        evaluation.generate(experiment, nodes, store, lambda line: out.print(line, soft_wrap=True))
        return
    label, found, path = evaluation.evaluate(experiment, nodes, store)
    out.print(f"{label}\n")
    out.print(tables.task_table(found))
    out.print(f"\nresults  {shown(path)}")


def _rehearse(values: Mapping[str, Any], experiment: ExperimentConfig, nodes: Mapping[str, Node]) -> None:
    """Check every tensor at full size without values, then run the graph small; nothing is left of it."""
    _set_environment(experiment)
    from aquilamoe.estimates.dry_run_shapes import check_growth, check_model

    out, started = console.console(), time.monotonic()
    out.print(f"{experiment.name}: {experiment.description}\n")
    if refused := preflight.refused_layouts(nodes.values(), experiment.cluster):
        raise UserError(*refused)
    for node in nodes.values():
        planning.estimate(node)  # its checks apply here, too
        if node.model is not None and node.stage.kind != "export":
            counts = f"{check_model(node):,} tensors, {node.model.num_params:,} parameters"
            if node.source_model is not None and node.model != node.source_model:
                counts += f"; the growth makes all {check_growth(node):,} tensors in their shapes"
            out.print(f"{node.name}: {counts}", soft_wrap=True)
    with TemporaryDirectory(prefix=f"{experiment.name}-dryrun-") as scratch:
        small, width = shrunk(values, Path(scratch))
        rehearsed, store = graph.parse(small), Store(Path(scratch))
        plan = planning.make(graph.build(rehearsed), store, StageSpeed(rehearsed.cluster))
        out.print(f"\nThe graph with widths divided by {width}, a batch for every stage, and invented text:")
        done = runner.run(plan, store, rehearsed.cluster, [live.LiveView(out, rehearsed.name, plan)])
    out.print(f"\nAll {len(done)} stages ran, in {format.duration(time.monotonic() - started)}; nothing of it is kept.")


def _show_plan(experiment: ExperimentConfig, plan: Sequence[Planned], store: Store) -> None:
    if experiment.as_json:
        print(documents.text(documents.pipeline(experiment, plan, costs.estimated(plan, experiment.cluster))))
        return
    out = console.console()
    out.print(f"{experiment.name}: {experiment.description}\n")
    out.print(tables.plan_table(plan, out.width))
    out.print()
    out.print(tables.cost_table(costs.estimated(plan, experiment.cluster), out.width))
    capacity.show(out, experiment.cluster, plan)
    refused = preflight.refused_layouts((planned.node for planned in plan), experiment.cluster)
    for line in [*refused, *preflight.missing_files(plan)]:
        out.print(f"\na run would stop: {line}", style="yellow", soft_wrap=True)
    for line in preflight.warnings(plan):
        out.print(f"\nwarning: {line}", style="yellow", soft_wrap=True)
    out.print(f"\nOutputs go to {shown(store.root)}; nothing was started.")


def _show_status(experiment: ExperimentConfig, plan: Sequence[Planned], store: Store) -> None:
    if experiment.as_json:
        records = {planned.name: planned.record for planned in plan if planned.record is not None}
        found = documents.pipeline(experiment, plan, costs.spent(records))
        print(documents.text(found | {"running": store.holder()}))
        return
    out = console.console()
    holder, running = store.holder(), watch.Watched.find(store)
    if running is not None:
        out.print(f"{running.name}: running, {holder}\n")
        (watch.follow if experiment.watch else watch.show)(out, running)
        if experiment.watch or running.name == experiment.name:
            return
        out.print()
        holder = None
    out.print(f"{experiment.name}: {'running, ' + holder if holder else 'not running'}\n")
    records = {planned.name: planned.record for planned in plan if planned.record is not None}
    waiting = [planned for planned in plan if planned.record is None]
    if records:
        out.print(tables.final_table(records, _kept(plan), out.width))
        out.print()
        out.print(tables.cost_table(costs.spent(records), out.width))
        out.print()
    for planned in waiting:
        out.print(f"  {planned.name}: {tables.STATES[planned.state]}, {planned.reason}")
    report = _report_path(experiment, store)
    if report.exists():
        out.print(f"\nreport  {shown(report)}")


def _kept(plan: Sequence[Planned]) -> dict[str, str]:
    """Of outputs that are there: where."""
    return {planned.name: "complete" if planned.state == "cached" else "remote" for planned in plan}


def _run(experiment: ExperimentConfig, plan: Sequence[Planned], store: Store, command: str) -> None:
    _set_environment(experiment)
    out = console.console()
    out.print(f"{experiment.name}: {experiment.description}")
    if hint := preflight.slow_precision(experiment, plan):
        out.print(hint, style="yellow", soft_wrap=True)
    started = time.monotonic()
    progress = live.LiveView(out, experiment.name, plan)
    tracker = Tracker(experiment.tracking.uri, store.root) if experiment.tracking.enabled else None
    resolved = masked(experiment.model_dump(mode="json"))  # stages with what they inherit from groups
    if tracker:
        tracker.pipeline_started(experiment.name, experiment.description, resolved, store.root)
    report = None
    succeeded = False
    warning = None
    unwritten = None
    try:
        with _workers(experiment, plan, store):
            done = runner.run(plan, store, experiment.cluster, [progress, *([tracker] if tracker else [])])
        try:
            report = _report(experiment, done, store, command) if experiment.until is None else None
        except OSError as error:
            if error.errno not in errors.READ_ONLY:
                raise
            unwritten = f"report: not written: {errors.described(error)}"
        succeeded = True
    finally:
        if tracker:
            warning = tracker.pipeline_finished(succeeded, report)
    status = {planned.name: "computed" if planned.is_computed else planned.state for planned in plan}
    out.print()
    records = {name: output.record for name, output in done.items()}
    out.print(tables.final_table(records, status, out.width))
    out.print()
    out.print(tables.cost_table(costs.spent(records), out.width))
    out.print(f"\nDone in {format.duration(time.monotonic() - started)}.")
    if experiment.report.control in records:
        found = conclusion.find(records, experiment.report.chain, experiment.report.control)
        out.print(conclusion.verdict(found), style="bold", soft_wrap=True)
    for line in filter(None, (warning, unwritten)):
        out.print(line, style="yellow", soft_wrap=True)
    _where_to_look(out, experiment, report, store, tracker.experiment_id if tracker else None)


def _workers(experiment: ExperimentConfig, plan: Sequence[Planned], store: Store) -> AbstractContextManager[None]:
    """Workers for the stages that train; none for a run that has everything."""
    clusters = preflight.training_clusters(experiment.cluster, plan)
    return workers_for(list(clusters.values()), store.root, experiment.name)


def _set_environment(experiment: ExperimentConfig) -> None:
    """Before a stage of this process imports torch."""
    cluster, stages = experiment.cluster, experiment.stages.values()
    own = [stage.cluster.get("compile") for stage in stages if isinstance(stage, PretrainStage)]
    temporary.use(short=cluster.executor == "ray", keep_compiled=cluster.compile or any(own))
    for key, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def _report(experiment: ExperimentConfig, done: Mapping[str, Input], store: Store, command: str) -> Path:
    """Write the pages unless they show these very outputs already."""
    path = _report_path(experiment, store)
    made = [f"{output.record['fingerprint']} {output.record['finished']}" for output in done.values()]
    stamp = "\n".join([command, experiment.description, *made])
    marker = path.parent.with_suffix(".stages")
    if path.exists() and marker.exists() and marker.read_text() == stamp:
        return path
    from aquilamoe.reports import report
    from aquilamoe.reports.template import Heading

    report.write(
        Heading(experiment.name, experiment.description, command),
        path.parent,
        done=done,
        chain=experiment.report.chain,
        control=experiment.report.control,
    )
    records = {name: output.record for name, output in done.items()}
    found = conclusion.find(records, experiment.report.chain, experiment.report.control)
    document = documents.summary(experiment, done, costs.spent(records), found, command)
    write_atomically(path.with_name(documents.SUMMARY), documents.text(document) + "\n")
    write_atomically(marker, stamp)
    return path


def _report_path(experiment: ExperimentConfig, store: Store) -> Path:
    return store.root / "reports" / experiment.name / "index.html"


def _where_to_look(
    out: Any, experiment: ExperimentConfig, report: Path | None, store: Store, mlflow_experiment: str | None
) -> None:
    if report is not None:
        out.print(f"\nreport         {shown(report)}   (open it in a browser)")
    if experiment.tracking.enabled:
        out.print(f"MLflow         {ui_command(experiment.tracking.uri, store.root)}", soft_wrap=True)
    if mlflow_experiment:
        uri = experiment.tracking.uri or ""
        server = uri if uri.startswith("http") else LOCAL_MLFLOW
        out.print(f"               curves: {comparison_url(server, mlflow_experiment)}", soft_wrap=True)
    if experiment.cluster.executor == "ray":
        ray = "ray start --head --dashboard-host 127.0.0.1, then run with cluster.address=auto"
        out.print(f"Ray dashboard  http://127.0.0.1:8265 during a run; to keep it open: {ray}", soft_wrap=True)
