"""What the reads of TLS connections take."""

from __future__ import annotations

import threading

import pytest

from loader.stores import sockets


@pytest.mark.parametrize(("threads", "size"), [(16, 256 << 10), (128, 64 << 10), (5000, 16 << 10)])
def test_many_threads_share_a_bound(
    monkeypatch: pytest.MonkeyPatch, threads: int, size: int
) -> None:
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    assert len(sockets._ciphertext_buffer()) == size
