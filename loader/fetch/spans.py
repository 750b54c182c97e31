"""A fetch's spans: what is here is proved, then files arrive, each with a span of its own."""

from __future__ import annotations

import threading

from loader.fetch.progress import LogProgress, Progress
from loader.timeline import Open, Timeline


class SpanProgress(Progress):
    """Passes everything of one fetch on to another progress, and notes it on a timeline.

    A context manager: its end ends what is open, with the error that ends it. ``verify`` is what
    goes before the schedule: proving kept files, asking the origin for versions, which brings small
    files whole; their spans are short. A file's span runs from its first request until it has its
    name. *download* names the stage after it.
    """

    def __init__(
        self, inner: Progress | None, timeline: Timeline, download: str = "download"
    ) -> None:
        super().__init__(inner or LogProgress())
        self._download = download
        self._timeline = timeline
        self._lock = threading.Lock()
        self._files: dict[str, Open] = {}
        self._stage: Open | None = timeline.begin("verify")
        self._left = 0
        self._wait: Open | None = None
        self._is_moving = False

    def __enter__(self) -> SpanProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._is_moving:
            super().finish()
        self._close(kind.__name__ if kind else "")

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """The proving is over, the download begins."""
        self._left, self._is_moving = files, True
        self._next(self._download)
        super().start(files, size_bytes, have_bytes)

    def begin_file(self, path: str, size_bytes: int, have_bytes: int) -> None:
        """Begin the file's span at its first request."""
        with self._lock:
            if path not in self._files:
                self._files[path] = self._timeline.begin(path, kind="file")
        super().begin_file(path, size_bytes, have_bytes)

    def finish_file(self, path: str) -> None:
        """End the file's span; one without was here already."""
        with self._lock:
            begun = self._files.pop(path, None)
            self._left -= 1
        if begun is None:
            self._timeline.count("cache_hits")
        else:
            self._timeline.end(begun)
        super().finish_file(path)

    def retry(self, path: str, reason: str) -> None:
        """Count it."""
        self._timeline.count("retries")
        super().retry(path, reason)

    def finish(self) -> None:
        """End what is open: the fetch is over, well or not."""
        self._is_moving = False
        super().finish()
        self._close("unfinished" if self._left else "")

    def wait_for(self, what: str) -> None:
        """A wait is a stage of its own, whatever more there is to say of it."""
        with self._lock:
            begun, self._wait = self._wait, None
            if what:
                self._wait = begun or self._timeline.begin(f"wait for {what.partition(',')[0]}")
                begun = None
        if begun is not None:
            self._timeline.end(begun)
        super().wait_for(what)

    def _close(self, failed: str) -> None:
        with self._lock:
            left, self._files = tuple(self._files.values()), {}
            if self._wait is not None:
                left, self._wait = (*left, self._wait), None
        for begun in left:
            self._timeline.end(begun, failed=failed)
        self._next(None, failed)

    def _next(self, name: str | None, failed: str = "") -> None:
        if self._stage is not None:
            self._timeline.end(self._stage, failed=failed)
        self._stage = self._timeline.begin(name) if name else None
