"""What a transfer keeps to, and what it asks of those around it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from loader.fetch.part import PartFile
from loader.fetch.progress import Progress
from loader.http.objects import ObjectInfo
from loader.types import Artifact, FetchedFile

_BUFFER_BYTES = 3 << 19  # a larger one leaves a processor's cache, a smaller one takes more reads
_BUFFERS_BYTES = 24 << 20  # of all threads together, somewhat more where they are very many
_LEAST_BUFFER_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Limits:
    """What a transfer keeps to; see ``FetchOptions``."""

    concurrency: int
    retries: int
    deadline_s: float
    range_bytes: int

    def buffer_bytes(self, place: int) -> int:
        """Return the size of the buffer of a thread that has *place* others before it.

        A near origin is read by few, which have as much as serves them; all others share a half.
        """
        few = _BUFFERS_BYTES // _BUFFER_BYTES // 2
        if place < few:
            return _BUFFER_BYTES
        share = _BUFFERS_BYTES // 2 // max(self.concurrency - few, 1)
        return min(_BUFFER_BYTES, max(share, _LEAST_BUFFER_BYTES))

    @property
    def least_buffer_bytes(self) -> int:
        """The size of the last thread's buffer."""
        return self.buffer_bytes(self.concurrency)


@dataclass(frozen=True, slots=True)
class Events:
    """What a transfer asks of those around it, on any thread.

    ``make`` returns an artifact's part file. ``claim`` takes the lock of a part and finds what is
    missing of it, False where another process has the lock; ``begin`` does so when the transfer
    has come to it, and lets the second argument ask the origin for what is not known yet.
    ``arrived_early`` is told of each file that came whole with its first request, ``arrived`` of
    each part that is whole later. ``stop`` ends the transfer.
    """

    make: Callable[[Artifact, ObjectInfo], PartFile]
    claim: Callable[[PartFile], bool]
    begin: Callable[[PartFile, Callable[[PartFile], None]], bool]
    arrived_early: Callable[[FetchedFile], None]
    arrived: Callable[[PartFile], None]
    progress: Progress
    stop: threading.Event
