"""Pieces of files -> the bytes of an output tensor, at their final offsets, block by block.

A run of a tensor's bytes goes from file to file as it is, or is cast on the way. Boxes that are
no runs (several dimensions were cut) are laid out in slabs of rows. Either way a few blocks are in
memory at a time, whatever the tensor's size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch

from loader.weights.formats.pieces import Piece, SourceTensor, flat_start
from loader.weights.formats.slabs import BLOCK_BYTES, Block, find_slabs
from loader.weights.header import size_bytes
from loader.weights.readers import TORCH_DTYPES, tensor_bytes
from loader.weights.writer import CheckpointWriter

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


def describe_sources(targets: Sequence[Target]) -> str:
    """Return a digest of which bytes of which files *targets* are made of, and how."""
    described = hashlib.sha256()
    for target in targets:
        source = target.source
        described.update(f"{target.name} {target.dtype} {source.shape} {source.grid}".encode())
        for p in source.pieces:
            place = (p.file.where, p.start, p.dtype, p.offsets, p.sizes, p.strides)
            described.update(repr(place).encode())
    return described.hexdigest()[:16]


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
    """Write *part*, but for what an earlier run wrote; *on_bytes* is told of bytes that are there.

    Raises:
        DiskError: the disk refused.
        FormatError: a file ended before its tensor did.
    """
    target, piece = part.target, part.piece
    at = part.start * size_bytes(target.dtype, (1,))
    for needed in (piece,) if piece is not None else target.source.pieces:
        source = needed.file.descriptor(needed.start, needed.start + needed.size_bytes)  # waits
        if needed is piece and source is not None and piece.dtype == target.dtype:
            writer.copy_bytes(target.name, at, source, piece.start, piece.size_bytes)
            on_bytes(piece.size_bytes)
            return
    for block in _find_blocks(part):
        if not writer.is_written(target.name, at, block.size_bytes):
            writer.write_bytes(target.name, at, block.read())
        at += block.size_bytes
        on_bytes(block.size_bytes)


def is_same(a: SourceTensor, b: SourceTensor) -> bool:
    """Return whether two tensors are equal, byte for byte."""
    if a.pieces == b.pieces:
        return True
    if (a.dtype, a.shape) != (b.dtype, b.shape) or len(a.grid) != len(b.grid):
        return False
    pairs = zip(find_slabs(a, a.dtype), find_slabs(b, b.dtype), strict=True)
    return all(one.read() == other.read() for one, other in pairs)


def _find_blocks(part: Part) -> Iterator[Block]:
    """Give the bytes of *part* in order."""
    piece, dtype = part.piece, part.target.dtype
    if piece is None:
        yield from find_slabs(part.target.source, dtype)
        return
    element = size_bytes(piece.dtype, (1,))
    per_block = BLOCK_BYTES // element
    buffer = torch.empty(min(per_block, piece.count) * element, dtype=torch.uint8)
    for first in range(0, piece.count, per_block):
        count = min(per_block, piece.count - first)
        read = partial(_read_run, piece, first, buffer[: count * element], dtype)
        yield Block(size_bytes(dtype, (count,)), read)


def _read_run(piece: Piece, first: int, buffer: torch.Tensor, dtype: str) -> memoryview:
    """Return the elements of *piece* from *first* on that fill *buffer*, cast to *dtype*."""
    piece.file.read_into(piece.start + first * size_bytes(piece.dtype, (1,)), buffer.numpy().data)
    if dtype == piece.dtype:
        return buffer.numpy().data
    return tensor_bytes(buffer.view(TORCH_DTYPES[piece.dtype]).to(TORCH_DTYPES[dtype]))
