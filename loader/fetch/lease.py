"""Which of several machines fetches into a folder that they share.

On a network's file system a lock may be told to nobody but this machine, or there is none. So the
machine that fetches keeps a file there that says who it is, and writes it anew every two seconds;
the others wait. Who sees it unchanged for long, by a clock of its own, puts its own file in its
place. That is no lock: a machine that was held up for so long and goes on has two seconds to notice
in. All that it can write meanwhile are the same bytes of the same version of an object, to the same
places.

::

    <root>/.podloader/lease      {"holder": "<host> <random>", "beat": 17}
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from loader.errors import FetchError
from loader.fetch.files import STATE, disk_errors
from loader.fetch.stopping import check_stop
from loader.json_text import parse_json
from loader.units import show_seconds

_BEAT_S = 2.0
_STALE_S = 15.0
_MOST_BYTES = 4096
_MOUNTS = Path("/proc/self/mountinfo")
_SHARED = {
    *("nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "lustre", "gpfs", "beegfs"),
    *("glusterfs", "afs", "orangefs", "ocfs2", "gfs2", "vboxsf", "fuse"),
}


class _Lease:
    """The file at *path*, and who writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._holder = f"{socket.gethostname()} {secrets.token_hex(8)}"
        self._beat = 0
        self._over = threading.Event()
        self.lost = threading.Event()

    def acquire(self, stop: threading.Event, wait_for: Callable[[str], None]) -> None:
        """Return when this process holds it. Raises StoppedError when *stop* is set."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._create():
            return
        seen, since = b"", time.monotonic()
        while True:
            check_stop(stop)
            found = self._read()
            if not found and self._create():
                return
            if found != seen:
                seen, since = found, time.monotonic()
            elif time.monotonic() - since > _STALE_S:
                self._write()
                stop.wait(2 * _BEAT_S)  # for others that do so at this moment: the last one has it
                if self._is_ours():
                    return
                since = time.monotonic()
            wait_for(f"another machine, which fetches into this folder, {self._path}")
            stop.wait(_BEAT_S / 2)

    def keep(self) -> None:
        """Write it anew until ``release``, or until somebody else has it."""
        while not self._over.wait(_BEAT_S):
            with contextlib.suppress(OSError):
                if not self._is_ours():
                    self.lost.set()
                    return
                self._write()

    def release(self) -> None:
        """Let others have it."""
        self._over.set()
        with contextlib.suppress(OSError):
            if self._is_ours():
                self._path.unlink()

    def _create(self) -> bool:
        try:
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(fd, "wb") as file:
            file.write(self._text())
        return True

    def _write(self) -> None:
        self._beat += 1
        new = self._path.with_name(f"{self._path.name}.{self._holder.rpartition(' ')[2]}")
        new.write_bytes(self._text())
        new.replace(self._path)

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as file:
                return file.read(_MOST_BYTES)
        except FileNotFoundError:
            return b""

    def _is_ours(self) -> bool:
        try:
            found = parse_json(self._read() or b"null")
        except ValueError:
            return False
        return isinstance(found, dict) and found.get("holder") == self._holder

    def _text(self) -> bytes:
        return json.dumps({"holder": self._holder, "beat": self._beat}).encode()


@contextlib.contextmanager
def leased(
    root: Path, stop: threading.Event, wait_for: Callable[[str], None] = lambda what: None
) -> Iterator[None]:
    """Let this machine alone fetch into *root* while the block runs, where others may do so, too.

    On a disk of this machine's own, the locks of its files do that. *wait_for* is told of another
    machine that does so now, as ``Progress.wait_for``.

    Raises:
        StoppedError: *stop* was set before.
        FetchError: another machine took over, since nothing was heard of this one for long.
        DiskError: the lease cannot be written.
    """
    if not is_shared(root):
        yield
        return
    lease = _Lease(root / STATE / "lease")
    with disk_errors(root):
        try:
            lease.acquire(stop, wait_for)
        finally:
            wait_for("")
    keeping = threading.Thread(target=lease.keep, name="lease", daemon=True)
    keeping.start()
    try:
        yield
    finally:
        lease.release()
    if lease.lost.is_set():
        raise FetchError(
            "another machine took over the download",
            where=str(root),
            got=f"this one wrote nothing for {show_seconds(_STALE_S)}",
            next_step="run again; what has been fetched is kept",
        )


def is_shared(root: Path) -> bool:
    """Return whether *root* is on a file system that other machines may have mounted, too."""
    found = next(path for path in (root, *root.absolute().parents) if path.exists())
    try:
        device = found.stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    for line in lines:
        before, _, after = line.partition(" - ")
        if before.split()[2] == wanted:
            return after.split()[0].partition(".")[0] in _SHARED
    return False
