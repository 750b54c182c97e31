"""One style of sizes and durations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loader.units import show_bytes, show_rate, show_seconds


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (16 << 20, "16.8 MB"),
        (1.5e9, "1.5 GB"),
        (2e12, "2.0 TB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_sizes(count: float, shown: str) -> None:
    assert show_bytes(count) == shown
    assert show_rate(count) == f"{shown}/s"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0.00 s"),
        (0.994, "0.99 s"),
        (0.996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7_500, "2 h 05 min"),
        (7 * 86_400 - 1, "6 d 23 h"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert show_seconds(seconds) == shown


def test_nothing_shows_sizes_and_durations_in_a_style_of_its_own() -> None:
    own = re.compile(r"\}\s?(?:[kMGT]i?B|s)\b|/ ?(?:GIB|2 ?\*\* ?30|1e9)")
    loader = Path(__file__).parent.parent / "loader"
    found = [
        f"{path.relative_to(loader)}:{number}: {line.strip()}"
        for path in loader.rglob("*.py")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if path.name != "units.py" and own.search(line) and "tick" not in line.lower()
    ]
    assert found == []
