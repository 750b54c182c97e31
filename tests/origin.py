"""The demo's origin, with every fault that a test can describe."""

from __future__ import annotations

import json
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from loader.demo.origin import PROJECT, Handler, Origin

Fault = Callable[["FaultyHandler"], bool]
"""Answers itself and returns True, or changes something and returns False."""


class FaultyOrigin(Origin):
    """Counts requests; ``fail`` makes the next requests for a file go wrong."""

    def __init__(self, root: Path, **options: float) -> None:
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[str, list[Fault]] = {}
        self.headers: Callable[[str], Mapping[str, str]] = lambda path: {}
        """What is told of a file besides, or in the place of, what the demo's origin tells."""
        self.lock = threading.Lock()
        self.bytes_sent = 0
        super().__init__(root, handler=FaultyHandler, **options)

    def folder(self, job: str = "job1", rank: int = 0) -> Path:
        """Return where the files of a node lie."""
        folder = self.root / "training_projects" / PROJECT / "jobs" / job / f"rank-{rank}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def put(self, name: str, content: bytes, job: str = "job1", rank: int = 0) -> Path:
        """Write a file and return its path."""
        path = self.folder(job, rank) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def fail(self, name: str, *faults: Fault) -> None:
        """Let the next requests for files that end in *name* meet these faults, one each."""
        self.faults.setdefault(name, []).extend(faults)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: clients that break off are what many tests are about."""

    def take_fault(self, path: str) -> Fault | None:
        """Return the fault that is due for *path*."""
        with self.lock:
            for name, faults in self.faults.items():
                if path.endswith(name) and faults:
                    return faults.pop(0)
        return None

    def ranges_of(self, name: str) -> list[str]:
        """Return the Range headers of the requests for files that end in *name*."""
        return [header for path, header in self.requests if path.endswith(name)]


class FaultyHandler(Handler):
    """A handler that asks for the fault of the day first."""

    server: FaultyOrigin
    cut_after: int | None = None
    flipped: int | None = None
    chunk_pause_s: float = 0.0
    pause: tuple[int, float] | None = None
    told: Mapping[str, str] = {}

    def send_object(self, fd: int) -> None:
        """Meet the fault, or answer."""
        from urllib.parse import unquote, urlsplit

        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            self.server.requests.append((path, self.headers.get("Range", "")))
        self.cut_after, self.flipped, self.chunk_pause_s, self.pause = None, None, 0.0, None
        self.told = dict(self.server.headers(path))
        if (tag := self.told.get("ETag")) and self.headers.get("If-Match", tag) == tag:
            del self.headers["If-Match"]  # the file's own is another
        fault = self.server.take_fault(path)
        if fault is None or not fault(self):
            super().send_object(fd)

    def send_header(self, keyword: str, value: str) -> None:
        """Send it, unless something else is to be told."""
        if keyword not in self.told:
            super().send_header(keyword, value)

    def end_headers(self) -> None:
        """Send what is to be told besides."""
        for keyword, value in self.told.items():
            super().send_header(keyword, value)
        super().end_headers()

    def send_bytes(self, fd: int, start: int, end: int) -> None:
        """Send, slowly or not to the end where a fault says so."""
        if self.cut_after is not None:
            self.copy(fd, start, min(end, start + self.cut_after))
            hang_up(self)
            return
        if self.pause is not None:
            after, seconds = self.pause
            self.copy(fd, start, min(end, start + after))
            time.sleep(seconds)
            self.copy(fd, min(end, start + after), end)
        elif not self.chunk_pause_s:
            self.copy(fd, start, end)
        else:
            for place in range(start, end, 1 << 16):
                self.copy(fd, place, min(end, place + (1 << 16)))
                time.sleep(self.chunk_pause_s)
        with self.server.lock:
            self.server.bytes_sent += end - start

    def copy(self, fd: int, start: int, end: int) -> None:
        """Send the bytes, through TLS where it is spoken: a plain ``sendfile`` goes past it."""
        if isinstance(self.connection, ssl.SSLSocket) or self.flipped is not None:
            content = bytearray(os.pread(fd, end - start, start))
            if self.flipped is not None and start <= self.flipped < end:
                content[self.flipped - start] ^= 1
            self.connection.sendall(content)
        else:
            super().send_bytes(fd, start, end)


def hang_up(handler: FaultyHandler) -> bool:
    """End the connection after what has been sent."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.shutdown(socket.SHUT_WR)
    handler.close_connection = True
    return True


def reset(handler: FaultyHandler) -> bool:
    """Break the connection with a TCP reset, before an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.close(handler.connection.detach())  # ``close`` would wait for the files on the socket
    handler.close_connection = True
    return True


def status(code: int, **headers: str) -> Fault:
    """Answer with a status."""

    def fault(handler: FaultyHandler) -> bool:
        handler.refuse(code, "Fault", "", {n.replace("_", "-"): v for n, v in headers.items()})
        return True

    return fault


def cut(after: int) -> Fault:
    """End the body after so many bytes."""

    def fault(handler: FaultyHandler) -> bool:
        handler.cut_after = after
        return False

    return fault


def flip(place: int) -> Fault:
    """Turn a bit over on the way, of the byte at *place* where that is asked for."""

    def fault(handler: FaultyHandler) -> bool:
        handler.flipped = place
        return False

    return fault


def slow(pause_s: float) -> Fault:
    """Pause after every 64 KiB."""

    def fault(handler: FaultyHandler) -> bool:
        handler.chunk_pause_s = pause_s
        return False

    return fault


def pause(after: int, seconds: float) -> Fault:
    """Say nothing for a while in the midst of the body, after so many bytes."""

    def fault(handler: FaultyHandler) -> bool:
        handler.pause = (after, seconds)
        return False

    return fault


def stall(seconds: float) -> Fault:
    """Say nothing for a while."""

    def fault(handler: FaultyHandler) -> bool:
        time.sleep(seconds)
        handler.close_connection = True
        return True

    return fault


def ignore_range(handler: FaultyHandler) -> bool:
    """Send the whole object, whatever was asked for."""
    del handler.headers["Range"]
    return False


def redirect(to: str) -> Fault:
    """Answer with a redirect."""
    return status(307, Location=to)


def answer(code: int, body: bytes, **headers: str) -> Fault:
    """Answer with exactly this."""

    def fault(handler: FaultyHandler) -> bool:
        handler.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return fault


def act(function: Callable[[], object]) -> Fault:
    """Do something before the answer."""

    def fault(handler: FaultyHandler) -> bool:
        function()
        return False

    return fault


@contextmanager
def serving(root: Path, **options: float) -> Iterator[FaultyOrigin]:
    """Give an origin over *root* for the length of the block."""
    origin = FaultyOrigin(root, **options)
    origin.start()
    try:
        yield origin
    finally:
        origin.stop()


def write_listing(origin: Origin, path: Path, job: str = "job1", **fields: object) -> Path:
    """Write a job's listing, with *fields* put over it."""
    path.write_text(json.dumps(origin.listing(job) | fields), encoding="utf-8")
    return path
