"""Weight files of a folder that appears only when all of it is there.

The headers are planned first, so tensors may come in any order and in pieces, each streamed to
its final offset.
"""

from __future__ import annotations

import json
import os
import struct
import threading
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import torch

from loader.errors import CheckpointError
from loader.threads import Broadcast
from loader.types import Head
from loader.weights.dequantise import DequantisedReader
from loader.weights.header import METADATA_KEY, TensorInfo, size_bytes
from loader.weights.publishing import PartialFolder, disk_error
from loader.weights.readers import CODES, Reader, SafetensorsReader, tensor_bytes

MAX_SHARD_BYTES = 5_000_000_000
_COPY_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written: ``dtype`` as in "BF16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One safetensors file before it is written: its head and where each tensor will lie."""

    file_name: str
    head: bytes
    tensors: Mapping[str, TensorInfo]
    size_bytes: int


def plan_shard(
    file_name: str, specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None
) -> ShardPlan:
    """Return the plan of one file, its tensors in the order given.

    Raises:
        ValueError: a dtype that safetensors does not know.
    """
    at = 0
    entries: dict[str, object] = {METADATA_KEY: dict(metadata or {"format": "pt"})}
    ends: list[tuple[TensorSpec, int, int]] = []
    for spec in specs:
        end = at + size_bytes(spec.dtype, spec.shape)
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, end],
        }
        ends.append((spec, at, end))
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    tensors = {
        s.name: TensorInfo(s.name, s.dtype, s.shape, base + start, base + end)
        for s, start, end in ends
    }
    head = struct.pack("<Q", len(text)) + text
    return ShardPlan(file_name, head, MappingProxyType(tensors), base + at)


def plan_shards(
    specs: Iterable[TensorSpec], *, max_shard_bytes: int = MAX_SHARD_BYTES, stem: str = "model"
) -> tuple[ShardPlan, ...]:
    """Return the plans of one file, or of several named as transformers names shards."""
    groups: list[list[TensorSpec]] = [[]]
    used = 0
    for spec in specs:
        needed = size_bytes(spec.dtype, spec.shape)
        if groups[-1] and used + needed > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(spec)
        used += needed
    if len(groups) == 1:
        return (plan_shard(f"{stem}.safetensors", groups[0]),)
    n = len(groups)
    return tuple(
        plan_shard(f"{stem}-{i:05d}-of-{n:05d}.safetensors", group)
        for i, group in enumerate(groups, 1)
    )


class CheckpointWriter:
    """Writes the planned tensors into a folder that appears only when it is complete.

    Use as a context manager; ``path`` is the unpublished folder, for config and tokenizer files.
    With *plan* the next run finds it, if this one fails: see ``PartialFolder``.
    """

    _own_files: Collection[str] = ()  # in the folder while it is unpublished

    def __init__(
        self, folder: Path, shards: Sequence[ShardPlan], *, stem: str = "model", plan: str = ""
    ) -> None:
        self.folder = folder
        self._shards = {name: shard for shard in shards for name in shard.tensors}
        self._plans = tuple(shards)
        self._stem = stem
        self._left = {name: info.size_bytes for s in shards for name, info in s.tensors.items()}
        self._lock = threading.Lock()  # parts of one tensor may come from several threads
        self._whole: Broadcast[str] = Broadcast()
        self._descriptors: dict[str, int] = {}
        self.path = folder
        needed = sum(plan.size_bytes for plan in self._plans)
        self._partial = PartialFolder(folder, needed_bytes=needed, plan=plan)

    def __enter__(self) -> Self:
        self._partial.__enter__()
        self.path = self._partial.path
        try:
            for plan in self._plans:
                descriptor = _open_shard(self.path / plan.file_name)
                self._descriptors[plan.file_name] = descriptor
                # Its whole length from the start on: whoever maps it reads no further than that.
                os.ftruncate(descriptor, plan.size_bytes)
                _pwrite(descriptor, memoryview(plan.head), 0)
            self._write_index()
        except OSError as error:
            problem = disk_error(self.folder, error)
            self.__exit__(type(problem), problem, None)
            raise problem from error
        self._whole.put(name for name, left in self._left.items() if not left)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        except BaseException as problem:
            self._whole.end(problem)
            self._close()
            self._partial.__exit__(type(problem), problem, None)
            raise
        self._whole.end(error)
        self._close()
        self._partial.__exit__(kind, error, trace)

    def files(self) -> Mapping[str, Mapping[str, TensorInfo]]:
        """Return the planned tensors of each file by its name, in the order of their bytes."""
        return {plan.file_name: plan.tensors for plan in self._plans}

    def is_written(self, name: str, offset_bytes: int, size_bytes: int) -> bool:
        """Return whether an earlier run wrote these bytes of the tensor already."""
        return False

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor of the planned shape and dtype.

        Raises:
            CheckpointError: another shape or dtype than planned.
            DiskError: the disk refused.
        """
        info = self._shards[name].tensors[name]
        got = (CODES.get(tensor.dtype), tuple(tensor.shape))
        if got != (info.dtype, info.shape):
            raise CheckpointError(
                "a tensor that is not what was planned",
                where=name,
                expected=f"{info.dtype} {info.shape}",
                got=f"{got[0]} {got[1]}",
            )
        self.write_bytes(name, 0, tensor_bytes(tensor))

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write rows from *start* of the first dimension on; each row once.

        Raises:
            CheckpointError: rows of another shape or dtype than planned.
            DiskError: the disk refused.
        """
        info = self._shards[name].tensors[name]
        fits = start + len(rows) <= info.shape[0] and tuple(rows.shape[1:]) == info.shape[1:]
        if not fits or CODES.get(rows.dtype) != info.dtype:
            raise CheckpointError(
                "rows that are not what was planned",
                where=name,
                expected=f"{info.dtype} {info.shape}",
                got=f"{rows.dtype} {tuple(rows.shape)} from row {start} on",
            )
        self.write_bytes(name, start * size_bytes(info.dtype, info.shape[1:]), tensor_bytes(rows))

    def write_bytes(self, name: str, offset_bytes: int, data: memoryview) -> None:
        """Write bytes at an offset of the tensor; each byte once.

        Raises:
            DiskError: the disk refused.
        """
        shard = self._shards[name]
        info = shard.tensors[name]
        try:
            _pwrite(self._descriptors[shard.file_name], data, info.start + offset_bytes)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        self._count(name, len(data))

    def copy_bytes(self, name: str, offset_bytes: int, source: int, start: int, count: int) -> None:
        """Copy *count* bytes of the file *source* from *start* on, inside the kernel; once each.

        Raises:
            DiskError: the disk refused.
        """
        shard = self._shards[name]
        at = shard.tensors[name].start + offset_bytes
        try:
            _copy_range(source, start, self._descriptors[shard.file_name], at, count)
        except OSError as error:
            raise disk_error(self.folder, error) from error
        self._count(name, count)

    def copy(self, names: Sequence[str], reader: Reader) -> None:
        """Copy tensors byte for byte; from local files inside the kernel, neighbours together.

        Raises:
            DiskError: the disk refused.
        """
        if isinstance(reader, DequantisedReader) and not reader.derived.intersection(names):
            reader = reader.plain
        if not isinstance(reader, SafetensorsReader):
            for name in names:
                self.write_bytes(name, 0, reader.read_raw(name))
            return
        for run in self._find_runs(names, reader):
            shard = self._shards[run[0]]
            stored = reader.stored[run[0]]
            start, end = stored.info.start, reader.stored[run[-1]].info.end
            target, at = self._descriptors[shard.file_name], shard.tensors[run[0]].start
            source = reader.file(stored.path).descriptor(start, end)
            assert source is not None  # a model is merged from files on this disk
            try:
                _copy_range(source, start, target, at, end - start)
            except OSError as error:
                raise disk_error(self.folder, error) from error
            for name in run:
                self._count(name, self._left[name])

    def fill(self) -> Filling:
        """Return the folder as it fills up; the files in it that hold no weights are all there.

        Raises:
            DiskError: a weight file cannot be opened for reading.
        """
        try:
            return Filling(self.path, self._plans, self._whole, self._own_files)
        except OSError as error:
            raise disk_error(self.folder, error) from error

    def _count(self, name: str, count: int) -> None:
        with self._lock:
            self._left[name] -= count
            is_whole = count > 0 and not self._left[name]
        if is_whole:
            self._whole.put((name,))

    def _find_runs(self, names: Sequence[str], reader: SafetensorsReader) -> list[list[str]]:
        """Return *names* in runs that lie side by side in both the source and the target."""
        runs: list[list[str]] = []
        end: tuple[object, ...] = ()
        for name in names:
            shard, stored = self._shards[name], reader.stored[name]
            target = shard.tensors[name]
            if (stored.path, shard.file_name, stored.info.start, target.start) != end:
                runs.append([])
            runs[-1].append(name)
            end = (stored.path, shard.file_name, stored.info.end, target.end)
        return runs

    def _finish(self) -> None:
        if missing := [f"{n}: {left} bytes" for n, left in self._left.items() if left]:
            raise CheckpointError(
                "tensors that were planned and not written",
                where=str(self.folder),
                problems=missing,
            )

    def _write_index(self) -> None:
        if [plan.file_name for plan in self._plans] != [f"{self._stem}.safetensors"]:
            index = self.path / f"{self._stem}.safetensors.index.json"
            index.write_text(json.dumps(describe_index(self._plans), indent=2), encoding="utf-8")

    def _close(self) -> None:
        _close_all(self._descriptors)


class Filling:
    """What a ``CheckpointWriter`` writes, for whoever follows it while it does.

    See ``loader.arriving.filling.FillingFolder``. *but* are no files of the model.
    """

    def __init__(
        self, folder: Path, plans: Sequence[ShardPlan], whole: Broadcast[str], but: Collection[str]
    ) -> None:
        self.heads = {plan.file_name: Head(plan.head, plan.size_bytes) for plan in plans}
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        # A part in a folder of its own may have weights of the same name.
        self.small_files = {n: p for n, p in files.items() if n not in {*self.heads, *but}}
        # The folder gets its name, and maybe another, before a follower asks.
        self._descriptors: dict[str, int] = {}
        weakref.finalize(self, _close_all, self._descriptors)
        for name in self.heads:
            self._descriptors[name] = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
        self._whole = whole

    def open(self, file_name: str) -> int:
        """Return a descriptor for reading a weight file: the caller's to close."""
        return os.dup(self._descriptors[file_name])

    def follow(self) -> Iterator[Collection[str]]:
        """Yield names of tensors as they are written.

        Raises:
            LoaderError: what ended the writing.
        """
        return self._whole.follow()


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def describe_index(plans: Sequence[ShardPlan]) -> dict[str, object]:
    """Return the content of ``*.safetensors.index.json`` for *plans*."""
    total = sum(info.size_bytes for plan in plans for info in plan.tensors.values())
    names = {name: plan.file_name for plan in plans for name in plan.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}


def _open_shard(path: Path) -> int:
    """Return the descriptor of a file that has no other name: an earlier run may have left it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o644)
    if os.fstat(descriptor).st_nlink == 1:
        return descriptor
    os.close(descriptor)
    path.unlink()
    return os.open(path, flags | os.O_EXCL, 0o644)


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _copy_range(source: int, start: int, target: int, at: int, count: int) -> None:
    done = 0
    while done < count:
        size = min(_COPY_BYTES, count - done)
        try:
            moved = os.copy_file_range(source, target, size, start + done, at + done)
        except OSError:
            # Another file system, or one that cannot: through memory, a piece at a time.
            piece = os.pread(source, min(size, 8 << 20), start + done)
            _pwrite(target, memoryview(piece), at + done)
            moved = len(piece)
        if moved == 0:
            raise OSError("a weight file became shorter while it was copied")
        done += moved
