"""Fixtures of the fetch's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what failed be asked again soon."""
    monkeypatch.setattr("loader.retry._FIRST_WAIT_S", 0.01)
