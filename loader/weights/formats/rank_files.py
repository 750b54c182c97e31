"""Files of all ranks' folders by name, read by byte ranges.

``Files`` is the seam: what consolidation reads may lie on this disk or still be remote, as long as
it knows its size and gives ranges.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, Self, TypeVar

from loader.errors import FormatError


class RangeFile(Protocol):
    """A file of known size; ``where`` says which, for errors."""

    @property
    def where(self) -> str:
        """The file's place."""

    @property
    def size_bytes(self) -> int:
        """Its size."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill *buffer* with the bytes from *start* on; safe from several threads at once.

        Raises:
            FormatError: the file ends before.
        """


class Files(Protocol):
    """The files of one folder, whichever rank has them."""

    @property
    def names(self) -> frozenset[str]:
        """All names, relative to the folder, subfolders with ``/``."""

    def open(self, name: str) -> RangeFile:
        """Return the file of that name; the same object each time.

        Raises:
            FormatError: it cannot be opened.
        """


class LocalFile:
    """A ``RangeFile`` on this disk; opened when first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        try:
            self.size_bytes = path.stat().st_size
        except OSError as error:
            raise FormatError(
                "a file that cannot be read", where=str(path), got=str(error)
            ) from error

    @property
    def where(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def descriptor(self) -> int:
        """The open descriptor, for copies inside the kernel."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptor

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill *buffer* from *start* on."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self.descriptor, [buffer[done:]], start + done)
            if count == 0:
                raise FormatError(
                    "a file that ends too early",
                    where=self.where,
                    expected=f"{start + len(buffer)} bytes",
                    got=f"{start + done} bytes",
                    next_step="fetch the checkpoint again",
                )
            done += count

    def close(self) -> None:
        """Close it."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


class LocalFiles:
    """``Files`` over folders of this disk, one per rank; of one name the first folder's counts.

    Ranks may hold copies of one file; copies of different sizes are refused when asked for.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)
        self._paths: dict[str, list[Path]] = {}
        self._open: dict[str, LocalFile] = {}
        for folder in folders:
            for root, _, names in os.walk(folder):
                for name in names:
                    path = Path(root, name)
                    self._paths.setdefault(path.relative_to(folder).as_posix(), []).append(path)

    @property
    def names(self) -> frozenset[str]:
        """The names of all folders together."""
        return frozenset(self._paths)

    def open(self, name: str) -> LocalFile:
        """Return the file of that name.

        Raises:
            FormatError: no folder has it, or ranks have files of different sizes under the name.
        """
        if name in self._open:
            return self._open[name]
        paths = self._paths.get(name, [])
        if not paths:
            where = ", ".join(map(str, self.folders))
            raise FormatError("no rank has this file", where=where, expected=name)
        return self._open.setdefault(name, choose_copy(name, [LocalFile(path) for path in paths]))

    def copies(self, name: str) -> tuple[Path, ...]:
        """Return every rank's file of that name."""
        return tuple(self._paths.get(name, ()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()


_AnyFile = TypeVar("_AnyFile", bound=RangeFile)


def choose_copy(name: str, files: Sequence[_AnyFile]) -> _AnyFile:
    """Return the first of *files*, which several ranks have under one *name*.

    Raises:
        FormatError: their sizes differ.
    """
    if len({file.size_bytes for file in files}) > 1:
        raise FormatError(
            "ranks have different files under one name",
            where=name,
            problems=[f"{file.where}: {file.size_bytes} bytes" for file in files],
            next_step="leave out the ranks whose files belong to another checkpoint",
        )
    return files[0]


def read_all(file: RangeFile, *, limit_bytes: int) -> bytes:
    """Return the whole of a small file.

    Raises:
        FormatError: it is larger than *limit_bytes*.
    """
    if file.size_bytes > limit_bytes:
        raise FormatError(
            "a file that is too large for what it should be",
            where=file.where,
            expected=f"at most {limit_bytes} bytes",
            got=f"{file.size_bytes} bytes",
        )
    buffer = bytearray(file.size_bytes)
    file.read_into(0, memoryview(buffer))
    return bytes(buffer)
