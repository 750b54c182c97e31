"""A service in front of moto's: S3 as its errors are worded, where a test wants some."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

Refusal = tuple[int, str]


class Front(ThreadingHTTPServer):
    """Passes every request on, but for those that ``refuse`` answers with a status and a code.

    ``connections`` counts them, ``asked`` holds targets and ranges.
    """

    daemon_threads = True

    def __init__(self, url: str) -> None:
        self.behind = urlsplit(url).netloc
        self.refuse: Callable[[str, str], Refusal | None] = lambda target, span: None
        self.tag: Callable[[str], str] = lambda tag: tag
        """What is told in the place of an ETag."""
        self.drop = {"connection", "date"}
        """Headers that are not passed on."""
        self.asked: list[tuple[str, str]] = []
        self.connections = 0
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        """What ``s3_endpoint_url`` has to be."""
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """Answer no more."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Front

    def setup(self) -> None:
        """Count the connection."""
        super().setup()
        self.server.connections += 1

    def do_GET(self) -> None:
        """Refuse, or pass on."""
        span = self.headers.get("Range", "")
        self.server.asked.append((self.path, span))
        refusal = self.server.refuse(self.path, span)
        if refusal is not None:
            body = f"<Error><Code>{refusal[1]}</Code><Message>No.</Message></Error>".encode()
            self._answer(refusal[0], {"Content-Type": "application/xml"}, body)
            return
        behind = http.client.HTTPConnection(self.server.behind)
        pinned = {"if-match"} if self.server.tag('""') != '""' else set()
        asked = {n: v for n, v in self.headers.items() if n.lower() not in pinned}
        behind.request(self.command, self.path, headers=asked)
        answer = behind.getresponse()
        body = answer.read()
        headers = {
            n: v
            for n, v in answer.getheaders()
            if n.lower() not in {"connection", "date"} | self.server.drop
        }
        headers = {n: self.server.tag(v) if n.lower() == "etag" else v for n, v in headers.items()}
        self._answer(answer.status, headers, body)
        behind.close()

    do_HEAD = do_GET  # noqa: N815 - the base's name

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""
