"""Which files of a running fetch are whole, for threads that can begin with some of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from loader.errors import FetchError
from loader.types import FetchedFile, Snapshot


class Arrivals:
    """The files of one fetch. Every method may be called from any thread.

    A path is ``<job>/rank-<N>/<relative_file_name>``, as in a manifest.
    """

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        self._root = root.absolute()
        self._expected = frozenset(paths)
        self._here: dict[str, FetchedFile] = {}
        self._snapshot: Snapshot | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self.stop = threading.Event()
        """Set it, and the fetch ends with what has arrived by then."""

    def wait(self, path: str) -> Path:
        """Return where the file *path* lies, as soon as it is whole.

        Raises:
            LoaderError: the fetch failed before; its error, as often as it is asked.
            FetchError: *path* is not among the files of this fetch.
        """
        if path not in self._expected:
            raise FetchError("a file that is not being fetched is waited for", where=path)
        with self._changed:
            self._changed.wait_for(lambda: path in self._here or self._error is not None)
            if path not in self._here:
                assert self._error is not None
                raise self._error
        return self._root / path

    def wait_all(self) -> Snapshot:
        """Return the snapshot, at the fetch's end.

        Raises:
            LoaderError: the fetch failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._snapshot or self._error is not None)
            if self._snapshot is None:
                assert self._error is not None
                raise self._error
            return self._snapshot

    def is_here(self, path: str) -> bool:
        """Return whether the file *path* is whole already."""
        return path in self._here

    def file(self, path: str) -> FetchedFile:
        """Return what came under *path*, which is here already."""
        return self._here[path]

    def arrive(self, file: FetchedFile) -> None:
        """Say that a file is whole. The fetch does."""
        with self._changed:
            self._here[file.path] = file
            self._changed.notify_all()

    def end(self, outcome: Snapshot | BaseException) -> None:
        """Say how the fetch ended."""
        with self._changed:
            if isinstance(outcome, Snapshot):
                self._snapshot = outcome
            else:
                self._error = outcome
            self._changed.notify_all()
