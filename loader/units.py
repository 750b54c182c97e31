"""Sizes and durations as people read them: one style, in lines, tables, pages and errors.

Sizes are decimal (1 GB = 10**9 bytes), as disks, networks and the Hub count. What is read may be
binary as well, such as ``16MiB``.
"""

from __future__ import annotations

_UNITS = ("kB", "MB", "GB")
_ROUNDED_UP_S = 59.95  # shown with one decimal, it is a minute


def show_bytes(count: float) -> str:
    """Return *count* bytes in the unit that fits, such as ``1.5 GB``."""
    if abs(count) < 1000:
        return f"{count:.0f} B"
    for unit in _UNITS:
        count /= 1000
        if abs(count) < 999.95:  # shown with one decimal, it is a thousand
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def show_rate(bytes_per_s: float) -> str:
    """Return a rate, such as ``1.5 GB/s``."""
    return f"{show_bytes(bytes_per_s)}/s"


def show_seconds(seconds: float) -> str:
    """Return a duration by its two largest units: ``0.25 s``, ``12.3 s``, ``4 min 05 s``."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < _ROUNDED_UP_S:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    return f"{h} h {m:02} min" if h else f"{m} min {s:02} s"
