"""The first bytes of artifacts that stay where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loader.errors import TransientError
from loader.fetch.sizes import check_size
from loader.http.objects import ObjectInfo
from loader.retry import ask_again
from loader.stores.base import Store
from loader.types import Artifact

_FIRST_BYTES = 1 << 16  # holds the header of most safetensors files


@dataclass(frozen=True, slots=True)
class Head:
    """The first bytes of an artifact, and how many it has in all."""

    content: bytes
    size_bytes: int


def read_head(
    artifact: Artifact, store: Store, needed: Callable[[Head], int], retries: int
) -> Head:
    """Return as many first bytes as *needed* says at the sight of some, by one or two reads.

    Raises:
        FetchError: they cannot be read.
    """

    def read() -> Head:
        info = check_size(artifact, store.stat(artifact), store)
        head = _read(artifact, store, info, Head(b"", info.size_bytes), _FIRST_BYTES)
        return _read(artifact, store, info, head, needed(head))

    return ask_again(read, retries)


def _read(artifact: Artifact, store: Store, info: ObjectInfo, head: Head, end: int) -> Head:
    """Return *head* made longer, to *end* bytes."""
    start = len(head.content) if info.ranges else 0
    end = min(end, info.size_bytes)
    if end <= len(head.content):
        return head
    content = bytearray(end - start)
    rest = memoryview(content)
    stream = store.open_range(artifact, start, end if info.ranges else info.size_bytes, info)
    try:
        while rest and (count := stream.readinto(rest)):
            rest = rest[count:]
    finally:
        stream.close()
    if rest:
        raise TransientError("the body ended before its length", where=artifact.source)
    return Head(head.content[:start] + bytes(content), info.size_bytes)
