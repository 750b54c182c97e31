"""An origin that sends exactly the bytes that a test writes, over plain TCP or TLS."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Talk = Callable[[socket.socket, bytes], bool | None]
"""Answers one request on a connection and says whether it stays open."""


class RawOrigin:
    """Counts connections, keeps requests, and lets *talk* answer."""

    def __init__(self, talk: Talk, context: ssl.SSLContext | None = None) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self._talk = talk
        self._context = context
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        scheme = "https" if context else "http"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        """Close everything."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in self._open:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.connections += 1
                self._open.append(sock)
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_side=True)
            with sock:
                held = b""
                while True:
                    while b"\r\n\r\n" not in held:
                        if not (more := sock.recv(1 << 16)):
                            return
                        held += more
                    request, _, held = held.partition(b"\r\n\r\n")
                    self.requests.append(request)
                    if not self._talk(sock, request):
                        return


@contextmanager
def answering(talk: Talk | bytes, context: ssl.SSLContext | None = None) -> Iterator[RawOrigin]:
    """Give an origin that says *talk* to every request, and closes where that is bytes alone."""

    def say(sock: socket.socket, _request: bytes) -> None:
        assert isinstance(talk, bytes)
        sock.sendall(talk)

    origin = RawOrigin(say if isinstance(talk, bytes) else talk, context)
    try:
        yield origin
    finally:
        origin.stop()
