"""How numbers with a unit are written, wherever a person reads them."""


def size(num_bytes: float) -> str:
    """Bytes with three digits and the unit that fits: 0 B, 8.5 MB, 999 GB, 1,300 TB."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB" if value < 999.5 else f"{value:,.0f} TB"
