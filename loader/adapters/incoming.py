"""A base whose weights are still being fetched: what is known of them, and when they are there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from loader.weights.listing import StoredTensor


@dataclass(frozen=True, slots=True)
class IncomingWeights:
    """The weights of a base.

    ``tensors`` say where each will lie, from headers read at the origin; ``files`` gives the names
    of the files that are whole, as soon as they are.
    """

    tensors: Mapping[str, StoredTensor]
    files: Iterable[Collection[str]]
