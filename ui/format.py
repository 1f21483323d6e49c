"""Format figures for people."""

MISSING = "\N{EN DASH}"


def seconds(value: float | None) -> str:
    """Milliseconds below one second, else seconds."""
    if value is None:
        return MISSING
    if value < 0.1:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def rate(value: float | None) -> str:
    """Tokens per second."""
    return MISSING if value is None else f"{value:.1f} /s"


def ratio(value: float | None, other: float | None) -> str:
    """`value` over `other`."""
    return f"{value / other:.2f}\N{MULTIPLICATION SIGN}" if value and other else MISSING


def size(count: float | None) -> str:
    """Bytes in decimal units, as disks and networks count."""
    if count is None:
        return MISSING
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.2f} GB"
