"""What the terminal shows of an ablation."""

from collections.abc import Sequence

from rich.table import Table

from aquilamoe.ablation.plan import Task, Totals, by_variant
from aquilamoe.ablation.union import Leaf, Union
from aquilamoe.config.ablation import AblationConfig
from aquilamoe.reports import rows
from aquilamoe.reports.rows import duration, size
from aquilamoe.terminal.tables import make_table


def plan_table(union: Union, tasks: Sequence[Task], config: AblationConfig) -> Table:
    """A row a variant and a kind of control: what one seed of it trains, and how many seeds are there already."""
    done = {task.leaf.fingerprint for task in tasks if task.is_done}
    table = make_table("", *config.axes, ">parameters", ">tokens", ">FLOPs", ">with ancestors", ">seeds there")
    for variant, leaves in by_variant(union):
        _row(table, "variant", [variant.values[axis] for axis in config.axes], leaves, done)
    table.add_section()
    for title, leaves in _controls(union).items():
        _row(table, "control", [title, *[""] * (len(config.axes) - 1)], leaves, done)
    return table


def _controls(union: Union) -> dict[str, list[Leaf]]:
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
        rows.count(node.model.num_params),
        rows.count(node.tokens),
        rows.power(node.flops),
        rows.power(node.lineage_flops),
        f"{there} of {len(leaves)}",
    )


def plan_summary(union: Union, totals: Totals, concurrency: int) -> str:
    """The sums: what running it costs, and what it would without sharing."""
    return (
        f"{len(union.nodes)} stages, {totals.cached} of them there; left: {rows.power(totals.flops)} FLOPs, "
        f"{size(totals.disk_bytes)}, about {duration(totals.seconds / concurrency)} with {concurrency} at a time\n"
        f"shared ancestors run once: {rows.power(union.flops)} FLOPs in all, {union.flops / union.naive_flops:.2f} of "
        f"the {rows.power(union.naive_flops)} of an experiment for every variant and seed"
    )
