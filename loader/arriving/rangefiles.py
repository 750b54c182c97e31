"""Files of a checkpoint that are at the origin, wholly or for now, read by ranges."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import Protocol, Self

from loader.errors import FormatError
from loader.fetch.arrivals import Arrivals
from loader.fetch.range_read import read_range
from loader.http.objects import ObjectInfo
from loader.stores.base import Store
from loader.types import Artifact, Checkpoint
from loader.weights.formats.places import weight_folders
from loader.weights.formats.rank_files import LocalFile, RangeFile, choose_copy

_BLOCK_BYTES = 1 << 18  # what small reads, of headers and directories, are rounded up to
_BLOCKS = 8


class Watch(Protocol):
    """Told of what is asked of the origin, from many threads."""

    def begin(self, path: str) -> None:
        """Bytes of this file are asked for; told at every request."""

    def retry(self, path: str, reason: str) -> None:
        """They are asked for again after a passing failure."""


class RemoteFile:
    """A ``RangeFile`` at the origin. Small reads come out of blocks, the last few of which stay."""

    def __init__(
        self,
        artifact: Artifact,
        store: Store,
        info: ObjectInfo,
        retries: int,
        watch: Watch | None = None,
    ) -> None:
        self.where = artifact.path
        self.size_bytes = info.size_bytes
        self.digest = _digest(info)
        self._artifact, self._store, self._info, self._retries = artifact, store, info, retries
        self._watch = watch
        self._blocks: OrderedDict[int, Future[bytes]] = OrderedDict()
        self._lock = threading.Lock()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill *buffer* from *start* on; asked again where the connection fails.

        Raises:
            FormatError: the file ends before.
            FetchError: the origin does not give the bytes, or the object changed.
        """
        if start + len(buffer) > self.size_bytes:
            raise FormatError(
                "a file that ends too early",
                where=self.where,
                expected=f"{start + len(buffer)} bytes",
                got=f"{self.size_bytes} bytes",
            )
        if len(buffer) >= _BLOCK_BYTES:
            self._read(start, buffer)
            return
        done = 0
        while done < len(buffer):
            number, offset = divmod(start + done, _BLOCK_BYTES)
            piece = self._block(number)[offset : offset + len(buffer) - done]
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def _block(self, number: int) -> bytes:
        """Return a block; of threads that want it at the same time one reads it."""
        with self._lock:
            mine = number not in self._blocks
            block = self._blocks.setdefault(number, Future())
            self._blocks.move_to_end(number)
            while len(self._blocks) > _BLOCKS:
                self._blocks.popitem(last=False)
        if mine:
            try:
                start = number * _BLOCK_BYTES
                content = bytearray(min(_BLOCK_BYTES, self.size_bytes - start))
                self._read(start, memoryview(content))
                block.set_result(bytes(content))
            except BaseException as error:
                with self._lock:
                    self._blocks.pop(number, None)
                block.set_exception(error)
        return block.result()

    def _read(self, start: int, buffer: memoryview) -> None:
        def retry(reason: str) -> None:
            if self._watch:
                self._watch.retry(self.where, reason)

        if self._watch:
            self._watch.begin(self.where)
        read_range(self._artifact, self._store, self._info, start, buffer, self._retries, retry)


def _digest(info: ObjectInfo) -> str | None:
    """Return what the origin says that the bytes sum up to; no version tells of other objects."""
    sums = (f"{s.algorithm} {s.parts} {s.part_bytes} {s.digest.hex()}" for s in info.checksums)
    return next(sums, None)


class ArrivingFile:
    """A ``RangeFile`` that is being fetched: large reads wait for it, small ones do not."""

    def __init__(self, remote: RemoteFile, arrivals: Arrivals) -> None:
        self.where, self.size_bytes = remote.where, remote.size_bytes
        self.digest = remote.digest
        self._remote, self._arrivals = remote, arrivals
        self._local: LocalFile | None = None
        self._lock = threading.Lock()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill *buffer* from *start* on.

        Raises:
            FormatError: the file ends before.
            LoaderError: the fetch failed.
        """
        if len(buffer) < _BLOCK_BYTES and not self._arrivals.is_here(self.where):
            self._remote.read_into(start, buffer)
            return
        path = self._arrivals.wait(self.where)
        with self._lock:
            self._local = self._local or LocalFile(path)
        self._local.read_into(start, buffer)

    def close(self) -> None:
        """Close it."""
        if self._local is not None:
            self._local.close()


class ShardFiles:
    """``Files`` of one checkpoint: those on this disk, and those that are not yet or never will be.

    ``shards`` are the latter by their path below the download folder.
    """

    def __init__(
        self, checkpoint: Checkpoint, root: Path, shards: Mapping[str, RemoteFile | ArrivingFile]
    ) -> None:
        self._files: dict[str, list[RangeFile]] = {}
        self._chosen: dict[str, RangeFile] = {}
        for folder in weight_folders(checkpoint):
            place = PurePosixPath(folder.relative_to(root).as_posix())
            for path, file in shards.items():
                if PurePosixPath(path).is_relative_to(place):
                    name = PurePosixPath(path).relative_to(place).as_posix()
                    self._files.setdefault(name, []).append(file)
            for path_here in folder.rglob("*"):
                if path_here.is_file() and path_here.relative_to(root).as_posix() not in shards:
                    name = path_here.relative_to(folder).as_posix()
                    self._files.setdefault(name, []).append(LocalFile(path_here))

    @property
    def names(self) -> frozenset[str]:
        """The names of all folders together."""
        return frozenset(self._files)

    def open(self, name: str) -> RangeFile:
        """Return the file of that name.

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
        for files in self._files.values():
            for file in files:
                if isinstance(file, LocalFile | ArrivingFile):
                    file.close()
