"""Many files at once: a first request for each, then the ranges that are missing of the large ones.

The same threads do both, as many as the pace allows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from loader.errors import FetchError, LoaderError
from loader.fetch.events import Events, Limits
from loader.fetch.first_requests import FirstRequests
from loader.fetch.pace import FIRST, Pace
from loader.fetch.part import PartFile
from loader.fetch.request_thread import FAR_S, RequestThread
from loader.fetch.schedule import Schedule
from loader.fetch.stopping import StoppedError, check_stop
from loader.stores.base import Store
from loader.types import Artifact

_FACTOR = 4  # more threads, while they wait
_LOOK_S = 0.05  # at threads that may wait, once a file has been answered for
_TICK_S = 0.03


class Transfer:
    """The threads of one transfer. Close it, whatever its end."""

    def __init__(
        self, artifacts: Sequence[Artifact], store: Store, limits: Limits, events: Events
    ) -> None:
        self._store = store
        self._limits = limits
        self._events = events
        self._halt = threading.Event()
        self._over = threading.Event()
        self._pace = Pace(limits.concurrency, time.monotonic(), first=limits.concurrency)
        first = FirstRequests(artifacts, store, limits, events, self._pace, self._halt)
        self._first = first
        self._schedule = Schedule(lambda part: events.begin(part, first.open), limits.range_bytes)
        self._failures: list[BaseException] = []
        self._threads: list[RequestThread] = []

    def send_first_requests(self) -> list[PartFile]:
        """Return the part files of all artifacts, those of small files whole.

        Raises:
            LoaderError: the first failure that asking again did not cure.
            StoppedError: ``Events.stop`` was set.
        """
        first = self._first
        if not first.over.is_set():
            self._start_threads(1)
        seen_s, seen = time.monotonic(), 0
        while not first.over.wait(_LOOK_S if first.answered else FAR_S):
            check_stop(self._events.stop)
            now, done = time.monotonic(), first.answered
            first.tick(now)
            waits = [thread.has_waited(now) for thread in self._threads]
            # What a file takes of a thread's time, once there are some.
            far = (now - seen_s) * len(waits) > FAR_S * (done - seen) if seen else all(waits)
            if far:
                first.is_far = True
                most = min(self._pace.limit, len(waits) + first.waiting)
                self._start_threads(min(len(waits) * _FACTOR, most) if seen else most)
            seen_s, seen = now, done
        self._check_failures()
        return first.parts()

    def bring(self, parts: Sequence[PartFile]) -> None:
        """Fetch what is missing of every part, and publish each as soon as it is whole.

        Raises:
            LoaderError: the first failure that asking again did not cure, with the others beside
                it. What has arrived stays for the next run.
            StoppedError: ``Events.stop`` was set.
        """
        if not parts:
            return
        self._pace.begin_again(
            self._limits.concurrency if self._first.is_far else FIRST, time.monotonic()
        )
        self._schedule.fill(parts)
        while not self._over.is_set():
            # One that has gone silent gives way to another, which may take it over.
            count = self._pace.limit + min(self._schedule.stalled(), self._limits.concurrency)
            self._schedule.set_limit(count)
            self._start_threads(count)
            self._over.wait(_TICK_S)
            check_stop(self._events.stop)
            brought = sum(thread.bytes for thread in self._threads)
            receiving, left_bytes = self._schedule.receiving(), self._schedule.left_bytes()
            self._pace.tick(time.monotonic(), brought, receiving, left_bytes)
        self._check_failures()

    def close(self) -> None:
        """End every thread and close every part file; nothing is lost."""
        self._halt.set()
        self._schedule.stop()
        self._first.close()

    def _start_threads(self, count: int) -> None:
        """Let there be *count* of them."""
        while len(self._threads) < count:
            thread = RequestThread(
                self._first,
                self._schedule,
                self._store,
                self._limits,
                self._events,
                self._halt,
                len(self._threads),
            )
            self._threads.append(thread)
            self._first.threads = len(self._threads)
            name = f"fetch-{len(self._threads)}"
            threading.Thread(target=self._run, args=(thread,), name=name, daemon=True).start()

    def _run(self, thread: RequestThread) -> None:
        try:
            thread.run()
        except StoppedError:
            return
        except BaseException as error:
            self._failures.append(error)
        self._over.set()
        self._first.over.set()

    def _check_failures(self) -> None:
        if self._failures:
            raise first_of(self._failures)


def first_of(failures: Sequence[BaseException]) -> BaseException:
    """Return the first of *failures*, which tells of the others."""
    first = failures[0]
    if isinstance(first, FetchError) and len(failures) > 1:
        others = [e for e in failures if isinstance(e, LoaderError)]
        found = dict.fromkeys((e.what, e.where) for e in others)
        first.problems += tuple(f"also: {what}: {where}" for what, where in list(found)[1:])
    return first
