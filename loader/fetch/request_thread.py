"""A thread of a transfer: several first requests in flight, then one range after the other.

It sends first requests on several connections, then takes the responses in that order, so that it
seldom waits, and no lock of the interpreter is handed round. Where all threads do wait, for a far
origin or a slow disk, there are soon as many as connections, with one each.

Ranges go from a socket straight to their offset in the part file: reading a socket, CRC64NVME and
``pwrite`` all let go of the interpreter's lock. Memory is one buffer per thread, whatever the
files' sizes.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from loader.errors import LoaderError, TransientError
from loader.fetch.claim import Claim
from loader.fetch.events import Events, Limits
from loader.fetch.first_requests import FirstRequest, FirstRequests
from loader.fetch.schedule import Schedule
from loader.fetch.stopping import StoppedError
from loader.retry import Tries, retrying
from loader.stores.base import ByteStream, Store

FAR_S = 0.01  # who waits so long for one file has time for others
_STALLED_S = 2.0  # for the first bytes, once their response has begun; doubled at each try
_LOOK_S = 0.1  # while it backs off


class RequestThread:
    """What one thread of a transfer does. ``bytes``: how many it has brought of ranges."""

    def __init__(
        self,
        first: FirstRequests,
        schedule: Schedule,
        store: Store,
        limits: Limits,
        events: Events,
        halt: threading.Event,
        place: int,
    ) -> None:
        # No memory before it is used.
        self._buffer = memoryview(mmap.mmap(-1, limits.buffer_bytes(place)))
        self._first = first
        self._schedule = schedule
        self._store = store
        self._limits = limits
        self._events = events
        self._halt = halt
        self._in_flight: deque[FirstRequest] = deque()
        self._failed: list[FirstRequest] = []
        self._backoff_s = 0.0
        self._since: tuple[float, float] | None = None  # the step's beginning, by both clocks
        self._clock: int | None = None  # of its processor time, where there is one
        self._cut: tuple[float, Callable[[], None]] | None = None
        self.bytes = 0

    def run(self) -> None:
        """Go on until nothing is left.

        Raises:
            LoaderError: a failure that asking again did not cure.
            StoppedError: the transfer ends.
        """
        if sys.platform == "linux":
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            while not self._halt.is_set() and self._step():
                pass
        finally:
            self._clock = None
            for request in self._in_flight:
                if request.pending is not None:
                    request.pending.close()
        while claim := self._schedule.next():
            try:
                self._bring(claim)
            finally:
                claim.cease()
                self._schedule.complete(claim)

    def has_waited(self, now: float) -> bool:
        """Return whether a first request has kept it waiting; end what takes too long."""
        if (cut := self._cut) is not None and now > cut[0]:
            cut[1]()
        if (since := self._since) is None:
            return False
        # Time of its own is no waiting: trust in certificates or a package may have to be loaded.
        worked_s = 0.0
        if self._clock is not None:
            with contextlib.suppress(OSError):  # the thread has ended
                worked_s = time.clock_gettime(self._clock) - since[1]
        return now - since[0] - worked_s > FAR_S

    def _step(self) -> bool:
        """Send first requests, or handle one's response. Return whether there may be another."""
        # After a failure no more is sent until what is in flight has been answered.
        while not self._failed and (request := self._first.next(len(self._in_flight))):
            if self._attempt(self._first.send, request):
                self._in_flight.append(request)
        if self._in_flight:
            self._attempt(self._receive_first, self._in_flight.popleft())
        elif self._failed:
            self._wait(self._backoff_s)
            self._first.requeue(self._failed)
            self._failed, self._backoff_s = [], 0.0
        elif self._first.is_exhausted():
            return False
        else:  # as many requests as there may be are in flight
            self._wait(FAR_S)
        return True

    def _receive_first(self, request: FirstRequest) -> None:
        assert request.pending is not None
        if self._in_flight:  # others wait behind it
            self._limit(request.pending.abort, request.attempt)
        stream = request.pending.receive()
        self._limit(stream.abort, request.attempt)
        self._first.handle_response(request, stream, self._read)
        self._first.complete(request, done=True)

    def _attempt(self, step: Callable[[FirstRequest], None], request: FirstRequest) -> bool:
        self._since = (time.monotonic(), time.thread_time())
        try:
            step(request)
        except TransientError as error:
            self._first.complete(request, done=False)
            self._backoff_s = max(self._backoff_s, self._first.retry_later(request, error))
            self._failed.append(request)
            return False
        finally:
            self._since = self._cut = None
        return True

    def _limit(self, abort: Callable[[], None], attempt: int) -> None:
        """Let *abort* end a wait that takes too long."""
        self._cut = (time.monotonic() + _STALLED_S * (1 << min(attempt - 1, 5)), abort)

    def _read(self, stream: ByteStream, count: int) -> memoryview:
        """Return the next *count* bytes, fewer where the stream ends; good until the next call."""
        place = 0
        while place < count and (got := stream.readinto(self._buffer[place:count])):
            place += got
        return self._buffer[:place]

    def _wait(self, seconds: float) -> None:
        self._since = (time.monotonic(), time.thread_time())
        self._halt.wait(seconds)
        self._since = None

    def _bring(self, claim: Claim) -> None:
        """Bring the claim's bytes into its part file; publish the file where it is whole now."""
        part = claim.part
        self._events.progress.begin_file(part.artifact.path, part.info.size_bytes, part.have_bytes)
        tries = Tries(self._limits.retries, self._limits.deadline_s, claim.place)
        for attempt in retrying(tries.are_over, self._halt, partial(self._back_off, claim)):
            with attempt:
                self._try(claim, tries)
        if claim.settle():
            part.publish()
            self._events.arrived(part)

    def _back_off(self, claim: Claim, seconds: float) -> None:
        """Wait, but not for what others bring meanwhile: the fetch would end no sooner."""
        until = time.monotonic() + seconds
        while not claim.is_over() and (left_s := until - time.monotonic()) > 0:
            if self._halt.wait(min(left_s, _LOOK_S)):
                return

    def _try(self, claim: Claim, tries: Tries) -> None:
        if self._halt.is_set():
            raise StoppedError
        if not claim.part.info.ranges and claim.place > claim.start:
            self._note_bytes(claim, -claim.restart())
        try:
            self._receive(claim)
        except LoaderError as error:
            if self._halt.is_set():
                raise StoppedError from None
            if claim.is_over():  # taken over by another thread, which ended the stream
                return
            tries.note(claim.place, error)
            if isinstance(error, TransientError):
                self._first.note_retry(claim.part.artifact, error)
            raise

    def _receive(self, claim: Claim) -> None:
        if claim.is_over():
            return
        part = claim.part
        stream = claim.take_opened() or self._store.open_range(
            part.artifact, claim.place, claim.end, part.info
        )
        with contextlib.closing(stream):
            claim.stream = stream
            try:
                self._drain(claim, stream)
            finally:
                claim.stream = None

    def _drain(self, claim: Claim, stream: ByteStream) -> None:
        while (wanted := claim.wanted()) > 0:
            if self._halt.is_set():
                raise StoppedError
            count = stream.readinto(self._buffer[:wanted])
            now = time.monotonic()
            if not count:
                if claim.is_over():
                    return
                raise claim.part.ended_early(claim.place, claim.end)
            self._note_bytes(claim, claim.put(self._buffer[:count], now))

    def _note_bytes(self, claim: Claim, count: int) -> None:
        self.bytes += count
        self._events.progress.advance(count, claim.part.artifact.path)
