"""Real forward proxies on the loopback interface: CONNECT tunnels, and plain requests."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseRequestHandler, ThreadingTCPServer
from urllib.parse import urlsplit


class Proxy(ThreadingHTTPServer):
    """Tunnels every host to ``port`` of this machine, or refuses that with a status."""

    daemon_threads = True

    def __init__(
        self, port: int, *, refusal: int = 0, handler: type[BaseHTTPRequestHandler] | None = None
    ) -> None:
        self.port = port
        self.refusal = refusal
        self.asked: list[tuple[str, str | None]] = []
        super().__init__(("127.0.0.1", 0), handler or _Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        """Its host and port."""
        return f"127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """Tunnel no more."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_CONNECT(self) -> None:
        """Join both ends until one closes."""
        self.server.asked.append((self.path, self.headers["Proxy-Authorization"]))
        if self.server.refusal:
            self.send_error(self.server.refusal)
            return
        with socket.create_connection(("127.0.0.1", self.server.port)) as behind:
            self.send_response(200)
            self.end_headers()
            back = threading.Thread(target=_pump, args=(behind, self.connection), daemon=True)
            back.start()
            _pump(self.connection, behind)
            back.join()
        self.close_connection = True

    def do_GET(self) -> None:
        """Refuse what did not come through a tunnel."""
        self.server.asked.append((urlsplit(self.path).netloc, None))
        self.send_error(405)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


class PlainProxy(Proxy):
    """Forwards plain requests for every host to ``port``."""

    def __init__(self, port: int) -> None:
        super().__init__(port, handler=_PlainHandler)


class _PlainHandler(_Handler):
    def do_GET(self) -> None:
        """Forward."""
        parts = urlsplit(self.path)
        self.server.asked.append((parts.netloc, self.headers["Proxy-Authorization"]))
        own = {n: v for n, v in self.headers.items() if not n.startswith("Proxy-")}
        behind = http.client.HTTPConnection("127.0.0.1", self.server.port)
        behind.request("GET", f"{parts.path}?{parts.query}", headers=own)
        answer = behind.getresponse()
        body = answer.read()
        behind.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


class TlsFront(ThreadingTCPServer):
    """Ends TLS in front of ``port`` of this machine."""

    daemon_threads = True

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self.port = port
        self.context = context
        super().__init__(("127.0.0.1", 0), _TlsHandler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def server_port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    def stop(self) -> None:
        """Answer no more."""
        self.shutdown()
        self.server_close()


class _TlsHandler(BaseRequestHandler):
    server: TlsFront

    def handle(self) -> None:
        """Join both ends until one closes."""
        try:
            taken = self.server.context.wrap_socket(self.request, server_side=True)
        except OSError:
            return  # a client that does not trust us
        with taken, socket.create_connection(("127.0.0.1", self.server.port)) as behind:
            back = threading.Thread(target=_pump, args=(behind, taken), daemon=True)
            back.start()
            _pump(taken, behind)
            back.join()
