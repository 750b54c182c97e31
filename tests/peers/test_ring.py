"""Homes of chunks, and the order of a pod's own."""

from __future__ import annotations

from collections import Counter

from loader.peers.chunks import CHUNK_BYTES, Chunk, SharedObject
from loader.peers.ring import WINDOW_CHUNKS, order_chunks, rank_homes

_PEERS = [f"10.0.0.{n}:8790" for n in range(20)]
_OBJECT = SharedObject("job/rank-0/model.safetensors", 600 * CHUNK_BYTES, '"tag"')


def test_homes_are_shared_out_and_the_same_for_everybody() -> None:
    chunks = [_OBJECT.chunk(n).name for n in range(600)]
    homes = Counter(rank_homes(chunk, _PEERS, 1)[0] for chunk in chunks)
    assert len(homes) == 20
    assert max(homes.values()) < 2.5 * 600 / 20
    assert all(rank_homes(c, _PEERS, 3) == rank_homes(c, _PEERS[::-1], 3) for c in chunks[:50])


def test_who_leaves_moves_its_own_chunks_alone_and_those_to_the_next_home() -> None:
    for number in range(100):
        chunk = _OBJECT.chunk(number).name
        first, second = rank_homes(chunk, _PEERS, 2)
        left = [peer for peer in _PEERS if peer != first]
        assert rank_homes(chunk, left, 1) == [second]
        other = next(peer for peer in _PEERS if peer not in (first, second))
        assert rank_homes(chunk, [p for p in _PEERS if p != other], 1) == [first]


def test_own_chunks_come_first_window_by_window_and_the_rest_in_an_order_of_its_own() -> None:
    chunks = [_OBJECT.chunk(n) for n in range(600)]

    def order(me: str) -> list[Chunk]:
        return order_chunks(chunks, me, lambda c: rank_homes(c.name, _PEERS, 1) == [me])

    mine = order(_PEERS[0])
    assert sorted(c.number for c in mine) == list(range(600))
    windows = [c.number // WINDOW_CHUNKS for c in mine]
    assert windows == sorted(windows)
    first = [rank_homes(c.name, _PEERS, 1) == [_PEERS[0]] for c in mine[:WINDOW_CHUNKS]]
    assert first == sorted(first, reverse=True)
    assert any(first)
    other = order(_PEERS[1])
    assert [c.number for c in mine] != [c.number for c in other]


def test_the_name_holds_path_size_and_version() -> None:
    names = {
        SharedObject(path, size, tag).name
        for path in ("a", "b")
        for size in (1, 2)
        for tag in ('"1"', '"2"')
    }
    assert len(names) == 8


def test_the_last_chunk_is_what_is_left() -> None:
    found = SharedObject("a", 2 * CHUNK_BYTES + 5, '"1"')
    assert [c.size_bytes for c in found.chunks(0, found.size_bytes)] == [CHUNK_BYTES] * 2 + [5]
    assert [c.number for c in found.chunks(CHUNK_BYTES, CHUNK_BYTES + 1)] == [1]
