"""The first request for each file: what it is now, and all of it where it is small.

A checkpoint's many small files would take two requests each, the first one for size and version. A
range at the beginning brings both and the bytes. What it brings of a larger file is dropped: ranges
of those belong to the schedule, which deals them out among all connections.

What the listing says is large comes last, and only as many as the transfer begins with: their first
response stays open, and goes on as the stream of their first range. Others are asked for when they
are begun.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loader.errors import LoaderError, TransientError
from loader.fetch.events import Events, Limits
from loader.fetch.missing_ranges import guided_bytes
from loader.fetch.pace import FIRST, Pace
from loader.fetch.part import PartFile
from loader.fetch.sizes import check_size
from loader.fetch.stopping import StoppedError
from loader.http.objects import ObjectInfo
from loader.retry import pause_s, retrying
from loader.stores.base import SMALL_BYTES, ByteStream, PendingResponse, Store
from loader.types import Artifact

_FIRST_BYTES = 16 << 10  # of a file of unknown size: about what a new connection brings at once
_TURN_S = 0.005  # the longest that a file waits for the one before it


@dataclass(slots=True)
class FirstRequest:
    """A file that is asked for the *attempt*-th time, the bytes up to ``end``."""

    place: int
    artifact: Artifact
    end: int
    is_large: bool = False
    attempt: int = 1
    pending: PendingResponse | None = None


class FirstRequests:
    """The first requests of one fetch. Every method may be called from any thread.

    No more of them are in flight than the *pace* allows. ``over`` is set when none is left.
    """

    def __init__(
        self,
        artifacts: Sequence[Artifact],
        store: Store,
        limits: Limits,
        events: Events,
        pace: Pace,
        halt: threading.Event,
    ) -> None:
        self._store = store
        self._limits = limits
        self._events = events
        self._pace = pace
        self._halt = halt
        self._first_bytes = min(_FIRST_BYTES, limits.range_bytes)
        self._small_bytes = min(SMALL_BYTES, limits.range_bytes, limits.least_buffer_bytes)
        self._total_bytes = sum(artifact.size_bytes or 0 for artifact in artifacts)
        self._parts: dict[int, PartFile] = {}
        self._small: deque[FirstRequest] = deque()
        self._large: deque[FirstRequest] = deque()
        for place, artifact in enumerate(artifacts):
            request = self._request(place, artifact)
            (self._large if request.is_large else self._small).append(request)
        self._left = len(self._small)
        self._in_flight = 0
        self._opened = 0  # large files that have been asked for
        self._opened_bytes = 0
        self._large_left = 0  # of these, neither answered nor requeued yet
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self.is_far = False
        self.threads = 1  # that send them
        self.over = threading.Event()
        self._set_if_over()

    @property
    def answered(self) -> int:
        """How many files have been answered for."""
        return len(self._parts)

    @property
    def waiting(self) -> int:
        """How many files have yet to be asked for."""
        return len(self._small) + len(self._large)

    def tick(self, now: float) -> None:
        """Let the pace take note of how far they are."""
        self._pace.tick(now, len(self._parts), self._in_flight, self._left)

    def parts(self) -> list[PartFile]:
        """Return the part files of all artifacts, those of small files whole; when it is over."""
        for request in self._large:
            artifact = request.artifact
            part = self._events.make(artifact, ObjectInfo(artifact.size_bytes or 0))
            part.is_confirmed = False
            self._parts[request.place] = part
        found = [self._parts[place] for place in sorted(self._parts)]
        self._total_bytes = sum(part.info.size_bytes for part in found)
        return found

    def close(self) -> None:
        """Close every part file."""
        for part in tuple(self._parts.values()):
            part.close()

    def open(self, part: PartFile) -> None:
        """Ask for the beginning of a large file that was not asked for yet.

        Raises:
            LoaderError: a failure that asking again did not cure.
        """
        request = self._request(-1, part.artifact)
        retries = self._limits.retries
        for attempt in retrying(lambda state: state.attempt_number > retries, self._halt):
            with attempt:
                try:
                    stream = self._store.open_first(part.artifact, request.end)
                except TransientError as error:
                    self.note_retry(request.artifact, error)
                    raise
                part.opened = stream, request.end
                part.confirm(check_size(part.artifact, stream.info, self._store))

    def next(self, held: int) -> FirstRequest | None:
        """Return a request for a thread that has *held* in flight, None for no more.

        Before a first response it is not known how far the origin is.
        """
        with self._lock:
            share = self._pace.limit // self.threads if self._parts else 1
            if held >= max(share, 1) or self._in_flight >= self._pace.limit:
                return None
            if self._small:
                self._in_flight += 1
                return self._small.popleft()
            if not self._may_open():
                return None
            request = self._large.popleft()
            self._opened += 1
            self._opened_bytes += request.artifact.size_bytes or 0
            self._large_left += 1
            return request

    def requeue(self, requests: Sequence[FirstRequest]) -> None:
        """Let these be asked for again, before any other."""
        with self._lock:
            for request in requests:
                (self._large if request.is_large else self._small).appendleft(request)
                self._large_left -= request.is_large
            self._set_if_over()

    def complete(self, request: FirstRequest, *, done: bool) -> None:
        """Note that *request* is in flight no more, and whether it is *done* or to be requeued."""
        with self._lock:
            if request.is_large:
                self._large_left -= done
                if not done:
                    self._opened -= 1
                    self._opened_bytes -= request.artifact.size_bytes or 0
            else:
                self._in_flight -= 1
                self._left -= done
            if done:
                self._set_if_over()

    def is_exhausted(self) -> bool:
        """Return whether there is nothing left to be asked for."""
        with self._lock:
            return not self._small and not self._may_open()

    def send(self, request: FirstRequest) -> None:
        """Send *request*."""
        request.pending = self._store.send_first(request.artifact, request.end)

    def handle_response(
        self,
        request: FirstRequest,
        stream: ByteStream,
        read: Callable[[ByteStream, int], memoryview],
    ) -> None:
        """Take what came: the file's part, whole where it is small.

        *read* returns the next bytes of a stream.

        Raises:
            LoaderError: it did not work this time.
        """
        part: PartFile | None = None
        try:
            part = self._part(request, check_size(request.artifact, stream.info, self._store))
            if request.is_large:
                part.opened = stream, request.end
            elif stream.info.size_bytes <= request.end:
                self._write_whole(part, read(stream, stream.info.size_bytes))
            elif stream.info.ranges:
                # The connection is worth more than what it brings.
                with contextlib.suppress(LoaderError):
                    read(stream, request.end)
        finally:
            if part is None or part.opened is None:
                stream.close()
        if part.done is not None:
            self._events.arrived_early(part.done)

    def retry_later(self, request: FirstRequest, error: TransientError) -> float:
        """Return the backoff before *request* is sent again. Raises *error* at the last."""
        if self._halt.is_set():
            raise StoppedError
        self.note_retry(request.artifact, error)
        if request.attempt > self._limits.retries:
            raise error
        request.attempt += 1
        return pause_s(error, request.attempt - 1)

    def note_retry(self, artifact: Artifact, error: TransientError) -> None:
        """Tell that *artifact* is asked for again; fewer at a time where the origin is busy."""
        self._events.progress.retry(artifact.path, error.what)
        if error.busy:
            self._pace.slow_down(time.monotonic())

    def _set_if_over(self) -> None:
        if not self._left and not self._large_left and not self._may_open():
            self.over.set()

    def _may_open(self) -> bool:
        """Return whether another large file may be asked for.

        No more of them than the transfer begins with, and than keep its connections busy.
        """
        most = self._pace.limit if self.is_far else min(self._pace.limit, FIRST)
        enough = self._opened_bytes >= most * self._limits.range_bytes
        return bool(self._large) and not enough and self._in_flight + self._opened < most

    def _request(self, place: int, artifact: Artifact) -> FirstRequest:
        size = artifact.size_bytes
        if size is None:
            return FirstRequest(place, artifact, self._first_bytes)
        if size <= self._small_bytes:
            return FirstRequest(place, artifact, max(size, 1))
        limits = self._limits
        end = guided_bytes(size, self._total_bytes, limits.concurrency, limits.range_bytes)
        return FirstRequest(place, artifact, end, is_large=True)

    def _part(self, request: FirstRequest, info: ObjectInfo) -> PartFile:
        part = self._parts[request.place] = self._events.make(request.artifact, info)
        if self._halt.is_set():  # a thread that comes late lays nothing down any more
            part.close()
            raise StoppedError
        return part

    def _write_whole(self, part: PartFile, data: memoryview) -> None:
        if len(data) < part.info.size_bytes:
            raise part.ended_early(len(data), part.info.size_bytes)
        # One after the other, unless the disk is slow: threads that meet at the interpreter's lock
        # around each of a dozen short calls spend more on handing it round.
        turn = self._turn.acquire(timeout=_TURN_S)
        try:
            if self._events.claim(part) and part.done is None:  # else another process brings it
                part.put(data)
        except BaseException:
            part.close()
            raise
        finally:
            if turn:
                self._turn.release()
