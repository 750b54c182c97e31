"""A local Hub: the few answers of its API that a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves the files of one folder as the model ``org/base``; ``org/gated`` is refused."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str]] = []
        self.pause_s = 0.0
        """What goes by between two MiB of a file."""
        self.wait_s = 0.0
        """What goes by before the bytes of a file."""
        self.ranges = True
        self.flips: list[str] = []
        """Files of which the next answer has one wrong bit."""
        self.names_versions = True
        """Whether files come with their commit and ETag."""
        self.cuts: list[str] = []
        """Files of which every answer breaks off before its last byte."""
        self.xet = False
        """Whether weights lie in Xet: what is asked for them is sent on to the bridge."""
        self.spans: list[str] = []
        """The ranges that the bridge was asked for, "" for all."""
        self.bytes_sent = 0
        """Of all bodies."""
        self.faults: list[tuple[str, int]] = []
        """What a path begins with, and what one request for it gets; 0 ends the connection."""
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that break off are what some tests are about."""

    @property
    def url(self) -> str:
        """What ``HF_ENDPOINT`` has to be."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """Model info, the file tree, and files."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        """Answer."""
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((path, self.headers.get("Authorization", "")))
        names = sorted(p.name for p in self.server.folder.iterdir())
        if fault := next((f for f in self.server.faults if path.startswith(f[0])), None):
            self.server.faults.remove(fault)
            self.fail(fault[1])
        elif path.startswith("/api/models/org/gated"):
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/base/revision/none"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/org/base/tree/"):
            tree = [self.entry(name) for name in names]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith("/api/models/org/base"):
            siblings = [{"rfilename": n, "size": self.entry(n)["size"]} for n in names]
            info = {"id": "org/base", "modelId": "org/base", "sha": COMMIT, "siblings": siblings}
            self.answer(200, json.dumps(info).encode())
        elif path.startswith("/org/base/resolve/") and path.rpartition("/")[2] in names:
            content = (self.server.folder / path.rpartition("/")[2]).read_bytes()
            weights = path.endswith((".safetensors", ".bin"))
            tag = (hashlib.sha256 if weights else hashlib.sha1)(content).hexdigest()
            told = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}
            if weights and self.server.xet:
                self.send_on(path.rpartition("/")[2], told, len(content))
                return
            self.answer_file(content, told if self.server.names_versions else {})
        elif path.startswith("/bridge/"):
            content = (self.server.folder / path.rpartition("/")[2]).read_bytes()
            if self.command == "GET":
                self.server.spans.append(self.headers.get("Range", ""))
            tag = hashlib.sha256(content).hexdigest()
            self.answer_file(content, {"ETag": f'"{tag}"', "Accept-Ranges": "bytes"})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send_on(self, name: str, told: dict[str, str], size: int) -> None:
        """Redirect to the bridge, which is another host, as the Hub does for what lies in Xet."""
        bridge = self.server.url.replace("127.0.0.1", "localhost")
        token = f"{self.server.url}/api/models/org/base/xet-read-token/{COMMIT}"
        more = {
            "Location": f"{bridge}/bridge/{name}?X-Amz-Signature=S3CR3T",
            "X-Xet-Hash": "1" * 64,
            "Link": f'<{token}>; rel="xet-auth"',
            "X-Linked-ETag": told["ETag"],
            "X-Linked-Size": str(size),
        }
        self.answer(302, b"", told | more)

    def do_HEAD(self) -> None:
        """Answer without the body."""
        self.do_GET()

    def entry(self, name: str) -> dict[str, object]:
        """Return what the tree says of a file."""
        content = (self.server.folder / name).read_bytes()
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": name, "size": len(content), "oid": oid}

    def fail(self, status: int) -> None:
        """Refuse with *status*, or end the connection."""
        if status:
            self.answer(status, b"{}", {"Retry-After": "0"})
        else:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer_file(self, content: bytes, headers: dict[str, str]) -> None:
        """Send a file, or the range of it that is asked for."""
        if self.command == "GET":
            time.sleep(self.server.wait_s)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        name = self.path.rpartition("/")[2]
        if self.command == "GET" and asked is None and name in self.server.flips:
            self.server.flips.remove(name)
            content = content[:-1] + bytes([content[-1] ^ 1])
        if asked is None or not self.server.ranges:
            self.answer(200, content, headers)
            return
        start, end = int(asked[1]), len(content)
        if asked[2]:
            end = min(int(asked[2]) + 1, end)
        place = {"Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
        self.answer(206, content[start:end], headers | place)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        """Send *body*, or only its headers to HEAD."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            if self.path.rpartition("/")[2] in self.server.cuts:
                self.close_connection = True
                body = body[:-1]
            self.server.bytes_sent += len(body)
            self.wfile.write(body[: 1 << 20])
            for place in range(1 << 20, len(body), 1 << 20):
                time.sleep(self.server.pause_s)
                self.wfile.write(body[place : place + (1 << 20)])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""
