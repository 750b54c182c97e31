"""Which pod is whose chunk's home, and in which order a pod takes the chunks.

Decisions alone: every pod that knows the same peers decides the same, without asking anybody.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Collection, Sequence

from loader.peers.chunks import Chunk

WINDOW_CHUNKS = 256
"""Chunks are taken in any order within so many (4 GiB), so that what stands in front comes first
and yet not every pod asks the same few homes at the same time."""


def rank_homes(chunk: str, peers: Collection[str], count: int) -> list[str]:
    """Return the first *count* homes of a chunk, by rendezvous hashing (Thaler, Ravishankar 1998).

    Who comes or goes moves only the chunks that it is the home of.
    """
    return heapq.nsmallest(count, peers, key=lambda peer: _hash(peer, chunk))


def order_chunks(chunks: Sequence[Chunk], me: str, is_mine: Callable[[Chunk], bool]) -> list[Chunk]:
    """Return *chunks* in the order in which the pod *me* takes them.

    Window by window; in each first those that it is the home of, which others wait for, then the
    others in an order of its own.
    """

    def place(chunk: Chunk) -> tuple[int, bool, int]:
        return chunk.number // WINDOW_CHUNKS, not is_mine(chunk), _hash(me, chunk.name)

    return sorted(chunks, key=place)


def _hash(peer: str, chunk: str) -> int:
    digest = hashlib.blake2b(f"{peer} {chunk}".encode(), digest_size=8).digest()
    return int.from_bytes(digest)
