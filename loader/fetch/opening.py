"""The first request for each file: what it is now, and all of it where it is small.

A checkpoint's many small files would take two requests each, the first one for size and version. A
range at the beginning brings both and the bytes. What it brings of a larger file is dropped: ranges
of those belong to the schedule, which deals them out among all connections.

One thread keeps several connections busy: it sends on each of them, then takes the answers in that
order, so that it seldom waits, and no lock of the interpreter is handed round. Where all threads do
wait, for a far origin or a slow disk, there are soon as many as connections, with one each.

What the listing says is large comes last, and only as many as the transfer begins with: their first
answer stays open, and goes on as the stream of their first range. Others are asked for when they
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
from loader.fetch.missing_ranges import guided_bytes
from loader.fetch.opener import FAR_S, Opener, Task
from loader.fetch.pace import FIRST, Pace
from loader.fetch.part import PartFile
from loader.fetch.progress import Progress
from loader.fetch.sizes import check_size
from loader.fetch.stopping import StoppedError, check_stop
from loader.http.objects import ObjectInfo
from loader.retry import pause_s, retrying
from loader.stores.base import Store
from loader.types import Artifact, FetchedFile

_FIRST_BYTES = 16 << 10  # of a file of unknown size: about what a new connection brings at once
_SMALL_BYTES = 256 << 10  # of a file whose size is known
_BUFFERS_BYTES = 24 << 20  # of all threads together
_FACTOR = 4
_TURN_S = 0.005  # the longest that a file waits for the one before it
_LOOK_S = 0.05  # once there are as many as connections


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
    """The first requests of one fetch: no more at a time than the *pace* allows."""

    def __init__(
        self, store: Store, hooks: Hooks, retries: int, range_bytes: int, pace: Pace
    ) -> None:
        self._store = store
        self._hooks = hooks
        self._retries = retries
        self._pace = pace
        self._most = pace.limit
        self._first_bytes = min(_FIRST_BYTES, range_bytes)
        small_bytes = max(_BUFFERS_BYTES // pace.limit, _FIRST_BYTES)
        self._small_bytes = min(_SMALL_BYTES, range_bytes, small_bytes)
        self._range_bytes = range_bytes
        self._tasks: deque[Task] = deque()
        self._large: deque[Task] = deque()
        self._parts: dict[int, PartFile] = {}
        self._total_bytes = 0  # as the listing tells; once all have been asked for, as they are
        self._left = 0
        self._flying = 0  # requests whose answer has not been read
        self._opened = 0  # large files that have been asked for
        self._opened_bytes = 0
        self._large_left = 0  # of these, neither answered nor put back yet
        self.is_far = False
        self._lock = threading.Lock()
        self._turn = threading.Lock()
        self._openers: list[Opener] = []
        self._failures: list[BaseException] = []
        self._over = threading.Event()

    def run(self, artifacts: Sequence[Artifact], stop: threading.Event) -> list[PartFile]:
        """Return the part files of *artifacts*, those of small files whole.

        Raises:
            LoaderError: the first failure that asking again did not cure.
            StoppedError: *stop* was set.
        """
        self._total_bytes = sum(artifact.size_bytes or 0 for artifact in artifacts)
        for place, artifact in enumerate(artifacts):
            task = self._task(place, artifact)
            (self._large if task.large else self._tasks).append(task)
        self._left = len(self._tasks)
        try:
            if artifacts:
                self._supervise(stop)
            if self._failures:
                raise self._failures[0]
        except BaseException:
            self._over.set()
            for part in tuple(self._parts.values()):
                part.close()
            raise
        for task in self._large:
            part = self._hooks.make(task.artifact, ObjectInfo(task.artifact.size_bytes or 0))
            part.is_seen = False
            self._parts[task.place] = part
        self._total_bytes = sum(part.info.size_bytes for part in self._parts.values())
        return [self._parts[place] for place in range(len(artifacts))]

    def see(self, part: PartFile, halt: threading.Event) -> None:
        """Ask for the beginning of a large file that was not asked for yet.

        Raises:
            LoaderError: a failure that asking again did not cure.
        """
        task = self._task(-1, part.artifact)
        for attempt in retrying(lambda state: state.attempt_number > self._retries, halt):
            with attempt:
                try:
                    stream = self._store.open_first(part.artifact, task.end)
                except TransientError as error:
                    self._tell(task, error)
                    raise
                part.opened = stream, task.end
                part.see(check_size(part.artifact, stream.info, self._store))

    def take(self, held: int) -> Task | None:
        """Return a task for a thread that has *held* to answer, None where it is to have no more.

        Before a first answer it is not known how far the origin is.
        """
        with self._lock:
            share = self._pace.limit // len(self._openers) if self._parts else 1
            if held >= max(share, 1) or self._flying >= self._pace.limit:
                return None
            if self._tasks:
                self._flying += 1
                return self._tasks.popleft()
            if not self._may_open():
                return None
            task = self._large.popleft()
            self._opened += 1
            self._opened_bytes += task.artifact.size_bytes or 0
            self._large_left += 1
            return task

    def put_back(self, tasks: Sequence[Task]) -> None:
        """Let these be asked for again, before any other."""
        with self._lock:
            for task in tasks:
                (self._large if task.large else self._tasks).appendleft(task)
                self._large_left -= task.large
            self._end_if_done()

    def land(self, task: Task, *, done: bool) -> None:
        """Note that the request for *task* is over, and whether all is *done* with it."""
        with self._lock:
            if task.large:
                self._large_left -= done
                if not done:
                    self._opened -= 1
                    self._opened_bytes -= task.artifact.size_bytes or 0
            else:
                self._flying -= 1
                self._left -= done
            if done:  # else it is put back
                self._end_if_done()

    def fail(self, error: BaseException) -> None:
        """End it all."""
        self._failures.append(error)
        self._over.set()

    def is_exhausted(self) -> bool:
        """Return whether there is nothing left to be asked for."""
        with self._lock:
            return not self._tasks and not self._may_open()

    def ask(self, task: Task) -> None:
        """Send the request for *task*."""
        task.pending = self._store.send_first(task.artifact, task.end)

    def look(self, task: Task, opener: Opener) -> None:
        """Take the answer for *task*: its part file, whole where it is small.

        Raises:
            LoaderError: it did not work this time.
        """
        assert task.pending is not None
        stream = task.pending.receive()
        opener.watch(stream, task.attempt)
        part: PartFile | None = None
        try:
            part = self._part(task, check_size(task.artifact, stream.info, self._store))
            if task.large:
                part.opened = stream, task.end
            elif stream.info.size_bytes <= task.end:
                self._lay_down(part, opener.read(stream, stream.info.size_bytes))
            elif stream.info.ranges:
                # The connection is worth more than what it brings.
                with contextlib.suppress(LoaderError):
                    opener.read(stream, task.end)
        finally:
            if part is None or part.opened is None:
                stream.close()
        if part.done is not None:
            self._hooks.arrived(part.done)

    def put_off(self, task: Task, error: TransientError) -> float:
        """Return how long to wait before *task* is asked for again. Raises *error* at the last."""
        if self._over.is_set():
            raise StoppedError
        self._tell(task, error)
        if task.attempt > self._retries:
            raise error
        task.attempt += 1
        return pause_s(error, task.attempt - 1)

    def _supervise(self, stop: threading.Event) -> None:
        self._start(1)
        told_s, told = time.monotonic(), 0
        while not self._over.wait(_LOOK_S if self._parts else FAR_S):
            check_stop(stop)
            now, done = time.monotonic(), len(self._parts)
            self._pace.tick(now, done, self._flying, self._left)
            waits = [opener.has_waited(now) for opener in self._openers]
            # What a file takes of a thread's time, once there are some.
            far = (now - told_s) * len(waits) > FAR_S * (done - told) if told else all(waits)
            if far:
                self.is_far = True
                most = min(self._pace.limit, len(waits) + len(self._tasks) + len(self._large))
                self._start(min(len(waits) * _FACTOR, most) if told else most)
            told_s, told = now, done

    def _start(self, count: int) -> None:
        while len(self._openers) < count:
            opener = Opener(self, self._over, self._small_bytes)
            self._openers.append(opener)
            threading.Thread(target=opener.run, name="fetch-ask", daemon=True).start()

    def _end_if_done(self) -> None:
        if not self._left and not self._large_left and not self._may_open():
            self._over.set()

    def _may_open(self) -> bool:
        """Return whether another large file may be asked for.

        No more of them than the transfer begins with, and than keep its connections busy.
        """
        most = self._pace.limit if self.is_far else min(self._pace.limit, FIRST)
        enough = self._opened_bytes >= most * self._range_bytes
        return bool(self._large) and not enough and self._flying + self._opened < most

    def _task(self, place: int, artifact: Artifact) -> Task:
        size = artifact.size_bytes
        if size is None:
            return Task(place, artifact, self._first_bytes)
        if size <= self._small_bytes:
            return Task(place, artifact, max(size, 1))
        end = guided_bytes(size, self._total_bytes, self._most, self._range_bytes)
        return Task(place, artifact, end, large=True)

    def _tell(self, task: Task, error: TransientError) -> None:
        self._hooks.progress.retry(task.artifact.path, error.what)
        if error.busy:
            self._pace.slow_down(time.monotonic())

    def _part(self, task: Task, info: ObjectInfo) -> PartFile:
        part = self._parts[task.place] = self._hooks.make(task.artifact, info)
        if self._over.is_set():  # a thread that comes late lays nothing down any more
            part.close()
            raise StoppedError
        return part

    def _lay_down(self, part: PartFile, data: memoryview) -> None:
        if len(data) < part.info.size_bytes:
            raise part.ended_early(len(data), part.info.size_bytes)
        # One after the other, unless the disk is slow: threads that meet at the interpreter's lock
        # around each of a dozen short calls spend more on handing it round.
        turn = self._turn.acquire(timeout=_TURN_S)
        try:
            if self._hooks.begin(part) and part.done is None:  # else another process brings it
                part.put(data)
        except BaseException:
            part.close()
            raise
        finally:
            if turn:
                self._turn.release()
