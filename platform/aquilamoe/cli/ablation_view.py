"""What the terminal shows of an ablation."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from aquilamoe import format
from aquilamoe.ablation import plan as planning
from aquilamoe.ablation.conclusions import conclusions
from aquilamoe.ablation.plan import Task, Totals, by_variant
from aquilamoe.ablation.study import Interval, Study
from aquilamoe.ablation.study_graph import Leaf, StudyGraph
from aquilamoe.ablation.trial import Failure, Stopped
from aquilamoe.cli.tables import make_table
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.config.graph import Node
from aquilamoe.format import duration, size_or_absent


def plan_table(union: StudyGraph, tasks: Sequence[Task], config: AblationConfig) -> Table:
    """A row a variant and a kind of control: what one seed of it trains, and how many seeds are there already."""
    done = {task.leaf.fingerprint for task in tasks if task.is_done}
    table = make_table("", *config.axes, ">parameters", ">tokens", ">FLOPs", ">with ancestors", ">seeds there")
    for variant, leaves in by_variant(union):
        _row(table, "variant", [variant.values[axis] for axis in config.axes], leaves, done)
    table.add_section()
    for title, leaves in _controls(union).items():
        _row(table, "control", [title, *[""] * (len(config.axes) - 1)], leaves, done)
    return table


def _controls(union: StudyGraph) -> dict[str, list[Leaf]]:
    """The distinct leaves of every control, by what it is called."""
    found: dict[str, dict[str, Leaf]] = {}
    for leaf in union.leaves:
        if leaf.control is not None:
            found.setdefault(leaf.control.name, {})[leaf.fingerprint] = leaf
    return {name: list(leaves.values()) for name, leaves in found.items()}


def _row(table: Table, kind: str, names: Sequence[str], leaves: Sequence[Leaf], done: set[str]) -> None:
    node = leaves[0].nodes[leaves[0].stage]
    assert node.model is not None
    there = sum(leaf.fingerprint in done for leaf in leaves)
    table.add_row(
        kind,
        *names,
        format.count(node.model.num_params),
        format.count(node.tokens),
        format.power(node.flops),
        _with_ancestors(node),
        f"{there} of {len(leaves)}",
    )


def plan_document(name: str, union: StudyGraph, tasks: Sequence[Task]) -> dict[str, Any]:
    """The plan for programs: every variant and control with its leaf by seed, and the sums of what is left to do."""
    done = {task.leaf.fingerprint for task in tasks if task.is_done}
    totals = planning.totals(tasks)
    return {
        "action": "plan",
        "ablation": name,
        "leaves": [
            {
                "variant": leaf.variant.values,
                "control": leaf.control.name if leaf.control else None,
                "stage": leaf.stage,
                "fingerprint": leaf.fingerprint,
                "parameters": model.num_params if (model := leaf.nodes[leaf.stage].model) else None,
                "tokens": leaf.nodes[leaf.stage].tokens,
                "flops": leaf.nodes[leaf.stage].flops,
                "lineage_flops": leaf.nodes[leaf.stage].lineage_flops,
                "is_done": leaf.fingerprint in done,
            }
            for leaf in union.leaves
        ],
        "stages": len(union.nodes),
        "cached_stages": totals.cached,
        "flops": totals.flops,
        "disk_bytes": totals.disk_bytes,
        "seconds": totals.seconds,
    }


def _with_ancestors(node: Node) -> str:
    """FLOPs of the line; of one that begins with a checkpoint from elsewhere after what is stated of that."""
    here = format.power(node.lineage_flops)
    return here if node.before is None else f"{format.stated(node.before.flops, format.power)} + {here}"


def plan_summary(union: StudyGraph, totals: Totals, concurrency: int) -> str:
    """The sums: what running it costs, and what it would without sharing."""
    return (
        f"{len(union.nodes)} stages, {totals.cached} of them there; left: {format.power(totals.flops)} FLOPs, "
        f"{size_or_absent(totals.disk_bytes)}, about {duration(totals.seconds / concurrency)} with {concurrency} at "
        "a time\n"
        f"shared ancestors run once: {format.power(union.flops)} FLOPs in all, {union.flops / union.naive_flops:.2f} "
        "of "
        f"the {format.power(union.naive_flops)} of an experiment for every variant and seed"
    )


class TrialLines:
    """A line for every trial that ends."""

    def __init__(self, out: Console, tasks: Sequence[Task]) -> None:
        self.out = out
        self.left = {task.name for task in tasks if not task.is_done}
        self.total = len(self.left)

    def __call__(self, task: Task, ending: Failure | Stopped | None) -> None:
        self.left.discard(task.name)
        leaf = task.leaf
        what = leaf.control.name if leaf.control else f"{leaf.variant.name}: {leaf.stage}"
        end = "done"
        if isinstance(ending, Failure):
            end = f"failed: {ending.message}"
        elif ending is not None:
            end = f"stopped early: {ending.loss:.4f} after {format.count(ending.tokens)} tokens"
        place = f"{self.total - len(self.left)} of {self.total}"
        self.out.print(f"{place}  {what}, seed {leaf.seed}  {end}", soft_wrap=True)


def show_results(out: Console, study: Study) -> None:
    """The ranking, and the conclusions from the numbers."""
    if study.ranked():
        out.print(ranking_table(study))
    for sentence in conclusions(study):
        out.print(sentence.text, soft_wrap=True, style="yellow" if sentence.kind == "warning" else None)


def ranking_table(study: Study) -> Table:
    """Ranks, means, and differences to the baseline with their intervals; controls, less the best variant, below."""
    metric = f"{study.objective['stage']} {study.objective['metric']}"
    table = make_table(">rank", "", f">{metric}", ">minus baseline", ">95 % interval", ">seeds")
    for entry in study.ranked():
        _result_row(
            table, str(entry.rank), entry.name, mean=entry.mean, difference=entry.to_baseline, seeds=len(entry.seeds)
        )
    table.add_section()
    controls = [entry for entry in study.controls if entry.mean is not None and entry.control is not None]
    for entry in sorted(controls, key=lambda entry: entry.mean or 0.0):
        assert entry.control is not None
        name = f"{entry.name.partition('_x')[0]} (LR x{entry.control.learning_rate_ratio:g})"
        _result_row(
            table,
            "",
            name,
            mean=entry.mean,
            difference=entry.control.differences.get(study.baseline),
            seeds=len(entry.seeds),
        )
    return table


def _result_row(
    table: Table, rank: str, name: str, *, mean: float | None, difference: Interval | None, seeds: int
) -> None:
    interval = ""
    if difference is not None and difference.half_width:
        low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
        interval = f"{low:+.4f} to {high:+.4f}"
    shown = "" if difference is None else f"{difference.mean:+.4f}"
    table.add_row(rank, name, format.decimal(mean, 4), shown, interval, str(seeds))
