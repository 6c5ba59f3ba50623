"""The contents of a record, as numbers that are finite and names of stages."""

import math
from collections.abc import Mapping
from typing import Any

from aquilamoe.config.external import Before

Record = Mapping[str, Any]


def input_stages(record: Record) -> dict[str, str]:
    """Return the stage behind each input of a record, by role."""
    inputs = record.get("inputs") or {}
    return {str(role): str(source.get("stage", "")) for role, source in inputs.items()}


def before(record: Record) -> Before | None:
    """What was spent on the checkpoint from elsewhere that a line begins with; None of lines that begin here."""
    metrics = record.get("metrics") or {}
    if "before_tokens" not in metrics:
        return None
    tokens = metric(record, "before_tokens")
    return Before(None if tokens is None else int(tokens), metric(record, "before_flops"))


def metric(record: Record, name: str) -> float | None:
    """Return a metric that is a finite number, else None."""
    return number((record.get("metrics") or {}).get(name))


def number(value: object) -> float | None:
    """Return `value` if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
