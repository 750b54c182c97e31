"""Connections to an origin: plain or TLS, through a proxy's tunnel where one is needed."""

from __future__ import annotations

import socket
from collections.abc import Callable

from loader.http.response import Inbox
from loader.http.sockets import PlainSocket


class Connection:
    """A socket, and what has come on it."""

    def __init__(self, sock: PlainSocket) -> None:
        self.sock = sock
        self.inbox = Inbox(sock)

    def close(self) -> None:
        """Close it, once no answer is read from it any more."""
        self.sock.close()


def connect(
    host: str,
    port: int,
    timeout_s: float,
    tunnel: Callable[[socket.socket], None] | None = None,
    secure: Callable[[socket.socket], PlainSocket] = PlainSocket,
) -> Connection:
    """Return a connection; *secure* makes it what the origin speaks.

    *tunnel* makes a proxy at *host* pass on all that comes behind it, or raises.

    Raises:
        OSError: that cannot be.
    """
    plain = socket.create_connection((host, port), timeout_s)
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tunnel is not None:
            tunnel(plain)
            plain.settimeout(timeout_s)
        return Connection(secure(plain))
    except BaseException:
        plain.close()
        raise
