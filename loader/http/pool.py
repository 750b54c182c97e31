"""Connections that wait for their next request, and what is known of the origins they lead to."""

from __future__ import annotations

import threading

from loader.http.connection import Connection
from loader.http.request import Origin

_PATIENCE_S = 2.0  # with a body that is slow, doubled each time that the same one is


class Pool:
    """The idle connections of one client. Every method may be called from any thread.

    A body has to bring ``least_bytes_per_s``, and may be slow for ``longest_s`` at most.
    """

    def __init__(self, least_bytes_per_s: int, longest_s: float) -> None:
        self.least_bytes_per_s = least_bytes_per_s
        self.longest_s = longest_s
        self._lock = threading.Lock()
        self._closed = False
        self._idle: dict[Origin, list[Connection]] = {}
        self._isolated: set[Origin] = set()  # whose connections bear one request
        self._slow: dict[str, int] = {}  # how often a URL's bodies were

    def take(self, origin: Origin) -> Connection | None:
        """Return a connection that is open, and on which nothing came since it was given back."""
        while True:
            with self._lock:
                idle = self._idle.get(origin)
                kept = idle.pop() if idle else None
            if kept is None or (more := kept.peek()) is None:
                return kept
            if more:
                self.isolate(origin)
            kept.close()

    def give_back(self, origin: Origin, connection: Connection) -> None:
        """Keep a connection whose last body was read to its end."""
        with self._lock:
            if not self._closed and origin not in self._isolated:
                self._idle.setdefault(origin, []).append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close every connection, and those that are given back from now on."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def isolate(self, origin: Origin) -> None:
        """Let each connection bear one request: it sends what nobody asked for."""
        self._isolated.add(origin)

    def patience_s(self, url: str) -> float:
        """Return how long a body may be slow: longer each time that it was cut off for it."""
        return min(_PATIENCE_S * (1 << self._slow.get(url, 0)), self.longest_s)

    def note_slow(self, url: str) -> None:
        """Have more patience with *url* the next time."""
        self._slow[url] = min(self._slow.get(url, 0) + 1, 10)
