"""Brings chunks here: from their homes, from whoever has them, from the origin.

A chunk has a home among the living peers, which alone asks the origin for it; everybody else asks
the home. Where that one is dead the next home does, and then this pod itself.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from loader.errors import DeniedError, FetchError, LoaderError, TransientError
from loader.fetch.crc import crc64nvme
from loader.fetch.range_read import read_range
from loader.http.body import HttpStream
from loader.http.client import HttpClient
from loader.http.objects import ObjectInfo
from loader.peers.access import ASK, PROOF, SENDER, Token
from loader.peers.chunks import Chunk
from loader.peers.flights import Flight
from loader.peers.members import HELLO_S, Members
from loader.peers.ring import rank_homes
from loader.peers.server import SUM
from loader.stores.base import Store
from loader.types import Artifact

_HOMES = 4
_ASKED_YOUNG, _YOUNG_S = 24, 20.0  # pods that are asked whether they have it, and for how long
_BUSY_S = 30.0  # for how long a home may say that it is busy
_PAUSE_S = 0.2
_SILENT_S = 0.9 * HELLO_S  # what a try took that ran out of time
_SLOW_S, _TIMES_SLOWER = 2.0, 4.0
_SAMPLED_BYTES = 64 << 10
_SAMPLED_ONE_IN = 32
_log = logging.getLogger("podloader")


@dataclass(slots=True)
class Counts:
    """Bytes by where they came from; ``wrong`` chunks were not what the origin has."""

    origin_bytes: int = 0
    peer_bytes: int = 0
    wrong: int = 0


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an object is asked for when no peer has it."""

    store: Store
    artifact: Artifact
    info: ObjectInfo
    retries: int


class Given(NamedTuple):
    """Who gave a chunk, home or holder, and what its bytes sum up to."""

    peer: str
    crc: int


class Courier:
    """Fills flights, on threads of its own. Every method may be called from any thread."""

    def __init__(
        self,
        members: Members,
        client: HttpClient,
        token: Token,
        *,
        secure: bool,
        threads: int,
        counts: Counts,
    ) -> None:
        self._members = members
        self._client = client
        self._token = token
        self._scheme = "https" if secure else "http"
        self._pool = ThreadPoolExecutor(threads, "peers")
        self._lock = threading.Lock()
        self._given: dict[str, Given] = {}  # by chunks' names
        self._began = time.monotonic()
        self._typical_bytes_s = 0.0  # of chunks that peers have given
        self._stop = threading.Event()
        self._counts = counts

    def bring(self, flight: Flight, origin: Origin, *, distrusted: bool) -> None:
        """Fill *flight*; *distrusted* is a chunk whose bytes were given here before."""

        def run() -> None:
            try:
                self._bring(flight, origin, distrusted)
            except BaseException as error:
                flight.fail(error)

        try:
            self._pool.submit(run)
        except RuntimeError:  # closed
            flight.fail(TransientError("the fetch is over", where=flight.chunk.of.path))

    def close(self) -> None:
        """Begin nothing more."""
        self._stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _bring(self, flight: Flight, origin: Origin, distrusted: bool) -> None:
        chunk = flight.chunk
        if distrusted:
            self._ask_origin(flight, origin)
            self._judge(flight)
            return
        began = time.monotonic()
        is_young = began - self._began < _YOUNG_S
        homes = rank_homes(chunk.name, self._members.living(), _ASKED_YOUNG)
        me = self._members.me
        is_home = not homes or homes[0] == me
        if not (is_home and is_young):  # pods that start together know few of each other
            homes = homes[:_HOMES]
        for place, peer in enumerate(homes):
            if flight.is_promoted and not is_home:
                break
            if peer == me:
                if not is_home:
                    break  # those before do not answer: it is this pod's turn
                continue
            # One that was the home before this pod came may have it already.
            held_only = is_home or place == _HOMES - 1
            if time.monotonic() - began > _SILENT_S:  # one of those before was silent
                self._stop.wait(_PAUSE_S)
                if not self._members.is_sure(peer):
                    continue
            with contextlib.suppress(FetchError):
                given = self._ask_home(flight, peer, held_only=held_only)
                if self._is_sound(flight, origin, given.peer):
                    self._finish(flight, given)
                    return
        self._ask_origin(flight, origin)

    def _ask_home(self, flight: Flight, peer: str, *, held_only: bool) -> Given:
        """Fill the flight's memory from *peer*, or from who has it from there; say by whom.

        Raises:
            FetchError: it does not give the chunk.
        """
        until, tries = time.monotonic() + _BUSY_S, 0
        while not (self._stop.is_set() or (flight.is_promoted and not held_only)):
            began = time.monotonic()
            try:
                return self._ask_peer(flight, peer, held_only=held_only)
            except TransientError as error:
                is_silent = not error.busy and time.monotonic() - began >= _SILENT_S
                tries += not error.busy
                if is_silent:
                    self._members.doubt()
                if tries > 1 or is_silent or time.monotonic() > until:
                    if tries > 1 or is_silent:
                        self._members.fail(peer)
                    raise
                if error.busy and (given := self._ask_holders(flight, peer)):
                    return given
                self._stop.wait(_PAUSE_S * random.uniform(0.5, 1.0))
        raise TransientError("a peer is not waited for any more", where=flight.chunk.of.path)

    def _ask_holders(self, flight: Flight, home: str) -> Given | None:
        """Fill the flight's memory from one of those that have it from *home*, if one gives it."""
        with contextlib.suppress(FetchError):
            stream, _ = self._open(home, f"/objects/{flight.chunk.name}/holders")
            with contextlib.closing(stream):
                holders = stream.read_all(4096).decode("latin-1").split(",")
            living = set(self._members.living()) - {self._members.me, home}
            for peer in random.sample(holders, len(holders)):
                if peer in living:
                    with contextlib.suppress(FetchError):
                        return self._ask_peer(flight, peer, held_only=True)
        return None

    def _ask_peer(self, flight: Flight, peer: str, *, held_only: bool) -> Given:
        target = f"/objects/{flight.chunk.name}{'?held' if held_only else ''}"
        stream, digest = self._open(peer, target)
        buffer, place = memoryview(flight.data), 0
        with contextlib.closing(stream):
            if stream.info.size_bytes != len(buffer):
                raise FetchError("a peer's chunk of another size", where=f"{peer}{target}")
            began = time.monotonic()
            while place < len(buffer) and (count := stream.readinto(buffer[place:])):
                place += count
                self._check_pace(peer, place, time.monotonic() - began)
        self._note_pace(place, time.monotonic() - began)
        if not digest:
            digest = self._ask_sum(flight.chunk, peer)
        crc = crc64nvme(buffer)
        if digest != f"{crc:016x}":
            self._counts.wrong += 1
            raise FetchError("a peer's bytes do not sum up", where=f"{peer}{target}")
        return Given(peer, crc)

    def _check_pace(self, peer: str, count: int, seconds: float) -> None:
        """Raise FetchError where *peer* is much slower than others have been."""
        if seconds > _SLOW_S and count < seconds * self._typical_bytes_s / _TIMES_SLOWER:
            self._members.rest(peer)
            raise FetchError("a peer that is much slower than others", where=peer)

    def _note_pace(self, count: int, seconds: float) -> None:
        rate = count / max(seconds, 1e-3)
        known = self._typical_bytes_s or rate
        self._typical_bytes_s = known + (rate - known) / 8

    def _ask_sum(self, chunk: Chunk, peer: str) -> str:
        target = f"/objects/{chunk.name}/sum"
        for _ in range(10):
            with contextlib.suppress(TransientError):
                stream, digest = self._open(peer, target)
                stream.close()
                return digest
        raise FetchError("a peer does not say what its bytes sum up to", where=peer)

    def _open(self, peer: str, target: str) -> tuple[HttpStream, str]:
        """Return a peer's answer, proved to be its own, and the digest that it tells."""
        nonce = self._members.nonce(peer)
        if not nonce:
            raise FetchError("the peer is not there", where=peer)
        own, asking = self._token.ask(nonce, target)
        headers = {ASK: asking, SENDER: self._members.me or ""}
        try:
            stream = self._client.get(f"{self._scheme}://{peer}{target}", headers=headers)
        except DeniedError:  # it was started anew, or has another token
            self._members.fail(peer)
            raise
        digest = stream.fields.get(SUM.lower(), "")
        proof = stream.fields.get(PROOF.lower(), "")
        if not self._token.is_proof(proof, nonce, own, target, digest):
            stream.close()
            self._members.shun(peer)
            _log.warning("peers: %s does not hold the token; it is not asked again", peer)
            raise FetchError("a peer that does not hold the token", where=peer)
        return stream, digest

    def _ask_origin(self, flight: Flight, origin: Origin) -> None:
        """Fill the flight from the origin, to be read as it comes."""
        flight.is_sourced = True
        buffer, crc, place = memoryview(flight.data), 0, 0

        def come(done: int) -> None:
            nonlocal crc, place
            crc = crc64nvme(buffer[place:done], crc)
            self._counts.origin_bytes += done - place
            place = done
            if done < len(buffer):
                flight.advance(done)

        self._read(origin, flight.chunk.start, buffer, origin.retries, come)
        flight.advance(len(buffer), crc)

    def _read(
        self,
        origin: Origin,
        start: int,
        buffer: memoryview,
        retries: int,
        on_bytes: Callable[[int], None] = lambda done: None,
    ) -> None:
        read_range(
            origin.artifact,
            origin.store,
            origin.info,
            start,
            buffer,
            retries,
            on_bytes=on_bytes,
            stop=self._stop,
        )

    def _is_sound(self, flight: Flight, origin: Origin, peer: str) -> bool:
        """Return whether a sample of what *peer* gave is what the origin has; most are not taken.

        An origin that does not answer has nothing against it.
        """
        if random.randrange(_SAMPLED_ONE_IN):
            return True
        chunk = flight.chunk
        size = min(_SAMPLED_BYTES, chunk.size_bytes)
        start = random.randrange(chunk.size_bytes - size + 1)
        sample = bytearray(size)
        try:
            self._read(origin, chunk.start + start, memoryview(sample), 0)
        except LoaderError:
            return True
        self._counts.origin_bytes += size
        if sample == flight.data[start : start + size]:
            return True
        self._blame(peer, chunk)
        return False

    def _finish(self, flight: Flight, given: Given) -> None:
        with self._lock:
            self._given[flight.chunk.name] = given
        self._counts.peer_bytes += flight.chunk.size_bytes
        flight.advance(flight.chunk.size_bytes, given.crc)

    def _judge(self, flight: Flight) -> None:
        """Shun who gave the chunk before, where the origin's bytes are others."""
        with self._lock:
            given = self._given.pop(flight.chunk.name, None)
        if given is not None and given.crc != flight.crc:
            self._blame(given.peer, flight.chunk)

    def _blame(self, peer: str, chunk: Chunk) -> None:
        self._counts.wrong += 1
        self._members.shun(peer)
        _log.warning(
            "peers: %s sent other bytes of %s than the origin has; it is not asked again",
            peer,
            chunk.of.path,
        )
