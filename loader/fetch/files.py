"""What a fetch lays on disk, and how a file becomes whole.

::

    <download_folder>/
      <job>/rank-<N>/<relative_file_name>              whole files only
      .podloader/
        files/<job>/rank-<N>/<relative_file_name>
          .lock                                        held by the process that is fetching it
          .part                                        bytes that have arrived, at their offsets
          .journal                                     which ranges of it have; first the version
          .record                                      what the whole file is; written last

Nothing is synced to the disk: the page cache outlives a killed process, and the ranges of a
journal are proved by their CRC before they are believed. A machine that went down is seen by its
boot id, and then every byte is proved.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loader.errors import DiskError
from loader.fetch.plan import DoneRange
from loader.types import Artifact

STATE = ".podloader"
KINDS = ("part", "journal", "record", "lock")  # of an artifact's state
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Places:
    """Where the artifact ``path`` goes below ``root``, and where its state is kept.

    Text, made when it is asked for: a checkpoint may have many thousand files, and five Paths cost
    as much as a small file's transfer.
    """

    root: str
    path: str

    @property
    def final(self) -> Path:
        """The whole file."""
        return Path(f"{self.root}/{self.path}")

    @property
    def part(self) -> str:
        """The bytes that have arrived."""
        return f"{self.root}/{STATE}/files/{self.path}.part"

    @property
    def journal(self) -> str:
        """Which ranges have."""
        return f"{self.root}/{STATE}/files/{self.path}.journal"

    @property
    def record(self) -> str:
        """What the whole file is."""
        return f"{self.root}/{STATE}/files/{self.path}.record"

    @property
    def lock(self) -> str:
        """Held by the process that is fetching it."""
        return f"{self.root}/{STATE}/files/{self.path}.lock"


@dataclass(frozen=True, slots=True)
class Record:
    """What a whole file is: written after the file bears its name."""

    size_bytes: int
    digest: str
    source: str
    version: str | None
    mtime_ns: int
    boot_id: str
    ranges: tuple[DoneRange, ...]


def places(root: Path, artifact: Artifact) -> Places:
    """Return the paths of *artifact* below *root*."""
    return Places(str(root), artifact.path)


def boot_id() -> str:
    """Return what identifies this run of the machine, empty where the system does not tell."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def try_lock(path: str) -> int | None:
    """Return the descriptor that holds the lock *path*, None where another one does.

    The system lets go of it when the descriptor is closed, by whatever end of the process. The
    file stays: were it removed, two processes could hold two of the same name.
    """
    flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with disk_errors(path):
        try:
            fd = os.open(path, flags, 0o644)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fd = os.open(path, flags, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return fd


def is_case_sensitive(root: Path) -> bool:
    """Return whether *root*'s file system tells ``a`` from ``A``."""
    probe = root / STATE / f"Case-{os.getpid()}"
    with disk_errors(probe):
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        try:
            return not probe.with_name(probe.name.lower()).exists()
        finally:
            probe.unlink(missing_ok=True)


def read_journal(path: str, key: dict[str, object]) -> tuple[DoneRange, ...]:
    """Return the ranges that a journal of the same *key* holds; a torn last line is left out."""
    try:
        lines = _read(path).split(b"\n")
    except FileNotFoundError:
        return ()
    try:
        if json.loads(lines[0]) != key:
            return ()
    except ValueError:
        return ()
    done = []
    for line in lines[1:]:
        with contextlib.suppress(ValueError, TypeError):
            done.append(DoneRange(*map(int, json.loads(line))))
    return tuple(done)


def write_journal(path: str, key: dict[str, object], done: tuple[DoneRange, ...]) -> None:
    """Write a journal anew, at once."""
    lines = [json.dumps(key), *(json.dumps([r.start, r.end, r.crc]) for r in done)]
    with disk_errors(path):
        _write(f"{path}.new", ("\n".join(lines) + "\n").encode())
        os.replace(f"{path}.new", path)


def read_record(path: str) -> Record | None:
    """Return the record, None where there is none that can be read."""
    try:
        fields = json.loads(_read(path))
        ranges = tuple(DoneRange(*map(int, entry)) for entry in fields.pop("ranges"))
        return Record(**fields, ranges=ranges)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_record(path: str, record: Record) -> None:
    """Write the record. One that is not whole is no JSON, and so no record."""
    fields = {
        "size_bytes": record.size_bytes,
        "digest": record.digest,
        "source": record.source,
        "version": record.version,
        "mtime_ns": record.mtime_ns,
        "boot_id": record.boot_id,
        "ranges": [[r.start, r.end, r.crc] for r in record.ranges],
    }
    with disk_errors(path):
        _write(path, json.dumps(fields).encode())


def remove(path: str) -> None:
    """Remove the file *path* where there is one."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _read(path: str) -> bytes:
    """Return the contents of a file of states."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(fd, "rb") as file:
        return file.read()


def _write(path: str, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o644)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)


@contextlib.contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Raise OSErrors of the block as DiskError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DiskError(
            "the disk is full" if full else f"the disk refuses: {error.strerror}",
            where=str(path),
            next_step="free some space and run again; what has been fetched is kept"
            if full
            else "make the download folder writable, or choose another one",
        ) from None
