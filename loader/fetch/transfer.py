"""Many ranges at once, each from a socket straight to its offset in the part file.

Threads: reading a socket, CRC64NVME and ``pwrite`` all let go of the interpreter's lock. Memory is
one buffer per thread, whatever the files' sizes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable

from awscrt.checksums import crc64nvme

from loader.errors import FetchError, LoaderError
from loader.fetch.part import PartFile
from loader.fetch.plan import DoneRange, Range
from loader.fetch.progress import Progress
from loader.retry import retrying
from loader.stores.base import Store

_BUFFER_BYTES = 1 << 20
_PROGRESS_BYTES = 1 << 16  # a try that brought so much was not in vain


class StoppedError(Exception):
    """Another thread failed, or the user asked to stop."""


def transfer(
    parts: Iterable[PartFile],
    store: Store,
    progress: Progress,
    *,
    concurrency: int,
    retries: int,
    stop: threading.Event,
    arrived: Callable[[PartFile], None],
) -> None:
    """Fetch what is missing of every part, and publish each as soon as it is whole.

    ``retries``: how often a range is asked for again without any progress. ``stop`` ends it from
    outside; ``arrived`` is told of every part that is whole.

    Raises:
        LoaderError: the first failure that asking again did not cure, with the others beside it.
            What has arrived stays for the next run.
    """
    tasks = deque((part, r) for part in parts for r in part.missing)
    failures: list[BaseException] = []

    def work() -> None:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while not stop.is_set():
            try:
                part, wanted = tasks.popleft()
            except IndexError:
                return
            progress.begin_file(part.artifact.path)
            try:
                if _RangeTask(part, wanted, store, retries, progress, stop).run(buffer):
                    arrived(part)
            except StoppedError:
                return
            except BaseException as error:
                failures.append(error)
                stop.set()

    count = min(concurrency, len(tasks))
    threads = [threading.Thread(target=work, name=f"fetch-{i}", daemon=True) for i in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join(timeout=5)
        raise
    _raise_first(failures)
    if tasks:
        raise StoppedError("the fetch was stopped; what has arrived is kept")


def _raise_first(failures: list[BaseException]) -> None:
    if not failures:
        return
    first = failures[0]
    if isinstance(first, FetchError) and len(failures) > 1:
        others = [e for e in failures[1:] if isinstance(e, LoaderError)]
        first.problems += tuple(f"also: {e.what}: {e.where}" for e in others)
    raise first


class _RangeTask:
    """One range, tried again from where the last try ended."""

    def __init__(
        self,
        part: PartFile,
        wanted: Range,
        store: Store,
        retries: int,
        progress: Progress,
        stop: threading.Event,
    ) -> None:
        self._part = part
        self._wanted = wanted
        self._store = store
        self._retries = retries
        self._progress = progress
        self._stop = stop
        self._place = wanted.start
        self._crc = 0
        self._in_vain = 0

    def run(self, buffer: memoryview) -> bool:
        """Fetch the range into the part file and journal. Return whether the file is whole now."""
        for attempt in retrying(lambda _: self._in_vain > self._retries, self._stop):
            with attempt:
                self._try(buffer)
        return self._part.finish(DoneRange(self._wanted.start, self._wanted.end, self._crc))

    def _try(self, buffer: memoryview) -> None:
        if self._stop.is_set():
            raise StoppedError
        if not self._part.info.ranges and self._place > self._wanted.start:
            self._progress.advance(self._wanted.start - self._place)
            self._place, self._crc = self._wanted.start, 0
        began = self._place
        try:
            self._receive(buffer)
        except LoaderError as error:
            if error.retryable:
                self._progress.retry(self._part.artifact.path)
            self._in_vain = 0 if self._place - began >= _PROGRESS_BYTES else self._in_vain + 1
            raise

    def _receive(self, buffer: memoryview) -> None:
        end = self._wanted.end
        stream = self._store.open_range(self._part.artifact, self._place, end, self._part.info)
        try:
            while self._place < end:
                if self._stop.is_set():
                    raise StoppedError
                count = stream.readinto(buffer[: end - self._place])
                if not count:
                    raise self._part.ended_early(self._place, end)
                self._part.write(buffer[:count], self._place)
                self._crc = crc64nvme(buffer[:count], self._crc)
                self._place += count
                self._progress.advance(count)
        finally:
            stream.close()
