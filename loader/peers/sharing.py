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
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from loader.config.credentials import Secret
from loader.config.settings import Settings
from loader.errors import ConfigError
from loader.fetch.missing_ranges import Range
from loader.fetch.snapshot import FetchOptions
from loader.http.client import HttpClient, HttpOptions
from loader.http.objects import ObjectInfo
from loader.http.trust import pinned_context, server_tls
from loader.peers.access import Token, new_nonce
from loader.peers.chunks import Chunk, SharedObject, shared_object
from loader.peers.courier import Counts, Courier, Origin
from loader.peers.flights import Flight, Flights
from loader.peers.held import Held, find_held
from loader.peers.members import HELLO_S, RAY, Members
from loader.peers.ring import order_chunks, rank_homes
from loader.peers.server import ChunkServer
from loader.ray_cluster import join_cluster, own_address
from loader.stores.base import Store
from loader.types import Artifact

_SETTLE_S = 2.0  # what a first read waits for the others to say that they are there
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
        host = None
        if settings.peers == (RAY,):
            join_cluster()
            host = own_address()  # nodes may share a machine
        certificate = settings.peers_certificate
        own_tls = server_tls(certificate, settings.peers_key) if certificate else None
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
            target=self._run, args=(host, settings.peers_port, own_tls, listening), name="peers"
        )
        self._thread.daemon = True
        self._thread.start()
        listening.result()

    @property
    def uploaded_bytes(self) -> int:
        """How much other pods were sent."""
        return self._server.uploaded_bytes

    def adapt(self, options: FetchOptions) -> FetchOptions:
        """Return *options* for a fetch by a ``PeerStore``."""
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
            anew = self._flights.renew(chunk)
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
            origin = self._objects[chunk.of.name].origin
            self._courier.bring(flight, origin, distrusted=False)
        return flight

    def _run(
        self, host: str | None, port: int, tls: ssl.SSLContext | None, listening: Future[None]
    ) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            server = self._loop.run_until_complete(self._server.listen(port, tls, host))
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
        # asyncio loses a socket that it has accepted where the task of that is ended.
        self._loop.run_until_complete(asyncio.sleep(0.05))
        writers = self._server.writers
        members.cancel()
        for task in (pending := asyncio.all_tasks(self._loop)):
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.run_until_complete(self._server.drop(writers))
        self._loop.close()
