"""What one pod has of the sharing: its server, its peers, and a store in front of each origin.

::

    a fetch ── open_range ──► PeerStore ── chunk by chunk ──► Flight ◄── Courier ◄── peers, origin
                                                               │ ▲
    other pods ◄── ChunkServer ◄── memory, this disk ──────────┘ └── asked for as a chunk's home
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loader.config.credentials import Secret
from loader.config.settings import Settings
from loader.errors import ConfigError
from loader.fetch.missing_ranges import Range
from loader.fetch.snapshot import FetchOptions
from loader.http.client import HttpClient, HttpOptions
from loader.http.objects import ObjectInfo
from loader.http.trust import pinned_context
from loader.peers.access import Token, new_nonce
from loader.peers.chunks import CHUNK_BYTES, Chunk, SharedObject, shared_object
from loader.peers.courier import Counts, Courier, Origin
from loader.peers.flights import Flight, Flights
from loader.peers.held import Held, find_held
from loader.peers.members import HELLO_S, Members
from loader.peers.ring import order_chunks, rank_homes
from loader.peers.server import ChunkServer
from loader.stores.base import ByteStream, PendingResponse, Store
from loader.types import Artifact

_SETTLE_S = 1.0  # what a first read waits for the others to say that they are there
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class _Shared:
    """An object of this pod's, where it comes from and the folder that it is fetched into."""

    object: SharedObject
    origin: Origin
    root: Path


class Sharing:
    """Serves and asks, from ``open_sharing`` to ``close``. Any thread may call every method."""

    def __init__(self, settings: Settings, token: Secret) -> None:
        own_id, nonce = new_nonce(), new_nonce()
        certificate, key = settings.peers_certificate, settings.peers_key
        server_tls = _server_tls(certificate, key) if certificate else None
        client_tls = pinned_context(certificate) if certificate else None
        options = HttpOptions(
            connect_timeout_s=HELLO_S,
            stall_timeout_s=HELLO_S,
            link_local=True,
            certificate=certificate,
            proxies=False,
        )
        self.counts = Counts()
        self._blamed_bytes = 0
        self._retries = settings.retries
        self._objects: dict[str, _Shared] = {}
        self._taken: set[str] = set()  # chunks that this pod's fetch has read to their end
        self._flights = Flights()
        self._client = HttpClient(options)
        own_token = Token(token)
        self._members = Members(settings.peers, settings.peers_port, own_id, client_tls)
        self._courier = Courier(
            self._members,
            self._client,
            own_token,
            secure=certificate is not None,
            threads=2 * settings.concurrency,
            counts=self.counts,
        )
        self._server = ChunkServer(
            own_id,
            nonce,
            own_token,
            self._find_object,
            self._find_held,
            self._flights.find,
            self._start_flight,
            self._members.wake,
            bytes_per_s=settings.peers_upload_rate,
        )
        self._loop = asyncio.new_event_loop()
        self._settled = threading.Event()
        listening: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(settings.peers_port, server_tls, listening), name="peers"
        )
        self._thread.daemon = True
        self._thread.start()
        listening.result()

    @property
    def uploaded_bytes(self) -> int:
        """How much other pods were sent."""
        return self._server.uploaded_bytes

    def front(self, store: Store, root: Path) -> PeerStore:
        """Return *store* with the peers in front of it, for a fetch into *root*."""
        return PeerStore(self, store, root)

    def adapt(self, options: FetchOptions) -> FetchOptions:
        """Return *options* for a fetch by ``front``'s store."""
        return replace(options, order=self.order, is_curable=self.is_curable)

    def order(
        self, artifact: Artifact, info: ObjectInfo, missing: tuple[Range, ...]
    ) -> tuple[Range, ...]:
        """Return what is *missing* of an object in pieces, in the order to fetch them in."""
        found = shared_object(artifact, info)
        if found is None:
            return missing
        self.wait_settled()
        chunks = [chunk for hole in missing for chunk in found.chunks(hole.start, hole.end)]
        me, living = self._members.me, self._members.living()

        def is_mine(chunk: Chunk) -> bool:
            return rank_homes(chunk.name, living, 1) == [me]

        ordered = order_chunks(list(dict.fromkeys(chunks)), me or "", is_mine)
        return tuple(
            Range(max(chunk.start, hole.start), min(chunk.end, hole.end))
            for chunk in ordered
            for hole in missing
            if hole.start < chunk.end and chunk.start < hole.end
        )

    def is_curable(self) -> bool:
        """Return whether bytes came from peers, which the origin is asked for the next time."""
        before, self._blamed_bytes = self._blamed_bytes, self.counts.peer_bytes
        return self.counts.peer_bytes > before

    def wait_settled(self) -> None:
        """Wait a moment for the peers, once."""
        self._settled.wait(_SETTLE_S)
        self._settled.set()

    def share(
        self, artifact: Artifact, info: ObjectInfo, store: Store, root: Path
    ) -> SharedObject | None:
        """Let others have what this pod has of an object; None where it is not to be shared."""
        found = shared_object(artifact, info)
        if found is not None and found.name not in self._objects:
            origin = Origin(store, artifact, info, self._retries)
            self._objects[found.name] = _Shared(found, origin, root)
        return found

    def take(self, chunk: Chunk, *, again: bool) -> Flight:
        """Return a chunk's flight, for this pod; *again*: all of it is asked for.

        Where that was so before, its bytes were not what they should be.
        """
        origin = self._objects[chunk.of.name].origin
        distrusted = again and chunk.name in self._taken
        if distrusted:
            self._taken.discard(chunk.name)
            anew = Flight(chunk)
            self._courier.bring(anew, origin, distrusted=True)
            return anew
        found, is_new = self._flights.join(chunk, always=True)
        assert found is not None
        if is_new:
            self._courier.bring(found, origin, distrusted=False)
        return found

    def note_taken(self, flight: Flight) -> None:
        """Say that this pod's fetch has read all of a chunk."""
        flight.is_used = True
        self._taken.add(flight.chunk.name)

    def close(self) -> None:
        """Serve and ask no more."""
        self._courier.close()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._client.close()
        _log.info(
            "peers: %d bytes came from them and %d from the origin; they were sent %d",
            self.counts.peer_bytes,
            self.counts.origin_bytes,
            self.uploaded_bytes,
        )

    def _find_object(self, name: str) -> SharedObject | None:
        found = self._objects.get(name)
        return found.object if found is not None else None

    def _find_held(self, chunk: Chunk) -> Held | None:
        found = self._objects.get(chunk.of.name)
        return find_held(found.root, chunk) if found is not None else None

    def _start_flight(self, chunk: Chunk) -> Flight | None:
        flight, is_new = self._flights.join(chunk, always=False)
        if flight is not None and is_new:
            self._courier.bring_from_origin(flight, self._objects[chunk.of.name].origin)
        return flight

    def _run(self, port: int, tls: ssl.SSLContext | None, listening: Future[None]) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            server = self._loop.run_until_complete(self._server.listen(port, tls))
        except OSError as error:
            self._loop.close()
            listening.set_exception(
                ConfigError(
                    "the port for peers cannot be opened",
                    where=f"peers_port: {port}",
                    got=error.strerror or str(error),
                    next_step="choose another one, the same in every pod",
                )
            )
            return
        listening.set_result(None)
        members = self._loop.create_task(self._members.run())
        settling = self._loop.create_task(self._members.wait_settled(_SETTLE_S))
        settling.add_done_callback(lambda _: self._settled.set())
        self._loop.run_forever()
        server.close()
        members.cancel()
        for task in (pending := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.close()


class PeerStore:
    """A ``Store`` whose large objects come from peers where these have them."""

    def __init__(self, sharing: Sharing, store: Store, root: Path) -> None:
        self._sharing, self._store, self._root = sharing, store, root
        self.stat = store.stat
        self.listed_size = store.listed_size
        self.close = store.close

    def open_first(self, artifact: Artifact, end: int) -> ByteStream:
        """Return the bytes ``[0, end)`` of the version there is. Raises as ``Store.open_first``."""
        if (artifact.size_bytes or 0) < CHUNK_BYTES:
            return self._store.open_first(artifact, end)
        info = self._store.stat(artifact)
        return self.open_range(artifact, 0, min(end, info.size_bytes), info)

    def send_first(self, artifact: Artifact, end: int) -> PendingResponse:
        """Ask what ``open_first`` asks; of large objects when the response is received."""
        if (artifact.size_bytes or 0) < CHUNK_BYTES:
            return self._store.send_first(artifact, end)
        return PendingResponse(partial(self.open_first, artifact, end))

    def open_range(
        self, artifact: Artifact, start: int, end: int, version: ObjectInfo
    ) -> ByteStream:
        """Return the bytes ``[start, end)`` of *version*. Raises as ``Store.open_range`` does."""
        shared = self._sharing.share(artifact, version, self._store, self._root)
        if shared is None:
            return self._store.open_range(artifact, start, end, version)
        self._sharing.wait_settled()
        return PeerStream(self._sharing, shared, version, start, end)


class PeerStream:
    """A ``ByteStream`` out of chunks."""

    def __init__(
        self, sharing: Sharing, shared: SharedObject, info: ObjectInfo, start: int, end: int
    ) -> None:
        self._sharing, self.info = sharing, info
        self._place, self._start, self._end = start, start, end
        self._chunks: Iterator[Chunk] = shared.chunks(start, end)
        self._flight: Flight | None = None
        self._is_aborted = False

    def readinto(self, buffer: memoryview, /) -> int:
        """Put what is there into *buffer* and return the count, 0 at the range's end."""
        if self._place == self._end or not buffer:
            return 0
        if self._flight is None:
            chunk = next(self._chunks)
            whole = self._start <= chunk.start and chunk.end <= self._end
            self._flight = self._sharing.take(chunk, again=whole)
        flight, chunk = self._flight, self._flight.chunk
        readable = flight.wait(self._place - chunk.start, lambda: self._is_aborted)
        end = min(chunk.start + readable, self._end, self._place + len(buffer))
        count = end - self._place
        at = self._place - chunk.start
        buffer[:count] = memoryview(flight.data)[at : at + count]
        self._place = end
        if end == chunk.end:
            self._sharing.note_taken(flight)
            self._flight = None
        return count

    def abort(self) -> None:
        """Make a read that waits in another thread fail now."""
        self._is_aborted = True
        if (flight := self._flight) is not None:
            flight.tell()

    def close(self) -> None:
        """Do nothing more."""
        self._is_aborted = True


_lock = threading.Lock()
_current: Sharing | None = None
_ending: threading.Timer | None = None


def beside(
    settings: Settings, store: Store, root: Path, options: FetchOptions
) -> tuple[Store, FetchOptions]:
    """Return *store* and *options* for a fetch into *root*, with the settings' peers in front.

    There is one ``Sharing`` in a process, which goes on until ``linger`` ends it.

    Raises:
        ConfigError: no token, a wrong address, a port that is taken.
    """
    global _current
    if settings.peers_token is None:
        raise ConfigError(
            "peers without a token",
            where="peers",
            expected="a secret that all pods share",
            next_step="set the secret podloader_peers_token, or PODLOADER_PEERS_TOKEN",
        )
    with _lock:
        if _ending is not None:
            _ending.cancel()
        if _current is None:
            _current = Sharing(settings, settings.peers_token)
        return _current.front(store, root), _current.adapt(options)


def linger(seconds: float) -> None:
    """Serve peers for so long still, if they are served; return at once."""
    global _ending
    with _lock:
        if _current is None:
            return
        if _ending is not None:
            _ending.cancel()
        _ending = threading.Timer(seconds, _end)
        _ending.daemon = True
        _ending.start()


def wait_lingering() -> None:
    """Wait until peers are served no more."""
    if (ending := _ending) is not None:
        ending.join()


def _end() -> None:
    global _current
    with _lock:
        sharing, _current = _current, None
    if sharing is not None:
        sharing.close()


def _server_tls(certificate: Path, key: Path | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "the peers' certificate cannot be read",
            where=str(certificate),
            got=str(error),
            next_step="correct peers_certificate and peers_key",
        ) from None
    return context
