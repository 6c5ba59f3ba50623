"""The contents of a record, as numbers that are finite and names of stages."""

import math
from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


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
