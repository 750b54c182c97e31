"""A short run of the soak: see ``benchmarks/soak.py``."""

from __future__ import annotations

import logging
import time

import pytest

from benchmarks.soak import report


@pytest.mark.parametrize("latency_s", [0.0, 0.008])
def test_a_short_soak(latency_s: float, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "podloader")
    told = report(16, time.time_ns() % 10**6, latency_s)
    assert "16 ended right, 0 wrong files" in told
