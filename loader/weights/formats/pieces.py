"""A tensor as pieces of files: which bytes fill which box of it. Pure: nothing is read here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loader.weights.byte_files import ByteFile
from loader.weights.header import size_bytes


@dataclass(frozen=True, slots=True)
class Piece:
    """The box [offsets, offsets + sizes) of a tensor's grid, beginning at byte *start* of a file.

    Its elements lie one after another, the last dimension fastest; else ``strides`` (in elements)
    say how.
    """

    file: ByteFile
    start: int
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """The number of its elements."""
        return math.prod(self.sizes)

    @property
    def size_bytes(self) -> int:
        """The bytes of its elements."""
        return size_bytes(self.dtype, self.sizes)


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the checkpoint.

    ``grid`` is the shape that the pieces' boxes refer to: ``shape``, or ``(elements,)`` where a
    framework cuts flattened tensors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    pieces: tuple[Piece, ...]


def find_holes(tensor: SourceTensor) -> list[str]:
    """Return what is wrong with the pieces of *tensor*: boxes outside of it, overlaps, holes."""
    total = math.prod(tensor.grid)
    problems = []
    for piece in tensor.pieces:
        fits = len(piece.sizes) == len(piece.offsets) == len(tensor.grid) and all(
            o + s <= g for o, s, g in zip(piece.offsets, piece.sizes, tensor.grid, strict=True)
        )
        if not fits:
            box = describe_box(piece.offsets, piece.sizes)
            problems.append(f"{tensor.name}: {box} lies outside of {list(tensor.grid)}")
    if problems:
        return problems
    covered = sum(piece.count for piece in tensor.pieces)
    if covered < total:
        return [f"{tensor.name}: {total - covered} of {total} elements are nowhere"]
    if covered > total or _overlap(tensor.pieces):
        return [f"{tensor.name}: pieces that overlap"]
    return []


def describe_box(offsets: Sequence[int], sizes: Sequence[int]) -> str:
    """Return a box as text: ``[0:97, 0:128]``."""
    return "[" + ", ".join(f"{o}:{o + s}" for o, s in zip(offsets, sizes, strict=True)) + "]"


def flat_start(piece: Piece, grid: tuple[int, ...]) -> int | None:
    """Return where in the flattened grid the piece's elements lie as one run, None if they do not.

    In elements.
    """
    if piece.strides is not None:
        return None
    partial = [d for d, (s, g) in enumerate(zip(piece.sizes, grid, strict=True)) if s != g]
    if partial and any(size != 1 for size in piece.sizes[: partial[-1]]):
        return None
    start = 0
    for offset, size in zip(piece.offsets, grid, strict=True):
        start = start * size + offset
    return start


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Return whether two boxes share elements; sorted by the first dimension, neighbours only."""
    ordered = sorted((p for p in pieces if p.count), key=lambda p: p.offsets)
    open_: list[Piece] = []
    for piece in ordered:
        if not piece.offsets:
            return len(ordered) > 1
        open_ = [p for p in open_ if p.offsets[0] + p.sizes[0] > piece.offsets[0]]
        if any(_meet(p, piece) for p in open_):
            return True
        open_.append(piece)
    return False


def _meet(a: Piece, b: Piece) -> bool:
    return all(
        ao < bo + bs and bo < ao + asize
        for ao, asize, bo, bs in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )
