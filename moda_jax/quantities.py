"""Numbers as a person reads them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: "1:02:03", "2:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def quantity(number: float) -> str:
    """A count that a person reads at a glance: "950", "12.3k", "4.56M", "1.20B"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}k" if unit == "k" else f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
