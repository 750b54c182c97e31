"""What is told of a start while it goes on."""

from __future__ import annotations

import logging
import re
import threading
import time

import pytest

from loader.cli.timelines import tell_long
from loader.timeline import Timeline


def test_what_the_engine_is_at_for_long(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="podloader")
    timeline, over = Timeline(quiet=True), threading.Event()
    told = threading.Thread(target=tell_long, args=(timeline, over, 0.05))
    timeline.begin("engine import", lane="engine")
    with timeline.stage("download"):
        told.start()
        while len(caplog.messages) < 2:
            time.sleep(0.01)
    over.set()
    told.join()
    assert all(re.fullmatch(r"engine import, for [0-9.]+ s now", m) for m in caplog.messages)
