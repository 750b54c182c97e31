"""Many ranges at once, each from a socket straight to its offset in the part file.

Threads: reading a socket, CRC64NVME and ``pwrite`` all let go of the interpreter's lock. Memory is
one buffer per thread, whatever the files' sizes.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from loader.errors import FetchError, LoaderError, TransientError
from loader.fetch.claim import Claim
from loader.fetch.pace import Pace
from loader.fetch.part import PartFile
from loader.fetch.progress import Progress
from loader.fetch.schedule import Schedule
from loader.fetch.stopping import StoppedError
from loader.retry import Tries, retrying
from loader.stores.base import ByteStream, Store

_BUFFER_BYTES = 3 << 19  # a larger one leaves a processor's cache, a smaller one takes more reads
_BUFFERS_BYTES = 24 << 20  # of all threads together, somewhat more where they are very many
_LEAST_BUFFER_BYTES = 64 << 10
_TICK_S = 0.03
_LOOK_S = 0.1  # while a worker pauses


@dataclass(frozen=True, slots=True)
class Limits:
    """What a transfer keeps to; see ``FetchOptions``."""

    concurrency: int
    retries: int
    deadline_s: float
    range_bytes: int


@dataclass(frozen=True, slots=True)
class Events:
    """What a transfer asks of those around it, on any thread.

    ``begin`` takes a part's lock and finds what is missing of it, False where another process has
    the lock. ``arrived`` is told of every part that is whole. ``stop`` ends the transfer.
    """

    begin: Callable[[PartFile], bool]
    arrived: Callable[[PartFile], None]
    progress: Progress
    stop: threading.Event


def transfer(
    parts: Sequence[PartFile], store: Store, limits: Limits, events: Events, pace: Pace
) -> None:
    """Fetch what is missing of every part, and publish each as soon as it is whole.

    *pace* knows what the origin has borne so far.

    Raises:
        LoaderError: the first failure that asking again did not cure, with the others beside it.
            What has arrived stays for the next run.
        StoppedError: ``events.stop`` was set.
    """
    if parts:
        _Transfer(parts, store, limits, events, pace).run()


class _Transfer:
    """The threads of one transfer."""

    def __init__(
        self,
        parts: Sequence[PartFile],
        store: Store,
        limits: Limits,
        events: Events,
        pace: Pace,
    ) -> None:
        self._store = store
        self._limits = limits
        self._events = events
        self._schedule = Schedule(parts, events.begin, limits.range_bytes)
        self._pace = pace
        self._halt = threading.Event()
        self._over = threading.Event()
        self._failures: list[BaseException] = []
        self._workers: list[_Worker] = []

    def run(self) -> None:
        """Keep as many workers as the pace allows until nothing is left."""
        stopped = False
        try:
            while not self._over.is_set():
                # One that has gone silent gives way to another, which may take it over.
                silent = min(self._schedule.stalled(), self._limits.concurrency)
                self._schedule.set_limit(self._pace.limit + silent)
                while len(self._workers) < self._pace.limit + silent:
                    self._start_worker()
                self._over.wait(_TICK_S)
                if stopped := self._events.stop.is_set():
                    break
                brought = sum(worker.bytes for worker in self._workers)
                receiving, left_bytes = self._schedule.receiving(), self._schedule.left_bytes()
                self._pace.tick(time.monotonic(), brought, receiving, left_bytes)
        finally:
            self._halt.set()
            self._schedule.stop()
        if self._failures:
            raise _first(self._failures)
        if stopped:
            raise StoppedError("the fetch was stopped; what has arrived is kept")

    def _start_worker(self) -> None:
        size = _buffer_bytes(len(self._workers), self._limits.concurrency)
        worker = _Worker(
            self._store,
            self._limits,
            self._events,
            self._pace,
            self._schedule,
            self._halt,
            size,
        )
        self._workers.append(worker)
        name = f"fetch-{len(self._workers)}"
        threading.Thread(target=self._work, args=(worker,), name=name, daemon=True).start()

    def _work(self, worker: _Worker) -> None:
        try:
            while claim := self._schedule.take():
                try:
                    worker.run(claim)
                finally:
                    claim.cease()
                    self._schedule.done(claim)
        except StoppedError:
            return
        except BaseException as error:
            self._failures.append(error)
        self._over.set()


class _Worker:
    """Brings one claim after the other, each tried again from where the last try ended."""

    def __init__(
        self,
        store: Store,
        limits: Limits,
        events: Events,
        pace: Pace,
        schedule: Schedule,
        halt: threading.Event,
        buffer_bytes: int,
    ) -> None:
        self._buffer = memoryview(mmap.mmap(-1, buffer_bytes))  # no memory before it is used
        self._store = store
        self._limits = limits
        self._events = events
        self._pace = pace
        self._schedule = schedule
        self._halt = halt
        self.bytes = 0

    def run(self, claim: Claim) -> None:
        """Bring the claim's bytes into its part file; publish the file where it is whole now."""
        part = claim.part
        self._events.progress.begin_file(part.artifact.path, part.info.size_bytes, part.have_bytes)
        tries = Tries(self._limits.retries, self._limits.deadline_s, claim.place)
        for attempt in retrying(tries.are_over, self._halt, partial(self._pause, claim)):
            with attempt:
                self._try(claim, tries)
        if claim.settle():
            part.publish()
            self._events.arrived(part)

    def _pause(self, claim: Claim, seconds: float) -> None:
        """Wait, but not for what others bring meanwhile: the fetch would end no sooner."""
        until = time.monotonic() + seconds
        while not claim.is_over() and (left_s := until - time.monotonic()) > 0:
            if self._halt.wait(min(left_s, _LOOK_S)):
                return

    def _try(self, claim: Claim, tries: Tries) -> None:
        if self._halt.is_set():
            raise StoppedError
        if not claim.part.info.ranges and claim.place > claim.start:
            self._tell(claim, -claim.restart())
        try:
            self._receive(claim)
        except LoaderError as error:
            if self._halt.is_set():
                raise StoppedError from None
            if claim.is_over():  # taken over by another worker, which ended the stream
                return
            tries.note(claim.place, error)
            if isinstance(error, TransientError):
                self._events.progress.retry(claim.part.artifact.path, error.what)
                if error.busy:
                    self._pace.slow_down(time.monotonic())
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
            count = claim.put(self._buffer[:count], now)
            self._tell(claim, count)

    def _tell(self, claim: Claim, count: int) -> None:
        self.bytes += count
        self._events.progress.advance(count, claim.part.artifact.path)


def _buffer_bytes(count: int, most: int) -> int:
    """Return the size of the buffer of a worker that has *count* before it, of *most* in all.

    A near origin is read by few, which then have as much as serves them; all others share a half.
    """
    few = _BUFFERS_BYTES // _BUFFER_BYTES // 2
    if count < few:
        return _BUFFER_BYTES
    share = _BUFFERS_BYTES // 2 // max(most - few, 1)
    return min(_BUFFER_BYTES, max(share, _LEAST_BUFFER_BYTES))


def _first(failures: list[BaseException]) -> BaseException:
    first = failures[0]
    if isinstance(first, FetchError) and len(failures) > 1:
        others = [e for e in failures if isinstance(e, LoaderError)]
        told = dict.fromkeys((e.what, e.where) for e in others)
        first.problems += tuple(f"also: {what}: {where}" for what, where in list(told)[1:])
    return first
