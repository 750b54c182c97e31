"""Files read by byte ranges, wherever their bytes are: here, at an origin, or on their way."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from loader.errors import FormatError
from loader.types import Head
from loader.weights.header import header_length

HEAD_BYTES = 1 << 16  # holds the header of most safetensors files
_LENGTH_BYTES = 8


class ByteFile(Protocol):
    """A file of known size; ``where`` says which, for errors. Safe from several threads at once."""

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
        """Fill *buffer* with the bytes from *start* on, which are waited for where they arrive.

        Raises:
            FormatError: the file ends before.
            LoaderError: the bytes cannot be had.
        """

    def descriptor(self, start: int, end: int) -> int | None:
        """Return a descriptor of a file on this disk in which bytes ``[start, end)`` lie at their
        places, for copies inside the kernel; None where they never will. It stays this file's.

        Raises:
            LoaderError: they were waited for, and cannot be had.
        """

    def close(self) -> None:
        """Close what is open."""


class LocalFile:
    """A ``ByteFile`` on this disk; opened when first read."""

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

    def descriptor(self, start: int, end: int) -> int:
        """Return the open descriptor."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptor

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill *buffer* from *start* on."""
        read_descriptor(self.descriptor(start, start + len(buffer)), start, buffer, self.where)

    def close(self) -> None:
        """Close it."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


def read_descriptor(descriptor: int, start: int, buffer: memoryview, where: str) -> None:
    """Fill *buffer* from *start* of an open file on.

    Raises:
        FormatError: the file ends before.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            raise FormatError(
                "a file that ends too early: it became shorter, or was cut short",
                where=where,
                expected=f"{start + len(buffer)} bytes",
                got=f"{start + done} bytes",
                next_step="fetch the checkpoint again",
            )
        done += count


def read_head(file: ByteFile, start: int = 0) -> Head:
    """Return the safetensors header of *file*, which goes from byte *start* to its end, as bytes.

    Raises:
        FormatError: the file is too short for one.
        LoaderError: as ``read_into``.
    """
    size_bytes = max(0, file.size_bytes - start)
    length = bytearray(min(_LENGTH_BYTES, size_bytes))
    file.read_into(start, memoryview(length))
    content = bytearray(_LENGTH_BYTES + header_length(bytes(length), size_bytes, file.where))
    file.read_into(start, memoryview(content))
    return Head(bytes(content), size_bytes)


def regular_files(paths: Iterable[Path]) -> list[Path]:
    """Return which of *paths* are files.

    Raises:
        FormatError: a name that is there, and that no file can be read by.
    """
    found, others = [], []
    for path in paths:
        if path.is_file():
            found.append(path)
        elif not path.is_dir() and os.path.lexists(path):
            others.append(path)
    if others:
        raise FormatError(
            "what has a file's name and is none",
            problems=[f"{path}: {_kind(path)}" for path in others],
            next_step="remove it, or bring the file",
        )
    return found


def _kind(path: Path) -> str:
    return "a device, a FIFO or a socket" if path.exists() else "a symlink to nothing"
