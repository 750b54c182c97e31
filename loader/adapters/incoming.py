"""A base whose weights are still being fetched: what is known of them, and when they are there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loader.weights.stored import StoredTensor


@dataclass(frozen=True, slots=True)
class IncomingWeights:
    """The weights of a base.

    ``tensors`` say where each will lie, from headers read at the origin; ``arriving`` gives the
    names of those that are there, as soon as they are, and ends when all files are whole and
    proved; ``open`` returns a descriptor of a file of which something is there.
    """

    tensors: Mapping[str, StoredTensor]
    arriving: Iterable[Collection[str]]
    open: Callable[[Path], int]
