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

_COMPARED_BYTES = 8 << 20


class RangeFile(Protocol):
    """A file of known size; ``where`` says which, for errors."""

    @property
    def where(self) -> str:
        """The file's place."""

    @property
    def size_bytes(self) -> int:
        """Its size."""

    @property
    def digest(self) -> str | None:
        """Text that equal bytes alone have; None where it is not known without reading them."""

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
    def digest(self) -> str | None:
        """The file itself: another name of it has the same."""
        found = self.path.stat()
        return f"inode {found.st_dev}:{found.st_ino}"

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

    Ranks may hold copies of one file; files of other bytes are refused when asked for.
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
            FormatError: no folder has it, or ranks have different files under the name.
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

    All of their bytes are compared: two runs of one model write files of the same sizes.

    Raises:
        FormatError: they differ.
    """
    first = files[0]
    if not all(_is_copy(first, file) for file in files[1:]):
        raise FormatError(
            "ranks have different files under one name",
            where=name,
            problems=[f"{file.where}: {file.size_bytes} bytes" for file in files],
            next_step="choose the folders of the ranks that wrote this checkpoint together, and "
            "leave out those of another",
        )
    return first


def _is_copy(one: RangeFile, other: RangeFile) -> bool:
    """Return whether two files have the same bytes; read where no digest tells."""
    if one.size_bytes != other.size_bytes:
        return False
    if one.digest is not None and one.digest == other.digest:
        return True
    a, b = bytearray(_COMPARED_BYTES), bytearray(_COMPARED_BYTES)
    for start in range(0, one.size_bytes, _COMPARED_BYTES):
        count = min(_COMPARED_BYTES, one.size_bytes - start)
        for file, buffer in ((one, a), (other, b)):
            file.read_into(start, memoryview(buffer)[:count])
        if a != b:
            return False
    return True


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
