"""Chunks in memory on their way here: asked for once, whoever wants them, and handed on at once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from loader.errors import TransientError
from loader.peers.chunks import Chunk

MOST_FLIGHTS = 24
"""Chunks in memory (16 MiB each); more only where this pod itself fetches more at a time."""
_WANTED_S = 30.0  # how long one is kept that this pod's own fetch has not come to


class Flight:
    """One chunk. ``data`` is whole and proved when ``is_whole``; ``crc`` is the sum of it then.

    One thread fills it; any others read what is there. ``readable`` bytes may be used already.
    ``is_sourced``: it comes from the origin. ``is_promoted``: other pods take this one for its
    home, so it has to; two that wait for each other would wait for ever.
    """

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk
        self.data = bytearray(chunk.size_bytes)
        self.readable = 0
        self.crc: int | None = None
        self.error: BaseException | None = None
        self.is_sourced = self.is_promoted = False
        self.is_used = False  # this pod's own fetch has taken it
        self.since = time.monotonic()
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_whole(self) -> bool:
        """Whether all of it is here."""
        return self.crc is not None

    @property
    def is_coming(self) -> bool:
        """Whether bytes of it are here, or it waits for nobody but the origin."""
        return self.is_sourced or self.readable > 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.is_whole or self.error is not None

    def advance(self, readable: int, crc: int | None = None) -> None:
        """Say how much may be used; with its *crc* it is whole."""
        with self._changed:
            self.readable, self.crc = readable, crc
        self.tell()

    def fail(self, error: BaseException) -> None:
        """Say that it will not come."""
        self.error = error
        self.tell()

    def tell(self) -> None:
        """Let all who wait look again."""
        with self._changed:
            self._changed.notify_all()
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call *listener* at every change, in any thread."""
        with self._changed:
            self._listeners.append(listener)

    def unlisten(self, listener: Callable[[], None]) -> None:
        """Call it no more."""
        with self._changed:
            self._listeners.remove(listener)

    def wait(self, place: int, is_aborted: Callable[[], bool]) -> int:
        """Return how much may be used, as soon as that is more than *place*.

        Raises:
            LoaderError: it will not come.
            TransientError: *is_aborted* says so; ``tell`` makes it look.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.readable > place or self.error is not None or is_aborted()
            )
            if is_aborted():
                raise TransientError("the read was ended", where=self.chunk.of.path)
            if self.readable <= place:
                assert self.error is not None
                raise self.error
            return self.readable


class Flights:
    """The chunks in memory. Every method may be called from any thread."""

    def __init__(self, most: int = MOST_FLIGHTS) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._found: OrderedDict[str, Flight] = OrderedDict()

    def find(self, chunk: Chunk) -> Flight | None:
        """Return the chunk's flight, if there is one that has not failed."""
        with self._lock:
            return self._find(chunk)

    def join(self, chunk: Chunk, *, always: bool) -> tuple[Flight | None, bool]:
        """Return the chunk's flight, and whether it is new: the caller has to fill it then.

        None where there is no room for it, which *always* does not ask for.
        """
        with self._lock:
            flight = self._find(chunk)
            if flight is not None:
                return flight, False
            if not self._make_room() and not always:
                return None, False
            flight = self._found[chunk.name] = Flight(chunk)
            return flight, True

    def renew(self, chunk: Chunk) -> Flight:
        """Return a new flight in the place of the chunk's, whose bytes are not to be read again."""
        with self._lock:
            flight = self._found[chunk.name] = Flight(chunk)
            return flight

    def _find(self, chunk: Chunk) -> Flight | None:
        flight = self._found.get(chunk.name)
        return flight if flight is not None and flight.error is None else None

    def _make_room(self) -> bool:
        """Drop what is not wanted any more, the oldest first; return whether one more fits."""
        long_ago = time.monotonic() - _WANTED_S
        for name, flight in list(self._found.items()):
            if len(self._found) < self._most:
                break
            wanted = not flight.is_used and flight.since > long_ago
            if flight.error is not None or (flight.is_whole and not wanted):
                del self._found[name]
        return len(self._found) < self._most
