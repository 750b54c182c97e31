"""What is read at the origin, told as a download is."""

from __future__ import annotations

import threading
from collections.abc import Collection

from loader.fetch.progress import Progress
from loader.timeline import Open, Timeline


class RangeProgress:
    """Tells of files that stay at the origin: a span each, and the model's bytes as they come.

    A context manager: its end ends the spans, with the error that ends it.
    """

    def __init__(self, progress: Progress, timeline: Timeline, paths: Collection[str]) -> None:
        self._progress, self._timeline, self._paths = progress, timeline, paths
        self._spans: dict[str, Open] = {}
        self._lock = threading.Lock()
        self._done: int | None = None

    def __enter__(self) -> RangeProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for span in self._spans.values():
            self._timeline.end(span, failed=kind.__name__ if kind else "")
        if self._done is not None:
            for path in self._paths if kind is None else ():
                self._progress.finish_file(path)
            self._progress.finish()

    def begin(self, path: str) -> None:
        """Begin the file's span at its first request."""
        with self._lock:
            if path not in self._spans:
                self._spans[path] = self._timeline.begin(path, kind="file")

    def retry(self, path: str, reason: str) -> None:
        """Count it."""
        self._timeline.count("retries")
        self._progress.retry(path, reason)

    def report(self, done: int, total: int) -> None:
        """Tell that *done* bytes of the *total* are where they belong."""
        if self._done is None:
            self._progress.start(len(self._paths), total, 0)
        self._progress.advance(done - (self._done or 0), "")
        self._done = done
