"""What stages cost, as rows of a table: their own part, and with everything that they were made from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aquilamoe.ancestors import ancestors
from aquilamoe.config.external import Before
from aquilamoe.config.schema import ClusterConfig
from aquilamoe.format import ABSENT, duration, energy, money, power, stated
from aquilamoe.pipeline import cost as costing
from aquilamoe.pipeline import figures
from aquilamoe.pipeline.cost import Cost
from aquilamoe.pipeline.figures import Record
from aquilamoe.pipeline.plan import Planned, estimated_total
from aquilamoe.pipeline.plan import estimated as estimated_stage

FIGURES = ("FLOPs", "device time", "energy", "money")


@dataclass(frozen=True)
class CostRow:
    """Of one stage.

    Attributes:
        name: of the stage.
        own: what it cost itself.
        lineage: with everything that it was made from; None where stages are added up.
        before: of a line that begins with a checkpoint from elsewhere, what that had cost before, as it is stated.
        is_external: whether the stage is that checkpoint itself.
    """

    name: str
    own: Cost
    lineage: Cost | None
    before: Before | None = None
    is_external: bool = False


@dataclass(frozen=True)
class CostTable:
    """A row a stage, and what they cost together. Columns without a price or a power are omitted."""

    rows: Sequence[CostRow]
    total: CostRow

    @property
    def figures(self) -> tuple[str, ...]:
        """The columns of each half."""
        kept = (True, True, self.total.own.energy_kwh > 0, self.total.own.money > 0)
        return tuple(figure for figure, keep in zip(FIGURES, kept, strict=True) if keep)

    def cells(self, row: CostRow) -> list[str]:
        """The row as text: its name, its own figures, those of its lineage."""
        own, lineage = power(row.own.flops or None), power(row.lineage.flops or None) if row.lineage else ABSENT
        if row.before is not None:
            behind = stated(row.before.flops, power)
            own, lineage = (behind, behind) if row.is_external else (own, _sum(behind, lineage))
        return [row.name, *self._half(row.own, own), *self._half(row.lineage, lineage)]

    def _half(self, cost: Cost | None, flops: str) -> list[str]:
        if cost is None:
            return [ABSENT for _ in self.figures]
        texts = {
            "FLOPs": flops,
            "device time": duration(round(cost.device_seconds, 1) or None),
            "energy": energy(cost.energy_kwh),
            "money": money(cost.money),
        }
        return [texts[figure] for figure in self.figures]


def spent(records: Mapping[str, Record]) -> CostTable:
    """What finished stages cost; an output with two names was paid once."""
    known = {name: {"fingerprint": name, **record} for name, record in records.items()}
    rows = [
        CostRow(
            name,
            costing.own(each),
            costing.lineage(each, known.values()),
            first_statement(figures.before(records[of]) for of in [name, *_made_from(name, records)]),
            figures.before(each) is not None and not each.get("inputs"),
        )
        for name, each in known.items()
    ]
    return CostTable(rows, CostRow("pipeline", costing.total(known.values()), None))


def estimated(plan: Sequence[Planned], cluster: ClusterConfig) -> CostTable:
    """What a plan will have cost: cached stages what they did cost, the others what is expected of them."""
    by_name = {planned.name: planned for planned in plan}
    rows = [
        CostRow(
            planned.name,
            estimated_stage(planned, cluster),
            estimated_total(_with_ancestors(planned, by_name), cluster),
            first_statement(each.node.before for each in _with_ancestors(planned, by_name)),
            planned.node.is_external,
        )
        for planned in plan
    ]
    return CostTable(rows, CostRow("pipeline", estimated_total(plan, cluster), None))


def _sum(behind: str, here: str) -> str:
    """What was spent before, and what was spent here: `unknown + 1.3e13`."""
    return behind if here == ABSENT else f"{behind} + {here}"


def first_statement(statements: Iterable[Before | None]) -> Before | None:
    """Of a stage and its ancestors, the first statement."""
    return next((each for each in statements if each is not None), None)


def _made_from(name: str, records: Mapping[str, Record]) -> list[str]:
    return ancestors(name, lambda of: [each for each in figures.input_stages(records[of]).values() if each in records])


def _with_ancestors(planned: Planned, by_name: Mapping[str, Planned]) -> list[Planned]:
    names = ancestors(planned.name, lambda name: by_name[name].node.stage.inputs.values())
    return [planned, *(by_name[name] for name in names)]
