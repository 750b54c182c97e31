"""Where ZeRO puts a parameter's elements: flattened, padded, cut between ranks. Pure.

::

    stage 1, 2   per group: [p0 p1 p2 … padding], cut into one run per rank
    stage 3      per parameter: cut into equal runs, one per rank, the last padded; each rank keeps
                 its runs one behind the other, over all groups

Source: deepspeed/utils/zero_to_fp32.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [start, start + count) of a rank's group are those from *offset* of a parameter."""

    rank: int
    group: int
    start: int
    count: int
    offset: int


def cut_flattened(
    groups: Sequence[Shapes],
    paddings: Sequence[Sequence[int]],
    sizes: Sequence[Sequence[int]],
) -> dict[str, list[Run]]:
    """Return the runs of stages 1 and 2; ``sizes[group][rank]`` in elements, paddings behind each.

    A parameter that reaches behind the last partition has runs that make up less than it.
    """
    found: dict[str, list[Run]] = {}
    for number, shapes in enumerate(groups):
        padding = iter(paddings[number]) if number < len(paddings) else iter(())
        at = 0
        for name, shape in shapes.items():
            count = math.prod(shape)
            found[name] = list(_split(at, count, number, sizes[number]))
            at += count + next(padding, 0)
    return found


def cut_each(shapes: Shapes, sizes: Sequence[int], ranks: int) -> dict[str, list[Run]]:
    """Return the runs of stage 3; ``sizes[group]`` in elements, the same on every rank."""
    found: dict[str, list[Run]] = {}
    at = 0
    for name, shape in shapes.items():
        total = math.prod(shape)
        part = math.ceil(total / ranks)
        runs: list[Run] = []
        for rank in range(min(ranks, math.ceil(total / part) if part else 0)):
            offset = rank * part
            inner = _split(at, max(0, min(part, total - offset)), rank, sizes)
            runs += [Run(rank, r.rank, r.start, r.count, offset + r.offset) for r in inner]
        found[name] = runs
        at += part
    return found


def _split(at: int, count: int, group: int, sizes: Sequence[int]) -> Iterator[Run]:
    """Give the runs of [at, at + count) over partitions of these *sizes*, one behind the other."""
    begin = 0
    for index, size in enumerate(sizes):
        low, high = max(at, begin), min(at + count, begin + size)
        if low < high:
            yield Run(index, group, low - begin, high - low, low - at)
        begin += size
