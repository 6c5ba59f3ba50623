"""Stages as rows of a table, and how numbers are written: shared by the page and the terminal, quick to import."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aquilamoe import format as formats

Record = Mapping[str, Any]

GROWTH_KINDS = ("scale_up", "scale_out")
ABSENT = "-"
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


@dataclass(frozen=True)
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

    def cells(self) -> tuple[str, ...]:
        """Return the row as text, in the order of `HEADER`."""
        return (
            self.stage,
            count(self.params_total),
            count(self.params_active),
            count(self.tokens),
            power(self.flops),
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

    `status` says how each stage came to be in this run, e.g. `cached` or `run`. Whatever a record lacks is None.
    """
    return [_row(name, record, records, (status or {}).get(name, "")) for name, record in records.items()]


def _row(name: str, record: Record, records: Mapping[str, Record], status: str) -> StageRow:
    kind = str(record.get("kind", ""))
    grows, trains = kind in GROWTH_KINDS, kind == "pretrain"
    return StageRow(
        stage=name,
        kind=kind,
        status=status,
        params_total=metric(record, "params_total"),
        params_active=metric(record, "params_active"),
        # A growth's `tokens` are those of its certificate: nothing was trained on them.
        tokens=metric(record, "tokens") if trains else None,
        flops=metric(record, "flops") if trains else None,
        loss_start=metric(record, "source_final_loss" if grows else "loss_start"),
        loss_end=_loss_after(name, records) if grows else metric(record, "loss_end"),
        recovers=trains and _continues_growth(record, records),
        recovery_tokens=metric(record, "recovery_tokens"),
        seconds=number(record.get("seconds")),
        tokens_per_s=metric(record, "tokens_per_s") if trains else None,
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


def input_stages(record: Record) -> dict[str, str]:
    """Return the stage behind each input of a record, by role."""
    inputs = record.get("inputs") or {}
    return {str(role): str(source.get("stage", "")) for role, source in inputs.items()}


def metric(record: Record, name: str) -> float | None:
    """Return a metric that is a finite number, else None."""
    return number((record.get("metrics") or {}).get(name))


def number(value: object) -> float | None:
    """Return `value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def count(value: float | None) -> str:
    """Write a count with three significant digits and its thousands: 812, 699k, 2.12M, 104B."""
    if value is None:
        return ABSENT
    size = float(value)
    for unit in ("", "k", "M", "B"):
        if float(f"{size:.3g}") < 1000:
            return f"{float(f'{size:.3g}'):g}{unit}"
        size /= 1000
    return f"{size:.3g}T" if size < 1000 else power(value)


def power(value: float | None) -> str:
    """Write a large number with three significant digits and its power of ten: 1.3e13."""
    if value is None:
        return ABSENT
    mantissa, exponent = f"{value:.2e}".split("e")
    return "0" if value == 0 else f"{float(mantissa):g}e{int(exponent)}"


def decimal(value: float | None, places: int) -> str:
    """Write a loss or a ratio with a fixed number of places."""
    return ABSENT if value is None else f"{value:.{places}f}"


def seconds(value: float | None) -> str:
    """Write seconds: a tenth below ten, whole ones above."""
    if value is None:
        return ABSENT
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def size(count: int) -> str:
    """Bytes with a unit: 8.5 MB."""
    return formats.size(count) if count else ABSENT


def duration(seconds: float | None) -> str:
    """Seconds as a reader says them: 0.3 s, 4 s, 3 min, 5.2 h, 12 days."""
    if seconds is None:
        return ABSENT
    if 0 < seconds < 1:
        return f"{max(seconds, 0.1):.1f} s"
    for limit, unit, name in ((100, 1, "s"), (6000, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 86_400:,.0f} days"


def energy(kwh: float | None) -> str:
    """Energy with a unit: 1.9 Wh, 12 kWh, 3.4 GWh."""
    if not kwh:
        return ABSENT
    value = kwh * 1000
    for unit in ("Wh", "kWh", "MWh", "GWh"):
        if value < 1000 or unit == "GWh":
            return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
        value /= 1000
    raise AssertionError


def money(value: float | None) -> str:
    """An amount in whatever currency the price is in: 0.012, 3.40, 1,250."""
    if not value:
        return ABSENT
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 1 else f"{value:.2g}"
