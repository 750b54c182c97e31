"""A tensor whose boxes are no runs of its bytes, laid out in memory some rows at a time."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from loader.weights.formats.pieces import Piece, SourceTensor
from loader.weights.header import size_bytes
from loader.weights.readers import TORCH_DTYPES, tensor_bytes

BLOCK_BYTES = 8 << 20  # a thread holds one, and one more that is cast
# Of tensors that have to be read at once one is in memory at a time, or two that are compared.
_whole_tensor = threading.RLock()


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of a tensor; what ``read`` returns is valid until the next block is read."""

    size_bytes: int
    read: Callable[[], memoryview]


def find_slabs(source: SourceTensor, dtype: str) -> Iterator[Block]:
    """Give the tensor's rows in order, cast to *dtype*, in slabs of about 8 MiB."""
    slabs = _Slabs(source, dtype)
    with _whole_tensor if slabs.most_kept_bytes() > 2 * BLOCK_BYTES else contextlib.nullcontext():
        for first, last in slabs.spans:
            size = size_bytes(dtype, (last - first, *slabs.row_shape))
            yield Block(size, partial(slabs.read, first, last))
            slabs.forget(last)


class _Slabs:
    """``spans`` are the slabs' rows [first, last); all of them are laid out in one memory.

    Some pieces are read at once and kept until their last row is written: those whose elements lie
    apart, or in another order of dimensions, so that a row may be spread over all of their bytes.
    """

    def __init__(self, source: SourceTensor, dtype: str) -> None:
        rows, *rest = source.grid or (1,)
        self.row_shape = tuple(rest)
        row_bytes = size_bytes(source.dtype, self.row_shape)
        count = max(1, min(rows, BLOCK_BYTES // max(1, row_bytes)))
        self.spans = [(first, min(first + count, rows)) for first in range(0, rows, count)]
        self._pieces, self._dtype = source.pieces, TORCH_DTYPES[dtype]
        memory = _allocate(count * row_bytes).view(TORCH_DTYPES[source.dtype])
        self._memory = memory.reshape(count, *rest)
        self._kept: dict[int, torch.Tensor] = {}

    def read(self, first: int, last: int) -> memoryview:
        """Return rows [first, last)."""
        slab = self._memory[: last - first]
        for number, piece in enumerate(self._pieces):
            begin, end = _rows(piece)
            low, high = max(first, begin), min(last, end)
            if low < high:
                inner = zip(piece.offsets[1:], piece.sizes[1:], strict=True)
                box = (slice(low - first, high - first), *(slice(o, o + s) for o, s in inner))
                slab[box] = self._read_rows(number, low - begin, high - begin)
        return tensor_bytes(slab.to(self._dtype))

    def forget(self, last: int) -> None:
        """Drop what was kept and ends before row *last*."""
        for number in [n for n in self._kept if _rows(self._pieces[n])[1] <= last]:
            del self._kept[number]

    def most_kept_bytes(self) -> int:
        """Return the most that is kept at a time."""
        apart = [(*_rows(p), _reach_bytes(p)) for p in self._pieces if p.strides is not None]
        kept = (
            sum(reach for begin, end, reach in apart if begin < last and first < end)
            for first, last in self.spans
        )
        return max(kept, default=0)

    def _read_rows(self, number: int, low: int, high: int) -> torch.Tensor:
        """Return rows [low, high) of the box of a piece."""
        piece = self._pieces[number]
        if piece.strides is None:
            row_bytes = size_bytes(piece.dtype, piece.sizes[1:])
            raw = _allocate((high - low) * row_bytes)
            piece.file.read_into(piece.start + low * row_bytes, raw.numpy().data)
            return raw.view(TORCH_DTYPES[piece.dtype]).reshape(high - low, *piece.sizes[1:])
        if number not in self._kept:
            raw = _allocate(_reach_bytes(piece))
            piece.file.read_into(piece.start, raw.numpy().data)
            box = raw.view(TORCH_DTYPES[piece.dtype])
            self._kept[number] = box.as_strided(piece.sizes, piece.strides)
        return self._kept[number][low:high]


def _allocate(size_bytes: int) -> torch.Tensor:
    """Return memory that the system has back as soon as it is dropped; malloc keeps some of it."""
    return torch.frombuffer(mmap.mmap(-1, max(8, size_bytes)), dtype=torch.uint8)[:size_bytes]


def _rows(piece: Piece) -> tuple[int, int]:
    """Return the rows [begin, end) that a piece has a part of."""
    begin = piece.offsets[0] if piece.offsets else 0
    return begin, begin + (piece.sizes[0] if piece.sizes else 1)


def _reach_bytes(piece: Piece) -> int:
    steps = zip(piece.sizes, piece.strides or (), strict=True)
    return size_bytes(piece.dtype, (1 + sum((size - 1) * stride for size, stride in steps),))
