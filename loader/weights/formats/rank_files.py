"""Files of all ranks' folders by name, read by byte ranges wherever they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from loader.errors import FormatError
from loader.weights.byte_files import ByteFile, LocalFile

_COMPARED_BYTES = 8 << 20


class Files:
    """The files of one folder, whichever rank has them; a context manager that closes them.

    Of one name the first counts. Ranks may hold copies of one file; files of other bytes are
    refused when asked for.
    """

    def __init__(self, files: Iterable[tuple[str, ByteFile]]) -> None:
        self._files: dict[str, list[ByteFile]] = {}
        self._chosen: dict[str, ByteFile] = {}
        for name, file in files:
            self._files.setdefault(name, []).append(file)

    @property
    def names(self) -> frozenset[str]:
        """The names of all folders together, subfolders with ``/``."""
        return frozenset(self._files)

    def open(self, name: str) -> ByteFile:
        """Return the file of that name; the same object each time.

        Raises:
            FormatError: no folder has it, or ranks have different files under the name.
        """
        if name not in self._files:
            raise FormatError("no rank has this file", where=name)
        if name not in self._chosen:
            self._chosen[name] = choose_copy(name, self._files[name])
        return self._chosen[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (file for files in self._files.values() for file in files):
            file.close()


def local_files(folders: Sequence[Path]) -> Files:
    """Return the files in folders of this disk, one per rank."""
    found = (
        (path.relative_to(folder).as_posix(), LocalFile(path))
        for folder in folders
        for parent, _, names in os.walk(folder)
        for name in names
        if (path := Path(parent, name)).is_file()
    )
    return Files(found)


def choose_copy(name: str, files: Sequence[ByteFile]) -> ByteFile:
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


def _is_copy(one: ByteFile, other: ByteFile) -> bool:
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


def read_all(file: ByteFile, *, limit_bytes: int) -> bytes:
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
