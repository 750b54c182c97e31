"""What a fetch lays on disk, and how a file becomes whole.

::

    <download_folder>/
      <job>/rank-<N>/<relative_file_name>              whole files only
      .podloader/
        files/<job>/rank-<N>/<relative_file_name>
          .part                                        bytes that have arrived, at their offsets;
                                                       locked by the process that is fetching it
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
from dataclasses import dataclass
from pathlib import Path

from loader.errors import DiskError
from loader.fetch.missing_ranges import DoneRange
from loader.types import Artifact

STATE = ".podloader"
KINDS = ("part", "journal", "record")  # of an artifact's state
_DAMAGED = (ValueError, TypeError, RecursionError)  # of what is no JSON, or not ours
_FULL = (errno.ENOSPC, errno.EDQUOT)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST)
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
        return Path(self.whole)

    @property
    def whole(self) -> str:
        """The whole file, as text."""
        return f"{self.root}/{self.path}"

    @property
    def part(self) -> str:
        """The bytes that have arrived. Its lock is held by the process that is fetching them."""
        return f"{self.root}/{STATE}/files/{self.path}.part"

    @property
    def journal(self) -> str:
        """Which ranges have."""
        return f"{self.root}/{STATE}/files/{self.path}.journal"

    @property
    def record(self) -> str:
        """What the whole file is."""
        return f"{self.root}/{STATE}/files/{self.path}.record"


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


def lock_part(place: Places) -> tuple[int, bool] | None:
    """Return the part file, open and locked, and whether nothing of the artifact is here yet.

    None where another process has it. The system lets go of the lock when the descriptor is
    closed, by whatever end of the process. The lock goes with the file when that gets its name: who
    then makes a new part file must not take it for his as long as the whole file is locked, because
    its record is about to be written.
    """
    path = place.part
    with disk_errors(path):
        while True:
            fd = _open_part(path)
            try:
                if not _try_lock(fd, fcntl.LOCK_EX):
                    break
                held, whole = os.fstat(fd), _stat(place.whole)
                if whole is None and not held.st_size and held.st_nlink:
                    return fd, True  # nobody has written to it or given it the other name
                named = _stat(path)
                if named is None or not os.path.samestat(held, named):
                    os.close(fd)  # it was renamed or removed before it was locked
                    continue
                if whole is not None and _is_locked(place.whole):
                    break
                return fd, False
            except BaseException:
                os.close(fd)
                raise
    os.close(fd)
    return None


def _open_part(path: str) -> int:
    flags = os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o644)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o644)


def _stat(path: str) -> os.stat_result | None:
    try:
        return os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _is_locked(path: str) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return not _try_lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_case_sensitive(root: Path) -> bool:
    """Return whether *root*'s file system tells ``a`` from ``A``; True where that cannot be tried.

    All files may be there already, and else whoever writes the first one will say what is wrong.
    """
    probe = root / STATE / f"Case-{os.getpid()}"
    with disk_errors(root):
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.touch()
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, *_FULL):
                return True
            raise
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
    except _DAMAGED:
        return ()
    done = []
    for line in lines[1:]:
        with contextlib.suppress(*_DAMAGED):
            done.append(_done_range(json.loads(line)))
    return tuple(done)


def _done_range(entry: object) -> DoneRange:
    """Return the range that a journal or a record has as ``[start, end, crc]``."""
    match entry:
        case [int(start), int(end), int(crc)] if 0 <= start < end and 0 <= crc < 1 << 64:
            return DoneRange(start, end, crc)
    raise ValueError("no range")


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
        ranges = tuple(map(_done_range, fields.pop("ranges")))
        record = Record(**fields, ranges=ranges)
    except (OSError, KeyError, AttributeError, *_DAMAGED):
        return None
    typed = isinstance(record.size_bytes, int) and isinstance(record.version, str | None)
    return record if typed else None


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


class disk_errors:  # noqa: N801 - as contextlib's; a generator costs more, several times per file
    """Raises OSErrors of the block as DiskError."""

    def __init__(self, path: str | Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        full = error.errno in _FULL
        next_step = "make the download folder writable, or choose another one"
        if full:
            next_step = "free some space and run again; what has been fetched is kept"
        elif error.errno in _IN_THE_WAY:
            next_step = "remove what lies in a folder's place, or choose another download folder"
        raise DiskError(
            "the disk is full" if full else f"the disk refuses: {error.strerror}",
            where=str(self._path),
            next_step=next_step,
        ) from None
