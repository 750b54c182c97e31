"""Pieces of files -> the bytes of an output tensor, at their final offsets, block by block.

A run of a tensor's bytes goes from file to file as it is, or is cast on the way. Boxes that are
no runs (several dimensions were cut) are laid out in slabs of rows. Either way a few blocks are in
memory at a time, whatever the tensor's size.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from loader.weights.consolidate.files import LocalFile
from loader.weights.consolidate.pieces import Piece, SourceTensor, flat_start
from loader.weights.header import size_bytes
from loader.weights.readers import TORCH_DTYPES, tensor_bytes
from loader.weights.writer import CheckpointWriter

BLOCK_BYTES = 16 << 20
_far_reach = threading.Lock()  # one whole tensor in memory at a time
CASTABLE = frozenset({"F64", "F32", "F16", "BF16"})
DTYPE_NAMES: Mapping[str, str] = MappingProxyType(
    {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)


@dataclass(frozen=True, slots=True)
class Target:
    """An output tensor and what it is made of; ``dtype`` as in "BF16"."""

    name: str
    dtype: str
    source: SourceTensor

    @property
    def size_bytes(self) -> int:
        """The bytes it takes."""
        return size_bytes(self.dtype, self.source.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """What is written at one go: the run of *target* that a piece is, from element ``start`` on.

    ``piece`` is None for a whole tensor whose boxes are no runs.
    """

    target: Target
    piece: Piece | None
    start: int

    @property
    def order(self) -> tuple[str, int]:
        """The file that is needed last, and where in it; files are read, and arrive, in order."""
        if self.piece is not None:
            return self.piece.file.where, self.piece.start
        return max((piece.file.where, piece.start) for piece in self.target.source.pieces)


def find_parts(target: Target) -> list[Part]:
    """Return the parts of *target*: each of its pieces where all are runs, else one."""
    source = target.source
    starts = [flat_start(piece, source.grid) for piece in source.pieces]
    if None in starts:
        return [Part(target, None, 0)]
    pairs = zip(source.pieces, starts, strict=True)
    return [Part(target, piece, start) for piece, start in pairs if start is not None]


def write_part(part: Part, writer: CheckpointWriter, on_bytes: Callable[[int], None]) -> None:
    """Write *part*; *on_bytes* is told of the bytes written as they are.

    Raises:
        DiskError: the disk refused.
        FormatError: a file ended before its tensor did.
    """
    target, piece = part.target, part.piece
    at = part.start * size_bytes(target.dtype, (1,))
    if piece is not None and piece.dtype == target.dtype and isinstance(piece.file, LocalFile):
        writer.copy_bytes(target.name, at, piece.file.descriptor, piece.start, piece.size_bytes)
        on_bytes(piece.size_bytes)
        return
    for data in _read_part(part):
        writer.write_bytes(target.name, at, data)
        at += len(data)
        on_bytes(len(data))


def _read_part(part: Part) -> Iterator[memoryview]:
    if part.piece is not None:
        yield from _read_blocks(part.piece, part.target.dtype)
        return
    for slab in _lay_out(part.target.source, part.target.dtype):
        yield tensor_bytes(slab)


def is_same(a: SourceTensor, b: SourceTensor) -> bool:
    """Return whether two tensors are equal, byte for byte."""
    if a.pieces == b.pieces:
        return True
    if (a.dtype, a.shape) != (b.dtype, b.shape) or len(a.grid) != len(b.grid):
        return False
    pairs = zip(_lay_out(a, a.dtype), _lay_out(b, b.dtype), strict=True)
    return all(tensor_bytes(one) == tensor_bytes(other) for one, other in pairs)


def _read_blocks(piece: Piece, dtype: str) -> Iterator[memoryview]:
    """Give the elements of a piece in order, cast to *dtype*, some at a time."""
    element = size_bytes(piece.dtype, (1,))
    per_block = BLOCK_BYTES // element
    buffer = torch.empty(min(per_block, piece.count) * element, dtype=torch.uint8)
    for first in range(0, piece.count, per_block):
        count = min(per_block, piece.count - first)
        data = buffer[: count * element]
        piece.file.read_into(piece.start + first * element, data.numpy().data)
        if dtype == piece.dtype:
            yield data.numpy().data
        else:
            yield tensor_bytes(data.view(TORCH_DTYPES[piece.dtype]).to(TORCH_DTYPES[dtype]))


def _lay_out(source: SourceTensor, dtype: str) -> Iterator[torch.Tensor]:
    """Give the tensor's rows in order, cast to *dtype*, some at a time."""
    if not source.grid:
        yield _read_rows(source.pieces[0], 0, 1).reshape(1).to(TORCH_DTYPES[dtype])
        return
    rows, rest = source.grid[0], source.grid[1:]
    per_slab = max(1, BLOCK_BYTES // max(1, math.prod(rest) * size_bytes(source.dtype, (1,))))
    for first in range(0, rows, per_slab):
        last = min(first + per_slab, rows)
        slab = torch.empty((last - first, *rest), dtype=TORCH_DTYPES[source.dtype])
        for piece in source.pieces:
            begin, end = piece.offsets[0], piece.offsets[0] + piece.sizes[0]
            low, high = max(first, begin), min(last, end)
            if low < high:
                box = [slice(low - first, high - first)]
                inner = zip(piece.offsets[1:], piece.sizes[1:], strict=True)
                box += [slice(offset, offset + size) for offset, size in inner]
                slab[tuple(box)] = _read_rows(piece, low - begin, high - begin)
        yield slab.to(TORCH_DTYPES[dtype])


def _read_rows(piece: Piece, low: int, high: int) -> torch.Tensor:
    """Return rows [low, high) of a piece's box."""
    dtype, element = TORCH_DTYPES[piece.dtype], size_bytes(piece.dtype, (1,))
    if piece.strides is None:
        row = math.prod(piece.sizes[1:])
        raw = torch.empty((high - low) * row * element, dtype=torch.uint8)
        piece.file.read_into(piece.start + low * row * element, raw.numpy().data)
        return raw.view(dtype).reshape(high - low, *piece.sizes[1:])
    # Its elements lie apart, or its dimensions in another order: all that it reaches over is read.
    reach = sum((s - 1) * d for s, d in zip(piece.sizes, piece.strides, strict=True)) + 1
    with _far_reach if reach * element > BLOCK_BYTES else contextlib.nullcontext():
        raw = torch.empty(reach * element, dtype=torch.uint8)
        piece.file.read_into(piece.start, raw.numpy().data)
        return raw.view(dtype).as_strided(piece.sizes, piece.strides)[low:high].clone()
