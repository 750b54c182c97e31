"""Weight files that are gone on with where an earlier run ended, however it ended.

::

    <unpublished folder>/written.jsonl      a line for each block, written when the block was:
                                            [tensor, offset in it, bytes, digest]

A block that is noted and does not have its digest, rotten or never on the disk, is written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from loader.json_text import parse_json
from loader.weights.publishing import disk_error
from loader.weights.writer import CheckpointWriter, ShardPlan

Digest = Callable[[memoryview], int]
_JOURNAL = "written.jsonl"


class ResumableWriter(CheckpointWriter):
    """A ``CheckpointWriter`` that finds what one before it wrote by the same *plan*.

    *folder* and *plan* have to tell every byte that is to be written from any other version of it.
    """

    _own_files = (_JOURNAL,)

    def __init__(
        self,
        folder: Path,
        shards: Sequence[ShardPlan],
        *,
        stem: str,
        plan: str,
        digest: Digest,
    ) -> None:
        heads = "".join(shard.file_name + shard.head.hex() for shard in shards)
        key = hashlib.sha256(f"{plan} {heads}".encode()).hexdigest()[:16]
        super().__init__(folder, shards, stem=stem, plan=key)
        self._digest = digest
        self._journal: int | None = None
        self._written: set[tuple[str, int, int]] = set()

    def __enter__(self) -> Self:
        super().__enter__()
        try:
            self._open_journal()
        except OSError as error:
            problem = disk_error(self.folder, error)
            self.__exit__(type(problem), problem, None)
            raise problem from error
        return self

    def is_written(self, name: str, offset_bytes: int, size_bytes: int) -> bool:
        """Return whether an earlier run wrote these bytes of the tensor, and they are right."""
        return (name, offset_bytes, size_bytes) in self._written

    def write_bytes(self, name: str, offset_bytes: int, data: memoryview) -> None:
        """Write bytes at an offset of the tensor, and note that; each byte once.

        Raises:
            DiskError: the disk refused.
        """
        super().write_bytes(name, offset_bytes, data)
        assert self._journal is not None
        try:
            os.write(self._journal, _line(name, offset_bytes, len(data), self._digest(data)))
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def _open_journal(self) -> None:
        """Take over what is noted and right; what is not, the new journal does not have."""
        path, fresh = self.path / _JOURNAL, self.path / f"{_JOURNAL}.new"
        fresh.unlink(missing_ok=True)
        with fresh.open("xb") as file:
            for name, at, size, digest in _read(path):
                if self._is_right(name, at, size, digest):
                    self._written.add((name, at, size))
                    self._count(name, size)
                    file.write(_line(name, at, size, digest))
        fresh.replace(path)
        self._journal = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _is_right(self, name: str, at: int, size: int, digest: int) -> bool:
        shard = self._shards.get(name)
        if shard is None or (name, at, size) in self._written:
            return False
        start = shard.tensors[name].start + at
        if at + size > shard.tensors[name].size_bytes:
            return False
        data = os.pread(self._descriptors[shard.file_name], size, start)
        return len(data) == size and self._digest(memoryview(data)) == digest

    def _finish(self) -> None:
        super()._finish()
        (self.path / _JOURNAL).unlink(missing_ok=True)

    def _close(self) -> None:
        super()._close()
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None


def _line(name: str, at: int, size: int, digest: int) -> bytes:
    return json.dumps([name, at, size, digest]).encode() + b"\n"


def _read(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """Give what a journal notes; a line that was cut short by the end of its writer is left out."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, TypeError):
                name, at, size, digest = parse_json(line)
                yield str(name), int(at), int(size), int(digest)
