"""How numbers with a unit are written, wherever a person reads them."""

from collections.abc import Callable


def size(num_bytes: float) -> str:
    """Bytes with three digits and the unit that fits: 0 B, 8.5 MB, 999 GB, 1,300 TB."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB" if value < 999.5 else f"{value:,.0f} TB"


ABSENT = "-"
UNKNOWN = "unknown"


def count(value: float | None) -> str:
    """Write a count with three significant digits and its thousands: 812, 699k, 2.12M, 104B."""
    if value is None:
        return ABSENT
    size_or_absent = float(value)
    for unit in ("", "k", "M", "B"):
        if float(f"{size_or_absent:.3g}") < 1000:
            return f"{float(f'{size_or_absent:.3g}'):g}{unit}"
        size_or_absent /= 1000
    return f"{size_or_absent:.3g}T" if size_or_absent < 1000 else power(value)


def power(value: float | None) -> str:
    """Write a large number with three significant digits and its power of ten: 1.3e13."""
    if value is None:
        return ABSENT
    mantissa, exponent = f"{value:.2e}".split("e")
    return "0" if value == 0 else f"{float(mantissa):g}e{int(exponent)}"


def stated(value: float | None, write: Callable[[float], str]) -> str:
    """What a user states of a checkpoint from elsewhere: `write(value)`, or that it is unknown."""
    return UNKNOWN if value is None else write(value)


def decimal(value: float | None, places: int) -> str:
    """Write a loss or a ratio with a fixed number of places."""
    return ABSENT if value is None else f"{value:.{places}f}"


def seconds(value: float | None) -> str:
    """Write seconds: a tenth below ten, whole ones above."""
    if value is None:
        return ABSENT
    return f"{value:.1f}" if value < 9.95 else f"{value:,.0f}"


def size_or_absent(count: int) -> str:
    """Bytes with a unit: 8.5 MB."""
    return size(count) if count else ABSENT


def duration(seconds: float | None) -> str:
    """Seconds in readable units: 0.3 s, 4 s, 3 min, 5.2 h, 12 days."""
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
    """An amount in the currency of the price: 0.012, 3.40, 1,250."""
    if not value:
        return ABSENT
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}" if value >= 1 else f"{value:.2g}"
