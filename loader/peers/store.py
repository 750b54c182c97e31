"""A store with peers in front of it, and the one ``Sharing`` of a process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from loader.config.settings import Settings
from loader.errors import ConfigError
from loader.fetch.snapshot import FetchOptions
from loader.http.objects import ObjectInfo
from loader.peers.chunks import CHUNK_BYTES, Chunk, SharedObject
from loader.peers.flights import Flight
from loader.peers.sharing import Sharing
from loader.stores.base import ByteStream, PendingResponse, Store
from loader.types import Artifact

_lock = threading.Lock()
_current: Sharing | None = None
_ending: threading.Timer | None = None


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
        return PeerStore(_current, store, root), _current.adapt(options)


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
