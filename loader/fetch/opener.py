"""A thread of an opening, which keeps several connections busy."""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loader.errors import TransientError
from loader.fetch.stopping import StoppedError
from loader.stores.base import ByteStream, PendingResponse
from loader.types import Artifact

FAR_S = 0.01  # who waits so long for one file has time for others
_STALLED_S = 2.0  # for the first bytes, once their answer has begun; doubled at each try


@dataclass(slots=True)
class Task:
    """A file to be asked for, for the *attempt*-th time."""

    place: int
    artifact: Artifact
    end: int  # of the bytes that are asked for
    large: bool = False
    attempt: int = 1
    pending: PendingResponse | None = None


class Work(Protocol):
    """What openers share. Every method may be called from any thread."""

    def take(self, held: int) -> Task | None:
        """Return a task for a thread that has *held* to answer, None where it is to have no more.

        Each task that is taken lands, once or, put back, more often.
        """

    def put_back(self, tasks: Sequence[Task]) -> None:
        """Let these be asked for again, before any other."""

    def is_exhausted(self) -> bool:
        """Return whether there is nothing left to be asked for."""

    def ask(self, task: Task) -> None:
        """Send the request for *task*."""

    def look(self, task: Task, opener: Opener) -> None:
        """Take the answer for *task*.

        Raises:
            LoaderError: it did not work this time.
        """

    def land(self, task: Task, *, done: bool) -> None:
        """Note that the request for *task* is over, and whether all is *done* with it."""

    def put_off(self, task: Task, error: TransientError) -> float:
        """Return how long to wait before *task* is asked for again. Raises *error* at the last."""

    def fail(self, error: BaseException) -> None:
        """End it all."""


class Opener:
    """A thread of an opening: it asks ahead on several connections, then takes answer by answer."""

    def __init__(self, work: Work, over: threading.Event, most_bytes: int) -> None:
        self._work = work
        self._over = over
        self._buffer = memoryview(mmap.mmap(-1, most_bytes))  # no memory before it is used
        self._asked: deque[Task] = deque()
        self._failed: list[Task] = []
        self._pause_s = 0.0
        self._since: tuple[float, float] | None = None  # the step's beginning, by both clocks
        self._clock: int | None = None  # of its processor time, where there is one
        self._cut: tuple[float, Callable[[], None]] | None = None

    def run(self) -> None:
        """Go on until nothing is left to be asked for."""
        if sys.platform == "linux":
            self._clock = time.pthread_getcpuclockid(threading.get_ident())
        try:
            while not self._over.is_set() and self._step():
                pass
        except StoppedError:
            pass
        except BaseException as error:
            self._work.fail(error)
        finally:
            self._clock = None
            for task in self._asked:
                if task.pending is not None:
                    task.pending.close()

    def read(self, stream: ByteStream, count: int) -> memoryview:
        """Return the next *count* bytes, fewer where the stream ends; good until the next call."""
        place = 0
        while place < count and (got := stream.readinto(self._buffer[place:count])):
            place += got
        return self._buffer[:place]

    def watch(self, awaited: object, attempt: int) -> None:
        """Limit the wait for *awaited*, where it can be aborted."""
        abort: Callable[[], None] | None = getattr(awaited, "abort", None)
        if abort is not None:
            self._cut = (time.monotonic() + _STALLED_S * (1 << min(attempt - 1, 5)), abort)

    def has_waited(self, now: float) -> bool:
        """Return whether it waits for a while now; cut off what it has waited for too long."""
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
        """Do the next thing. Return whether there may be another."""
        # After a failure no more is sent until what was asked has been answered.
        while not self._failed and (task := self._work.take(len(self._asked))):
            if self._attempt(self._work.ask, task):
                self._asked.append(task)
        if self._asked:
            self._attempt(self._take_answer, self._asked.popleft())
        elif self._failed:
            self._pause(self._pause_s)
            self._work.put_back(self._failed)
            self._failed, self._pause_s = [], 0.0
        elif self._work.is_exhausted():
            return False
        else:  # as many requests as there may be are under way
            self._pause(FAR_S)
        return True

    def _take_answer(self, task: Task) -> None:
        if self._asked and task.pending is not None:  # others wait behind it
            self.watch(task.pending, task.attempt)
        self._work.look(task, self)
        self._work.land(task, done=True)

    def _attempt(self, step: Callable[[Task], None], task: Task) -> bool:
        self._since = (time.monotonic(), time.thread_time())
        try:
            step(task)
        except TransientError as error:
            self._work.land(task, done=False)
            self._pause_s = max(self._pause_s, self._work.put_off(task, error))
            self._failed.append(task)
            return False
        finally:
            self._since = self._cut = None
        return True

    def _pause(self, seconds: float) -> None:
        self._since = (time.monotonic(), time.thread_time())
        self._over.wait(seconds)
        self._since = None
