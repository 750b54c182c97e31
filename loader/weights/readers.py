"""Tensors by name from files: read as wanted, nothing mapped, nothing kept.

Reading goes by ``pread`` into fresh memory: a process that merges a model of any size holds a few
rows of it at a time, and pages of a mapped file do not count against the pod.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, Self

import torch

from loader.errors import FormatError
from loader.weights.byte_files import ByteFile, LocalFile
from loader.weights.header import TensorInfo
from loader.weights.stored import StoredTensor, find_weight_files, list_tensors, refuse_pickle

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "U16": torch.uint16,
        "I16": torch.int16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "C64": torch.complex64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
    }
)
CODES: Mapping[torch.dtype, str] = MappingProxyType({d: code for code, d in TORCH_DTYPES.items()})


_SMALL = 64 << 20  # which one element may be expanded to


@dataclass(frozen=True, slots=True)
class Block:
    """A contiguous tensor to be used again and again, and its memory as bytes."""

    tensor: torch.Tensor
    data: memoryview

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Self:
        """Return the block of *tensor*."""
        return cls(tensor, tensor_bytes(tensor))


class Reader(Protocol):
    """Tensors by name; what merging, consolidating and writing read from."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors; the offsets are those of the file that holds each."""

    @property
    def derived(self) -> frozenset[str]:
        """Those that are computed from what is stored: their bytes lie nowhere as they are."""

    def follow(self) -> Iterator[Collection[str]]:
        """Yield the names of tensors as they are there to be read, until all are."""

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor, as stored, in memory of its own."""

    def read_rows(self, name: str, start: int, end: int, out: Block | None = None) -> torch.Tensor:
        """Return rows [start, end) of the first dimension, as stored, in memory of their own.

        ``out``, of their shape and dtype, is memory to be used for them.
        """

    def read_raw(self, name: str) -> memoryview:
        """Return the tensor's bytes as safetensors stores them."""


class SafetensorsReader:
    """A ``Reader`` over safetensors files; keeps each open until closed.

    ``open_path`` opens one, and ``follow`` gives the names of tensors as their bytes come, for
    files that are not here yet.
    """

    derived: frozenset[str] = frozenset()

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        open_path: Callable[[Path], ByteFile] = LocalFile,
        follow: Callable[[], Iterator[Collection[str]]] | None = None,
    ) -> None:
        self.stored = stored
        self._open_path = open_path
        self._follow = follow
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: tensor.info for name, tensor in stored.items()}
        )
        self._files: dict[Path, ByteFile] = {}
        self._lock = threading.Lock()

    def follow(self) -> Iterator[Collection[str]]:
        """Yield the names of tensors as they are there to be read.

        Raises:
            LoaderError: they do not come.
        """
        return self._follow() if self._follow else iter((tuple(self.tensors),))

    def file(self, path: Path) -> ByteFile:
        """Return a file of *stored*, open."""
        with self._lock:
            if path not in self._files:
                self._files[path] = self._open_path(path)
            return self._files[path]

    def read(self, name: str) -> torch.Tensor:
        """Return the whole tensor.

        Raises:
            FormatError: the file became shorter, or torch has no such dtype.
        """
        info = self.stored[name].info
        return self._pread(name, info.start, info.end).reshape(info.shape)

    def read_rows(self, name: str, start: int, end: int, out: Block | None = None) -> torch.Tensor:
        """Return rows [start, end) of the first dimension, in the memory of *out* if given.

        Raises:
            FormatError: as ``read``.
        """
        info = self.stored[name].info
        stride = info.size_bytes // max(1, info.shape[0])
        if out is not None:
            self._fill(out.data, self.stored[name], info.start + start * stride)
            return out.tensor
        rows = self._pread(name, info.start + start * stride, info.start + end * stride)
        return rows.reshape(end - start, *info.shape[1:])

    def read_raw(self, name: str) -> memoryview:
        """Return the tensor's bytes.

        Raises:
            FormatError: the file became shorter.
        """
        stored = self.stored[name]
        buffer = bytearray(stored.info.size_bytes)
        self._fill(memoryview(buffer), stored, stored.info.start)
        return memoryview(buffer)

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pread(self, name: str, start: int, end: int) -> torch.Tensor:
        stored = self.stored[name]
        dtype = TORCH_DTYPES.get(stored.info.dtype)
        if dtype is None:
            raise FormatError(
                "a dtype that torch cannot hold",
                where=f"{stored.path}: {name}",
                expected=", ".join(TORCH_DTYPES),
                got=stored.info.dtype,
                next_step="convert the checkpoint to bfloat16",
            )
        raw = torch.empty(end - start, dtype=torch.uint8)
        self._fill(raw.numpy().data, stored, start)
        return raw.view(dtype)

    def _fill(self, buffer: memoryview, stored: StoredTensor, start: int) -> None:
        self.file(stored.path).read_into(start, buffer)


class MemoryReader:
    """A ``Reader`` over tensors in memory, such as those of a pickle."""

    derived: frozenset[str] = frozenset()

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {
                n: TensorInfo(n, CODES[t.dtype], tuple(t.shape), 0, t.nbytes)
                for n, t in _typed(tensors)
            }
        )

    def follow(self) -> Iterator[Collection[str]]:
        """Yield all names at once."""
        yield tuple(self.tensors)

    def read(self, name: str) -> torch.Tensor:
        """Return a copy of the tensor."""
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def read_rows(self, name: str, start: int, end: int, out: Block | None = None) -> torch.Tensor:
        """Return a copy of rows [start, end)."""
        rows = self._tensors[name].detach()[start:end]
        return rows.clone(memory_format=torch.contiguous_format)

    def read_raw(self, name: str) -> memoryview:
        """Return the tensor's bytes."""
        return tensor_bytes(self.read(name))


def _typed(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, torch.Tensor]]:
    if odd := [f"{n}: {t.dtype}" for n, t in tensors.items() if t.dtype not in CODES]:
        raise FormatError("dtypes that safetensors cannot hold", problems=odd)
    return list(tensors.items())


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def open_weights(
    folder: Path, *, stem: str = "model", allow_pickle: bool = False
) -> SafetensorsReader | MemoryReader:
    """Return a reader over the weights of *folder*.

    Raises:
        FormatError: no weights, broken files, or a pickle without ``allow_pickle``.
    """
    files = find_weight_files(folder, stem)
    if not files.pickled:
        return SafetensorsReader(list_tensors(files))
    if not allow_pickle:
        raise refuse_pickle(files.paths[0])
    tensors: dict[str, torch.Tensor] = {}
    for path in files.paths:
        tensors |= load_pickle(path)
    return MemoryReader(tensors)


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a torch pickle, by the restricted unpickler only.

    Raises:
        FormatError: it holds anything but tensors by name.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # torch raises a dozen kinds for a bad file
        raise FormatError(
            "a pickle that the restricted unpickler refuses",
            where=str(path),
            expected="a state dict of tensors, and nothing else",
            got=str(error).splitlines()[0][:300] if str(error) else type(error).__name__,
            next_step="save with safe_serialization=True",
        ) from error
    if not isinstance(found, dict) or not all(isinstance(t, torch.Tensor) for t in found.values()):
        raise FormatError(
            "a pickle that is no state dict",
            where=str(path),
            expected="tensors by name",
            got=type(found).__name__,
            next_step="save with safe_serialization=True",
        )
    claimed = {
        n: t for n, t in found.items() if t.nbytes > max(_SMALL, t.untyped_storage().nbytes())
    }
    if claimed:
        raise FormatError(
            "tensors of a pickle that are larger than what is stored of them",
            where=str(path),
            problems=[f"{name}: {list(tensor.shape)}" for name, tensor in claimed.items()],
            next_step="save with safe_serialization=True",
        )
    return {str(name): tensor for name, tensor in found.items()}
