"""What a running fetch has brought, for threads that can begin with some of it."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from loader.errors import FetchError
from loader.fetch.files import disk_errors
from loader.types import FetchedFile, Snapshot


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes ``[start, end)`` of the file *path* that are here: all of it, and proved, if ``whole``.

    Before that, they are what the origin sent, of one version of the file.
    """

    path: str
    start: int
    end: int
    whole: bool = False


class Arrivals:
    """The files of one fetch. Every method may be called from any thread.

    A path is ``<job>/rank-<N>/<relative_file_name>``, as in a manifest.
    """

    def __init__(self, root: Path, paths: Iterable[str]) -> None:
        self._root = root.absolute()
        self._expected = frozenset(paths)
        self._here: dict[str, FetchedFile] = {}
        self._parts: dict[str, str] = {}
        self._spans: dict[str, list[tuple[int, int]]] = {}
        self._pieces: list[Piece] = []
        self._snapshot: Snapshot | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self.is_followed = False
        """Whether bytes are in use that nobody has proved yet."""
        self.stop = threading.Event()
        """Set it, and the fetch ends with what has arrived by then."""

    def wait(self, path: str) -> Path:
        """Return where the file *path* lies, as soon as it is whole.

        Raises:
            LoaderError: the fetch failed before; its error, as often as it is asked.
            FetchError: *path* is not among the files of this fetch.
        """
        self._wait_until(path, lambda: path in self._here)
        return self._root / path

    def wait_for_range(self, path: str, start: int, end: int) -> None:
        """Return as soon as bytes ``[start, end)`` of *path* are here. Raises as ``wait`` does."""
        self._wait_until(path, lambda: self.has_range(path, start, end))

    def has_range(self, path: str, start: int, end: int) -> bool:
        """Return whether bytes ``[start, end)`` of the file *path* are here already."""
        spans = self._spans.get(path, ())
        return path in self._here or any(s <= start and end <= e for s, e in spans)

    def _wait_until(self, path: str, is_here: Callable[[], bool]) -> None:
        if path not in self._expected:
            raise FetchError("a file that is not being fetched is waited for", where=path)
        with self._changed:
            self._changed.wait_for(lambda: is_here() or self._error is not None)
            if not is_here():
                assert self._error is not None
                raise self._error

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

    def follow(self, paths: Collection[str]) -> Iterator[Sequence[Piece]]:
        """Yield what has come of *paths*, a few pieces at a time, until all of them are whole.

        Raises:
            LoaderError: the fetch failed before.
        """
        self.is_followed = True
        left, seen = set(paths), 0
        while left:
            fresh = self._wait_for_pieces(seen)
            seen += len(fresh)
            yield [piece for piece in fresh if piece.path in left]
            left -= {piece.path for piece in fresh if piece.whole}

    def _wait_for_pieces(self, seen: int) -> Sequence[Piece]:
        with self._changed:
            self._changed.wait_for(lambda: seen < len(self._pieces) or self._error is not None)
            if seen == len(self._pieces):
                assert self._error is not None
                raise self._error
            return self._pieces[seen:]

    def open(self, path: str) -> int:
        """Return a descriptor of the file *path*, of which some piece is here.

        Raises:
            DiskError: it cannot be opened.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        if not self.is_here(path):  # under its own name an older version may lie until then
            with contextlib.suppress(FileNotFoundError):  # renamed this very moment
                return os.open(self._parts[path], flags)
        with disk_errors(self._root / path):
            return os.open(self._root / path, flags)

    def is_here(self, path: str) -> bool:
        """Return whether the file *path* is whole already."""
        return path in self._here

    def file(self, path: str) -> FetchedFile:
        """Return what came under *path*, which is here already."""
        return self._here[path]

    def advance(self, path: str, part: str, start: int, end: int) -> None:
        """Say that bytes ``[start, end)`` of *path* lie in the file *part*. The fetch does."""
        with self._changed:
            self._parts[path] = part
            self._pieces.append(Piece(path, start, end))
            spans = [*self._spans.get(path, ()), (start, end)]
            touching = [(s, e) for s, e in spans if s <= end and start <= e]
            joined = (min(s for s, _ in touching), max(e for _, e in touching))
            self._spans[path] = [*(span for span in spans if span not in touching), joined]
            self._changed.notify_all()

    def arrive(self, file: FetchedFile) -> None:
        """Say that a file is whole. The fetch does."""
        with self._changed:
            self._here[file.path] = file
            self._pieces.append(Piece(file.path, 0, file.size_bytes, whole=True))
            self._changed.notify_all()

    def end(self, outcome: Snapshot | BaseException) -> None:
        """Say how the fetch ended."""
        with self._changed:
            if isinstance(outcome, Snapshot):
                self._snapshot = outcome
            else:
                self._error = outcome
            self._changed.notify_all()
