"""Where the seconds of a start went."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class Stage:
    """A stretch of a start, in seconds since the timeline began."""

    name: str
    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


class Timeline:
    """Collects stages, and logs each as it ends unless it is to be *quiet*."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._level = logging.DEBUG if quiet else logging.INFO
        self._began = time.monotonic()
        self.stages: list[Stage] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note how long the block takes; a block that fails is no stage."""
        start_s = time.monotonic() - self._began
        yield
        stage = Stage(name, start_s, time.monotonic() - self._began)
        self.stages.append(stage)
        _log.log(self._level, "%s: %.2f s", name, stage.seconds)
