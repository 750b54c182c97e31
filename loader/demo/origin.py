"""A local origin of signed URLs that end, as a training platform's storage gives them.

Files lie as in the platform's bucket, ``training_projects/<project>/jobs/<job>/rank-<N>/…``; URLs
carry ``AWSAccessKeyId``, ``Expires`` and ``Signature`` (the form of SigV2). GET with ranges and
``If-Match``; HEAD is refused, as it is by URLs signed for GET.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

PROJECT = "demo"
_RANGE = re.compile(r"bytes=(\d+)-(\d+)$")
_COPY_BYTES = 1 << 20


class Origin(ThreadingHTTPServer):
    """Serves *root* on a free port of the loopback interface until ``stop`` is called."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, root: Path, *, lifetime_s: float = 3600, handler: type[Handler] | None = None
    ) -> None:
        self.root = root
        self.lifetime_s = lifetime_s
        self._secret = secrets.token_bytes(32)
        super().__init__(("127.0.0.1", 0), handler or Handler)

    def start(self) -> Origin:
        """Serve on a thread and return the origin itself."""
        threading.Thread(
            target=self.serve_forever, args=(0.02,), name="origin", daemon=True
        ).start()
        return self

    def stop(self) -> None:
        """Answer no more."""
        self.shutdown()
        self.server_close()

    def sign(self, path: str, *, expires: int | None = None) -> str:
        """Return the URL of the file at *path* below the root; ``expires`` in epoch seconds."""
        ends = int(time.time() + self.lifetime_s) if expires is None else expires
        query = {
            "AWSAccessKeyId": "DEMO",
            "Signature": self.signature(path, ends),
            "Expires": str(ends),
        }
        return f"http://127.0.0.1:{self.server_port}/{quote(path)}?{urlencode(query)}"

    def signature(self, path: str, expires: int) -> str:
        """Return what a URL of *path* that ends at *expires* has to carry."""
        text = f"GET\n{expires}\n/{path}".encode()
        return base64.b64encode(hmac.digest(self._secret, text, hashlib.sha1)).decode()

    def listing(self, job: str, *, with_sizes: bool = False) -> dict[str, object]:
        """Return what ``truss train get_checkpoint_urls`` would for *job*."""
        folder = self.root / "training_projects" / PROJECT / "jobs" / job
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        artifacts: list[dict[str, object]] = []
        for path in files:
            rank, _, name = path.relative_to(folder).as_posix().partition("/")
            artifact: dict[str, object] = {
                "url": self.sign(path.relative_to(self.root).as_posix()),
                "relative_file_name": name,
                "node_rank": int(rank.removeprefix("rank-")),
            }
            artifacts.append(artifact | ({"size_bytes": path.stat().st_size} if with_sizes else {}))
        return {
            "timestamp": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "job": {"id": job, "training_project": {"id": PROJECT, "name": PROJECT}},
            "checkpoint_artifacts": artifacts,
        }

    def write_listing(self, job: str, path: Path) -> Path:
        """Write ``listing(job)`` to *path* and return it."""
        path.write_text(json.dumps(self.listing(job), indent=1), encoding="utf-8")
        return path


class Handler(BaseHTTPRequestHandler):
    """Answers one request after the other on a connection."""

    protocol_version = "HTTP/1.1"
    server: Origin

    def do_GET(self) -> None:
        """Answer with a file or a range of it."""
        parts = urlsplit(self.path)
        path = unquote(parts.path).lstrip("/")
        if not self._is_signed(path, parts.query):
            return
        try:
            file = (self.server.root / path).open("rb")
        except OSError:
            self.refuse(404, "NoSuchKey", "The specified key does not exist.")
            return
        with file:
            self.send_object(file.fileno())

    def do_HEAD(self) -> None:
        """Refuse: the URLs are signed for GET."""
        self.refuse(403, "SignatureDoesNotMatch", "")

    def send_object(self, fd: int) -> None:
        """Answer with the open file, whole or the range that was asked for."""
        found = os.fstat(fd)
        tag = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
        if self.headers.get("If-Match", tag) != tag:
            self.refuse(412, "PreconditionFailed", "")
            return
        start, end = 0, found.st_size
        if match := _RANGE.match(self.headers.get("Range", "")):
            start, end = int(match[1]), min(int(match[2]) + 1, found.st_size)
            if start >= end:
                self.refuse(416, "InvalidRange", "", {"Content-Range": f"bytes */{found.st_size}"})
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{found.st_size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", tag)
        self.end_headers()
        self.send_bytes(fd, start, end)

    def send_bytes(self, fd: int, start: int, end: int) -> None:
        """Send the bytes ``[start, end)``."""
        while start < end:
            sent = os.sendfile(self.connection.fileno(), fd, start, min(end - start, _COPY_BYTES))
            if not sent:
                return
            start += sent

    def refuse(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        """Answer with an error as S3 words it."""
        body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Say nothing: the requests carry signatures."""

    def _is_signed(self, path: str, query: str) -> bool:
        fields = {name: values[0] for name, values in parse_qs(query).items()}
        expires = int(fields.get("Expires", "0"))
        given = fields.get("Signature", "")
        if not hmac.compare_digest(given, self.server.signature(path, expires)):
            self.refuse(403, "SignatureDoesNotMatch", "The signature does not match.")
            return False
        if expires < time.time():
            self.refuse(403, "AccessDenied", "Request has expired")
            return False
        return True
