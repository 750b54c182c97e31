"""The first request for each file: what it is now, and all of it where it is small.

A checkpoint's many small files would take two requests each, the first one for size and version. A
range at the beginning brings both and the bytes. What it brings of a larger file is dropped: ranges
of those belong to the schedule, which deals them out among all connections.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loader.errors import LoaderError, TransientError
from loader.fetch.crc import crc64nvme
from loader.fetch.part import PartFile
from loader.fetch.plan import DoneRange
from loader.fetch.progress import Progress
from loader.fetch.threads import StoppedError, map_on_threads
from loader.retry import retrying
from loader.stores.base import ByteStream, ObjectInfo, Store
from loader.types import Artifact, FetchedFile

_FIRST_BYTES = 16 << 10  # of a file of unknown size: about what a new connection brings at once
_SMALL_BYTES = 256 << 10  # of a file whose size is known
_STALLED_S = 2.0  # for the first bytes, once their answer has begun; doubled at each try
_TURN_S = 0.005  # the longest that a file waits for the one before it


@dataclass(frozen=True, slots=True)
class Hooks:
    """What an opening asks of those around it, on any thread.

    ``make`` returns an artifact's part file. ``begin`` takes its lock and finds what is missing of
    it, False where another process has the lock. ``arrived`` is told of every file that is whole.
    """

    make: Callable[[Artifact, ObjectInfo], PartFile]
    begin: Callable[[PartFile], bool]
    arrived: Callable[[FetchedFile], None]
    progress: Progress


class Opening:
    """The first requests of one fetch."""

    def __init__(self, store: Store, hooks: Hooks, retries: int, range_bytes: int) -> None:
        self._store = store
        self._hooks = hooks
        self._retries = retries
        self._first_bytes = min(_FIRST_BYTES, range_bytes)
        self._small_bytes = min(_SMALL_BYTES, range_bytes)
        self._halt = threading.Event()
        self._parts: list[PartFile] = []
        self._open: dict[ByteStream, float] = {}  # when to give up on it
        self._buffers = threading.local()
        self._turn = threading.Lock()

    def run(
        self, artifacts: Sequence[Artifact], concurrency: int, stop: threading.Event
    ) -> list[PartFile]:
        """Return the part files of *artifacts*, those of small files whole.

        Raises:
            LoaderError: the first failure that asking again did not cure.
            StoppedError: *stop* was set.
        """
        try:
            return map_on_threads(self.look, artifacts, concurrency, stop, self._drop_stalled)
        except BaseException:
            self._halt.set()
            for part in tuple(self._parts):
                part.close()
            raise

    def look(self, artifact: Artifact) -> PartFile:
        """Return the part file of *artifact*, whole where it is small."""
        for attempt in retrying(lambda state: state.attempt_number > self._retries, self._halt):
            with attempt:
                try:
                    return self._look(artifact, attempt.retry_state.attempt_number)
                except TransientError as error:
                    if self._halt.is_set():
                        raise StoppedError from None
                    self._hooks.progress.retry(artifact.path, error.what)
                    raise
        raise AssertionError("the loop ends by returning or raising")

    def _look(self, artifact: Artifact, attempt: int) -> PartFile:
        end = self._first_bytes if artifact.size_bytes is None else max(artifact.size_bytes, 1)
        if end > self._small_bytes:
            return self._part(artifact, self._store.stat(artifact))
        stream = self._store.open_first(artifact, end)
        self._open[stream] = time.monotonic() + _STALLED_S * (1 << min(attempt - 1, 5))
        try:
            part = self._part(artifact, stream.info)
            if stream.info.size_bytes <= end:
                self._bring(part, stream)
                if part.done is not None:
                    self._hooks.arrived(part.done)
            elif stream.info.ranges:
                # The connection is worth more than what it brings.
                with contextlib.suppress(LoaderError):
                    self._read(stream, end)
            return part
        finally:
            del self._open[stream]
            stream.close()

    def _part(self, artifact: Artifact, info: ObjectInfo) -> PartFile:
        part = self._hooks.make(artifact, info)
        self._parts.append(part)
        if self._halt.is_set():  # a thread that comes late lays nothing down any more
            part.close()
            raise StoppedError
        return part

    def _bring(self, part: PartFile, stream: ByteStream) -> None:
        data = self._read(stream, part.info.size_bytes)
        if len(data) < part.info.size_bytes:
            raise part.ended_early(len(data), part.info.size_bytes)
        # One after the other, unless the disk is slow: threads that meet at the interpreter's lock
        # around each of a dozen short calls spend more on handing it round.
        turn = self._turn.acquire(timeout=_TURN_S)
        try:
            self._lay_down(part, data)
        except BaseException:
            part.close()
            raise
        finally:
            if turn:
                self._turn.release()

    def _lay_down(self, part: PartFile, data: memoryview) -> None:
        if not self._hooks.begin(part) or part.done is not None:
            return  # another process brings it, or has
        part.write(data, 0)
        if part.sum is not None:
            tally = part.sum.tally(0)
            tally.update(data)
            tally.mark()
        part.finish(DoneRange(0, len(data), crc64nvme(data)))
        part.publish()

    def _read(self, stream: ByteStream, count: int) -> memoryview:
        """Return the next *count* bytes, fewer where the stream ends; good until the next call."""
        buffer: memoryview | None = getattr(self._buffers, "buffer", None)
        if buffer is None:
            buffer = self._buffers.buffer = memoryview(bytearray(self._small_bytes))
        place = 0
        while place < count and (got := stream.readinto(buffer[place:count])):
            place += got
        return buffer[:place]

    def _drop_stalled(self) -> None:
        now = time.monotonic()
        for stream, until in tuple(self._open.items()):
            if now > until:
                abort: Callable[[], None] | None = getattr(stream, "abort", None)
                if abort is not None:
                    abort()
