"""What ``torch.save`` wrote, by byte ranges: its pickle is read, its tensors stay where they are.

::

    <prefix>/data.pkl      the pickle; names storages by key
    <prefix>/data/<key>    the bytes of a storage, stored, not compressed
    <prefix>/byteorder     "little"

One archive is a file, or a run of bytes [start, end) of one. Source of the format:
https://github.com/pytorch/pytorch/blob/main/docs/source/notes/serialization.rst
"""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from functools import cached_property

from loader.errors import FormatError, UnsupportedError
from loader.weights.byte_files import ByteFile
from loader.weights.formats.pieces import Piece
from loader.weights.formats.records import StorageRef, TensorRef
from loader.weights.formats.unpickling import unpickle
from loader.weights.header import size_bytes

MAX_PICKLE_BYTES = 1 << 30
_LOCAL_HEADER_BYTES = 30
_MOST_READ_BYTES = MAX_PICKLE_BYTES + (1 << 28)  # with the directory
_AHEAD_BYTES = 4096
_BROKEN = (  # what zipfile raises; RuntimeError for what is encrypted or not implemented
    zipfile.BadZipFile,
    struct.error,
    ValueError,
    RuntimeError,
    EOFError,
    OverflowError,
    MemoryError,
)


class Archive:
    """An archive in ``file[start:end)``: ``value`` is what was saved, tensors as ``TensorRef``.

    ``pickled`` is the pickle itself.
    """

    def __init__(self, file: ByteFile, start: int = 0, end: int | None = None) -> None:
        self.file = file
        self._start = start
        view = _View(file, start, file.size_bytes if end is None else end)
        self.where = f"{file.where} from byte {start}" if start else file.where
        try:
            with zipfile.ZipFile(io.BufferedReader(view, _AHEAD_BYTES)) as archive:
                self._entries = {info.filename: info for info in archive.infolist()}
                pickle_name = next((n for n in self._entries if n.endswith("/data.pkl")), None)
                if pickle_name is None:
                    raise self._broken("no data.pkl in it")
                self._prefix = pickle_name.removesuffix("data.pkl")
                self._check_sizes(view.size)
                self._check_order(archive)
                self.pickled = archive.read(pickle_name)
        except _BROKEN as error:
            raise self._broken(str(error) or type(error).__name__) from error
        self._starts: dict[str, int] = {}

    @cached_property
    def value(self) -> object:
        """What was saved.

        Raises:
            UnsupportedError, FormatError: as ``unpickle``.
        """
        return unpickle(self.pickled, self.where)

    def piece(self, tensor: TensorRef, offsets: tuple[int, ...] | None = None) -> Piece:
        """Return the whole of *tensor* as a piece, at *offsets* of a larger tensor.

        Raises:
            FormatError: the archive lacks its storage, or the storage is too short for it.
        """
        start = self._find_storage(tensor)
        element = size_bytes(tensor.dtype, (1,))
        return Piece(
            self.file,
            start + tensor.offset * element,
            tensor.dtype,
            offsets if offsets is not None else (0,) * len(tensor.shape),
            tensor.shape,
            None if _is_contiguous(tensor) else tensor.strides,
        )

    def _find_storage(self, tensor: TensorRef) -> int:
        storage = tensor.storage
        info = self._entries.get(f"{self._prefix}data/{storage.key}")
        if info is None:
            raise self._broken(f"no data/{storage.key} in it")
        needed = tensor.offset + _span(tensor)
        if needed * size_bytes(tensor.dtype, (1,)) > min(info.file_size, _bytes(storage)):
            raise self._broken(f"data/{storage.key} is too short for a tensor {tensor.shape}")
        if storage.key not in self._starts:
            head = bytearray(_LOCAL_HEADER_BYTES)
            self.file.read_into(self._start + info.header_offset, memoryview(head))
            name, extra = struct.unpack("<HH", head[26:30])
            if head[:4] != b"PK\x03\x04":
                raise self._broken(f"no zip entry where data/{storage.key} should be")
            begin = self._start + info.header_offset + _LOCAL_HEADER_BYTES + name + extra
            if begin + info.file_size > self.file.size_bytes:
                raise self._broken(f"data/{storage.key} ends behind the file")
            self._starts[storage.key] = begin
        return self._starts[storage.key]

    def _check_sizes(self, size: int) -> None:
        for name, info in self._entries.items():
            if info.compress_type != zipfile.ZIP_STORED or info.header_offset > size:
                raise self._broken(f"{name} is compressed or lies outside")
        for name, most in (("data.pkl", MAX_PICKLE_BYTES), ("byteorder", 16)):
            found = self._entries.get(f"{self._prefix}{name}")
            if found is not None and found.file_size > min(size, most):
                raise self._broken(f"an absurd size of {name}")

    def _check_order(self, archive: zipfile.ZipFile) -> None:
        name = f"{self._prefix}byteorder"
        if name in self._entries and archive.read(name) != b"little":
            raise UnsupportedError("a checkpoint of big-endian tensors", where=self.where)

    def _broken(self, got: str) -> FormatError:
        return FormatError(
            "a file of tensors that cannot be read",
            where=self.where,
            expected="what torch.save writes, whole",
            got=got,
            next_step="fetch the file again; it is damaged or was cut short when it was saved",
        )


def _is_contiguous(tensor: TensorRef) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size not in (1, 0) and stride != expected:
            return 0 in tensor.shape
        expected *= size
    return True


def _span(tensor: TensorRef) -> int:
    """Return how many elements of the storage it reaches over."""
    if 0 in tensor.shape:
        return 0
    return 1 + sum((s - 1) * d for s, d in zip(tensor.shape, tensor.strides, strict=True))


def _bytes(storage: StorageRef) -> int:
    return storage.count * size_bytes(storage.dtype, (1,))


@dataclass
class _View(io.RawIOBase):
    """``file[start:end)`` as a file object of its own, for zipfile."""

    file: ByteFile
    start: int
    end: int

    def __post_init__(self) -> None:
        self.end = min(self.end, self.file.size_bytes)
        self.size = max(0, self.end - self.start)
        self._at = 0
        self._left = _MOST_READ_BYTES

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError("a place before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.size - self._at))
        self._left -= count
        if self._left < 0:
            raise ValueError("a directory without end")
        self.file.read_into(self.start + self._at, memoryview(buffer)[:count])
        self._at += count
        return count
