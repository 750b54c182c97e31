"""The parts of all output tensors, written by a few threads.

A file takes one write at a time: the kernel locks it. So the output is cut into a file for each
thread where it is large, and a thread looks for a part whose file no other one is writing.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from loader.weights.byte_files import LocalFile
from loader.weights.formats.assembly import Part, Target, find_parts, write_part
from loader.weights.writer import MAX_SHARD_BYTES, CheckpointWriter

Progress = Callable[[int, int], None]
_THREADS = 4
_CONNECTIONS = 8  # to files at the origin, each of which brings what it can and waits in between
_WORTH_A_FILE_BYTES = 256 << 20
_LOOK_AHEAD = 64  # parts


def even_shard_bytes(total_bytes: int) -> int:
    """Return the size of files of one size that *total_bytes* are best written into."""
    files = max(
        -(-total_bytes // MAX_SHARD_BYTES), min(_THREADS, total_bytes // _WORTH_A_FILE_BYTES)
    )
    return max(1, -(-total_bytes // max(1, files)))


def write_all(
    targets: Iterable[Target], writer: CheckpointWriter, on_progress: Progress | None
) -> None:
    """Write all *targets*, the files they come from in their order.

    Raises:
        LoaderError: as ``write_part``.
    """
    targets = tuple(targets)
    total = sum(target.size_bytes for target in targets)
    lock = threading.Lock()
    done = 0

    def count(written: int) -> None:
        nonlocal done
        if on_progress is not None:
            with lock:
                done += written
                on_progress(done, total)

    files = {name: file for file, names in writer.files().items() for name in names}
    queue = Queue((part for target in targets for part in find_parts(target)), files)

    def work() -> None:
        while (part := queue.take()) is not None:
            try:
                write_part(part, writer, count)
            except BaseException:
                queue.clear()
                raise
            finally:
                queue.give_back(part)

    is_here = all(isinstance(p.file, LocalFile) for t in targets for p in t.source.pieces)
    workers = min(_THREADS, os.cpu_count() or 1) if is_here else _CONNECTIONS
    with ThreadPoolExecutor(workers, "consolidate") as executor:
        futures = [executor.submit(work) for _ in range(workers)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            queue.clear()
            raise


class Queue:
    """Parts in the order of what they are read from; ``files``: tensor -> the file it is put in."""

    def __init__(self, parts: Iterable[Part], files: Mapping[str, str]) -> None:
        self._files = files
        self._parts = sorted(parts, key=lambda part: part.order, reverse=True)  # the first is last
        self._written: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self) -> Part | None:
        """Return the next part, best one whose file is not being written; None at the end.

        Only parts of the file that is due are looked at: those behind may not have arrived.
        """
        with self._lock:
            if not self._parts:
                return None
            due, *_ = self._parts[-1].order
            chosen = len(self._parts) - 1
            for at in range(chosen, max(-1, chosen - _LOOK_AHEAD), -1):
                if self._parts[at].order[0] != due:
                    break
                if not self._written[self._files[self._parts[at].target.name]]:
                    chosen = at
                    break
            part = self._parts.pop(chosen)
            self._written[self._files[part.target.name]] += 1
            return part

    def give_back(self, part: Part) -> None:
        """Note that *part* is no longer being written."""
        with self._lock:
            self._written[self._files[part.target.name]] -= 1

    def clear(self) -> None:
        """Leave nothing to do."""
        with self._lock:
            self._parts.clear()
