"""Objects in chunks of one size, under names that every pod gives them.

An object is what its path, its size and its strong validator say; what has no such validator may be
two versions in two pods, and is never shared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from loader.http.objects import ObjectInfo
from loader.types import Artifact

CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class SharedObject:
    """One version of an artifact; ``path`` is its own, below a download folder."""

    path: str
    size_bytes: int
    version: str

    @cached_property
    def name(self) -> str:
        """What pods call it: 32 hex digits."""
        text = json.dumps([self.path, self.size_bytes, self.version])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def chunk(self, number: int) -> Chunk:
        """Return the chunk with that number, from 0 on."""
        start = number * CHUNK_BYTES
        return Chunk(self, number, start, min(start + CHUNK_BYTES, self.size_bytes))

    def chunks(self, start: int, end: int) -> Iterator[Chunk]:
        """Yield the chunks that the bytes ``[start, end)`` touch."""
        for number in range(start // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            yield self.chunk(number)


@dataclass(frozen=True)
class Chunk:
    """The bytes ``[start, end)`` of an object."""

    of: SharedObject
    number: int
    start: int
    end: int

    @property
    def name(self) -> str:
        """What pods call it."""
        return f"{self.of.name}/{self.number}"

    @property
    def size_bytes(self) -> int:
        """Its size; the last one's is what is left."""
        return self.end - self.start


def shared_object(artifact: Artifact, info: ObjectInfo) -> SharedObject | None:
    """Return what pods share of *artifact*; None where that is not worth it, or not safe."""
    if not info.ranges or not info.is_pinned or info.size_bytes < CHUNK_BYTES:
        return None
    assert info.version is not None
    return SharedObject(artifact.path, info.size_bytes, info.version)
