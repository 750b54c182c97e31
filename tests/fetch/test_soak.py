"""A short run of the soak: see ``benchmarks/soak.py``."""

from __future__ import annotations

import logging
import time

import pytest

from benchmarks.soak import report


def test_a_short_soak(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "podloader")
    assert "24 ended right, 0 wrong files" in report(24, seed=time.time_ns() % 10**6)
