"""Stages as rows of a table: shared by the pages and the terminal, quick to import."""

from collections.abc import Mapping
from dataclasses import dataclass

from aquilamoe.config.growth import GROWTH_KINDS
from aquilamoe.format import ABSENT, count, decimal, power, seconds, stated
from aquilamoe.pipeline.figures import Record, before, input_stages, metric, number

NOT_REACHED = "not reached"
HEADER = (
    "stage",
    "parameters",
    "active",
    "tokens",
    "FLOPs",
    "loss start",
    "loss end",
    "recovery tokens",
    "seconds",
    "tokens/s",
    "status",
)


@dataclass(frozen=True, kw_only=True)
class StageRow:
    """One stage; None is what it does not have.

    Losses are held-out nats/token, all by the validation of training, on the same tokens: a growth begins where its
    source ended, and ends where the training after it begins. What its certificate measured is in the certificate.
    """

    stage: str
    kind: str
    status: str
    params_total: float | None
    params_active: float | None
    tokens: float | None
    flops: float | None
    loss_start: float | None
    loss_end: float | None
    recovers: bool  # continues a checkpoint that was just grown, so that recovery has a meaning
    recovery_tokens: float | None
    seconds: float | None
    tokens_per_s: float | None
    is_external: bool = False  # a checkpoint from elsewhere: tokens and flops are as stated, None is unknown

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, in the order of `HEADER`."""
        return (
            self.stage,
            count(self.params_total),
            count(self.params_active),
            stated(self.tokens, count) if self.is_external else count(self.tokens),
            stated(self.flops, power) if self.is_external else power(self.flops),
            decimal(self.loss_start, 2),
            decimal(self.loss_end, 2),
            self.recovery(),
            seconds(self.seconds),
            count(self.tokens_per_s),
            self.status or ABSENT,
        )

    def recovery(self) -> str:
        """Tokens until the source's final loss was reached again."""
        if not self.recovers:
            return ABSENT
        return NOT_REACHED if self.recovery_tokens is None else count(self.recovery_tokens)


def stage_rows(records: Mapping[str, Record], status: Mapping[str, str] | None = None) -> list[StageRow]:
    """Return one row a stage, in the order of `records` (stage name -> record.json).

    `status` shows how each stage came to be in this run, e.g. `cached` or `run`. Whatever a record lacks is None.
    """
    return [_row(name, record, records, (status or {}).get(name, "")) for name, record in records.items()]


def _row(name: str, record: Record, records: Mapping[str, Record], status: str) -> StageRow:
    kind = str(record.get("kind", ""))
    grows, trains = kind in GROWTH_KINDS, kind == "pretrain"
    stated_of = before(record) if not record.get("inputs") else None
    return StageRow(
        stage=name,
        kind=kind,
        status=status,
        params_total=metric(record, "params_total"),
        params_active=metric(record, "params_active"),
        # A growth's `tokens` are those of its certificate: nothing was trained on them.
        tokens=metric(record, "tokens") if trains else stated_of.tokens if stated_of else None,
        flops=metric(record, "flops") if trains else stated_of.flops if stated_of else None,
        loss_start=metric(record, "source_final_loss" if grows else "loss_start"),
        loss_end=_loss_after(name, records) if grows else metric(record, "loss_end"),
        recovers=trains and _continues_growth(record, records),
        recovery_tokens=metric(record, "recovery_tokens"),
        seconds=number(record.get("seconds")),
        tokens_per_s=metric(record, "tokens_per_s") if trains else None,
        is_external=stated_of is not None,
    )


def _loss_after(growth: str, records: Mapping[str, Record]) -> float | None:
    """The held-out loss of a growth's result: the first validation of the training that continues it."""
    continued = (record for record in records.values() if input_stages(record).get("source") == growth)
    return next((metric(record, "loss_start") for record in continued if record.get("kind") == "pretrain"), None)


def _continues_growth(record: Record, records: Mapping[str, Record]) -> bool:
    source = input_stages(record).get("source", "")
    if source not in records:
        return metric(record, "recovery_tokens") is not None
    return records[source].get("kind") in GROWTH_KINDS
