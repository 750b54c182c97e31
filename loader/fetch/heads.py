"""The first bytes of artifacts that stay where they are."""

from __future__ import annotations

from collections.abc import Callable

from loader.fetch.range_read import read_range
from loader.fetch.sizes import ask_version
from loader.stores.base import Store
from loader.types import Artifact, Head

_FIRST_BYTES = 1 << 16  # holds the header of most safetensors files


def read_head(
    artifact: Artifact, store: Store, needed: Callable[[Head], int], retries: int
) -> Head:
    """Return as many first bytes as *needed* says at the sight of some, by one or two reads.

    Raises:
        FetchError: they cannot be read.
    """

    info = ask_version(artifact, store, retries)

    def read(head: Head, end: int) -> Head:
        """Return *head* made longer, to *end* bytes."""
        start, end = len(head.content) if info.ranges else 0, min(end, info.size_bytes)
        if end <= len(head.content):
            return head
        content = bytearray(end - start)
        read_range(artifact, store, info, start, memoryview(content), retries)
        return Head(head.content[:start] + bytes(content), info.size_bytes)

    head = read(Head(b"", info.size_bytes), _FIRST_BYTES)
    return read(head, needed(head))
