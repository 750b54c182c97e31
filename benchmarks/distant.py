"""Download from an origin that is far away: latency on every answer, a limited rate per connection.

    python -m benchmarks.distant [--latency-ms 30] [--rate-mb-s 50] [--connections 16]

The rate is limited by the kernel (``SO_MAX_PACING_RATE``). The latency is a pause before a
connection is taken, and no answer begins sooner than so long after its request has come: as on a
long way, a request that comes while the answer before it is being sent has its latency behind it by
the end of that one. What is printed is the rate beside what the allowed connections can carry.
"""

from __future__ import annotations

import argparse
import queue
import re
import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path

from loader.fetch.snapshot import FetchOptions, fetch
from loader.http.client import HttpClient, HttpOptions
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest

_SO_MAX_PACING_RATE = 47
_RANGE = re.compile(rb"Range: bytes=(\d+)-(\d+)", re.IGNORECASE)


class DistantOrigin:
    """Serves one file, of zeros, under every name."""

    def __init__(self, path: Path, latency_s: float, rate_bytes_s: float) -> None:
        self._path = path
        self._size = path.stat().st_size
        self._latency_s = latency_s
        self._rate = int(rate_bytes_s)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            taken, _ = self._listener.accept()
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            taken.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, self._rate)
            threading.Thread(target=self._serve, args=(taken,), daemon=True).start()

    def _serve(self, taken: socket.socket) -> None:
        asked: queue.SimpleQueue[tuple[float, bytes] | None] = queue.SimpleQueue()
        with taken, self._path.open("rb") as file:
            time.sleep(self._latency_s)
            threading.Thread(target=self._read, args=(taken, asked), daemon=True).start()
            while found := asked.get():
                came, request = found
                time.sleep(max(0.0, came + self._latency_s - time.monotonic()))
                match = _RANGE.search(request)
                assert match is not None
                start, end = int(match[1]), min(int(match[2]) + 1, self._size)
                head = (
                    "HTTP/1.1 206 Partial Content\r\n"
                    f'Content-Length: {end - start}\r\nETag: "1"\r\n'
                    f"Content-Range: bytes {start}-{end - 1}/{self._size}\r\n\r\n"
                )
                try:
                    taken.sendall(head.encode())
                    taken.sendfile(file, start, end - start)
                except OSError:
                    return

    def _read(
        self, taken: socket.socket, asked: queue.SimpleQueue[tuple[float, bytes] | None]
    ) -> None:
        """Note each request, and when it came."""
        rest = b""
        try:
            while data := taken.recv(65536):
                *requests, rest = (rest + data).split(b"\r\n\r\n")
                for request in requests:
                    asked.put((time.monotonic(), request))
        except OSError:
            pass
        asked.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latency-ms", type=float, default=30)
    parser.add_argument("--rate-mb-s", type=float, default=50)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    carry = options.connections * options.rate_mb_s / 1000
    sets = {"4 x 1 GiB": (4, 1 << 30), "64 x 16 MiB": (64, 16 << 20)}
    print(f"{options.latency_ms:.0f} ms, {options.connections} x {options.rate_mb_s:.0f} MB/s")
    print(f"{'set':<14}{'seconds':>9}{'GB/s':>8}{'of what they carry':>22}")
    for label, (count, size) in sets.items():
        for _ in range(options.runs):
            seconds = run(count, size, options)
            rate = count * size / seconds / 1e9
            print(f"{label:<14}{seconds:>9.2f}{rate:>8.2f}{rate / carry:>22.0%}")


def run(count: int, size: int, options: argparse.Namespace) -> float:
    """Return the seconds of one fetch."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > 2 * count * size
    with tempfile.TemporaryDirectory(
        prefix="podloader-bench-", dir=memory if room else None
    ) as name:
        source = Path(name, "source")
        with source.open("wb") as file:
            file.truncate(size)
        origin = DistantOrigin(source, options.latency_ms / 1000, options.rate_mb_s * 1e6)
        url = f"http://127.0.0.1:{origin.port}/"
        files = tuple(Artifact("job", 0, f"{i}", f"{url}{i}", size) for i in range(count))
        store = PresignedStore(HttpClient(HttpOptions()))
        limits = FetchOptions(concurrency=options.connections)
        began = time.monotonic()
        fetch(Manifest(files), Path(name, "down"), store, limits)
        seconds = time.monotonic() - began
        store.close()
        return seconds


if __name__ == "__main__":
    main()
