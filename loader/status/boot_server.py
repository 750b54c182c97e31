"""The small HTTP server that answers on the serving port until the engine takes it over.

Standard library only: it answers before anything else of podloader is imported.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from loader.errors import ConfigError
from loader.status.replies import reply
from loader.status.state import Boot

_BACKLOG = 2048  # as uvicorn's: connections wait here while the port changes hands
_CLIENT_TIMEOUT_S = 5.0
_POLL_S = 0.02
_MOST_BODY_BYTES = 1 << 24


def listen(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket.

    Raises:
        ConfigError: the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(
            "the serving port cannot be opened",
            where=f"{host or '0.0.0.0'}:{port}",
            got=error.strerror or str(error),
            next_step="choose another: podloader serve CONFIG -- --port PORT",
        ) from None
    return listening


def server_tls(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """Return what serves https with the files that ``--ssl-certfile`` and ``--ssl-keyfile`` name.

    Raises:
        ConfigError: they cannot be read.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            "the TLS certificate cannot be read", where=str(certificate), got=str(error)
        ) from None
    return context


class BootServer:
    """Answers on *listening* from threads of its own until ``stop``; never closes the socket."""

    def __init__(
        self,
        listening: socket.socket,
        boot: Callable[[], Boot],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._server = _Server(listening, boot, tls)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_S,), name="status", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Accept no more; a second call does nothing. Connections that were accepted are answered.

        Those that come from now on wait in the socket's queue for whoever accepts next.
        """
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(
        self, listening: socket.socket, boot: Callable[[], Boot], tls: ssl.SSLContext | None
    ) -> None:
        super().__init__(listening.getsockname()[:2], _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.boot = boot
        self.tls = tls

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Answer on a connection, after the TLS handshake where there is one. On its thread."""
        request.settimeout(_CLIENT_TIMEOUT_S)
        if self.tls is not None:
            request = self.tls.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)
        if self.tls is not None:
            request.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: probes break off all the time."""


class _Handler(BaseHTTPRequestHandler):
    """One request a connection, so that nothing waits on this server when it stops."""

    protocol_version = "HTTP/1.1"
    timeout = _CLIENT_TIMEOUT_S
    server: _Server

    def __getattr__(self, name: str) -> Callable[[], None]:
        """Return what answers a method: the same for all of them."""
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        self._drain()
        answer = reply(self.path, self.server.boot())
        self.send_response(answer.status)
        headers = {
            "Content-Type": answer.content_type,
            "Content-Length": str(len(answer.body)),
            "Connection": "close",
            **answer.headers,
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Say nothing: a probe every second is no news."""

    def version_string(self) -> str:
        """Return what the ``Server`` header says."""
        return "podloader"

    def _drain(self) -> None:
        """Read the body: closing a connection with unread bytes would take the answer along."""
        with contextlib.suppress(ValueError):
            left = min(int(self.headers.get("Content-Length", 0)), _MOST_BODY_BYTES)
            while left > 0 and (data := self.rfile.read(min(left, 1 << 16))):
                left -= len(data)
