"""What an ablation costs, by variant and control: what only they need, and with everything that they were made from."""

from collections import Counter
from collections.abc import Sequence

from aquilamoe.ablation.plan import Task
from aquilamoe.ablation.study_graph import Leaf, StudyGraph
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.pipeline.plan import Planned, estimated_total
from aquilamoe.reports.costs import CostRow, CostTable, first_statement


def table(union: StudyGraph, tasks: Sequence[Task], cluster: ClusterConfig) -> CostTable:
    """A row for all seeds of a variant or control, one for what several of them share, and all together.

    Stages that are there cost what they did cost, the others what is expected of them; every output was paid once.
    """
    planned = {task.leaf.fingerprint: task.stages for task in tasks}
    needs: dict[str, dict[str, Planned]] = {}
    for leaf in sorted(union.leaves, key=lambda leaf: leaf.control is not None):
        line = {stage.fingerprint: stage for stage in planned[leaf.fingerprint]}
        needs.setdefault(_title(leaf), {}).update(line)
    users = Counter(fingerprint for need in needs.values() for fingerprint in need)
    rows = [
        CostRow(
            title,
            estimated_total([stage for stage in need.values() if users[stage.fingerprint] == 1], cluster),
            estimated_total(need.values(), cluster),
            first_statement(stage.node.before for stage in need.values()),
        )
        for title, need in needs.items()
    ]
    everything = {fingerprint: stage for need in needs.values() for fingerprint, stage in need.items()}
    shared = [stage for fingerprint, stage in everything.items() if users[fingerprint] > 1]
    rows.append(CostRow("shared", estimated_total(shared, cluster), None))
    return CostTable(rows, CostRow("ablation", estimated_total(everything.values(), cluster), None))


def _title(leaf: Leaf) -> str:
    return leaf.control.name if leaf.control is not None else leaf.variant.name
