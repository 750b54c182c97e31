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
import stat
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

import msgspec

from loader.errors import DiskError
from loader.fetch.folders import Folders
from loader.fetch.missing_ranges import DoneRange
from loader.json_text import parse_json
from loader.types import Artifact

STATE = ".podloader"
KINDS = ("part", "journal", "record")  # of an artifact's state
WHOLE = ""  # the artifact itself
_STATE_BYTES = 64 << 20  # of a journal or a record: 50 for each range
DAMAGED = (ValueError, TypeError)  # of what is no JSON, or not ours
_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENXIO)
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Places:
    """Where the artifact ``path`` goes below the root of ``folders``, and where its state is kept.

    Text, made when it is asked for: a checkpoint may have many thousand files, and five Paths cost
    as much as a small file's transfer. A *kind* is one of ``KINDS``, or WHOLE.
    """

    folders: Folders
    path: str

    @property
    def final(self) -> Path:
        """The whole file."""
        return Path(self.whole)

    @property
    def whole(self) -> str:
        """The whole file, as text."""
        return f"{self.folders.root}/{self.path}"

    @property
    def part(self) -> str:
        """The bytes that have arrived. Its lock is held by the process that is fetching them."""
        return f"{self.folders.root}/{STATE}/files/{self.path}.part"

    @property
    def journal(self) -> str:
        """Which ranges have."""
        return f"{self.folders.root}/{STATE}/files/{self.path}.journal"

    @property
    def record(self) -> str:
        """What the whole file is."""
        return f"{self.folders.root}/{STATE}/files/{self.path}.record"

    def open(self, kind: str, flags: int = os.O_RDONLY) -> int:
        """Return a descriptor of the file. Raises OSError, also for what is no regular file."""
        return self.folders.open(*self.entry(kind), flags)

    def create(self, kind: str, flags: int) -> int:
        """Return a descriptor of a new file, in the place of what lies there.

        A file that has another name as well keeps its bytes under that one.
        """
        folder, name = self.entry(kind)
        while True:
            try:
                return self.folders.create(folder, name, flags)
            except FileExistsError:
                self.folders.remove(folder, name)

    def stat(self, kind: str) -> os.stat_result | None:
        """Return what the system says of the file, None where there is none."""
        return self.folders.stat(*self.entry(kind))

    def size(self, kind: str) -> int | None:
        """Return the length of a regular file, None where there is none."""
        found = self.stat(kind)
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None

    def read(self, kind: str, most_bytes: int = _STATE_BYTES) -> bytes:
        """Return the contents of a file of ours. Raises OSError; one of others is none."""
        fd = self.open(kind)
        with open(fd, "rb", buffering=0) as file:
            found = os.fstat(fd)
            if found.st_size > most_bytes:
                raise OSError(errno.EFBIG, "too long for what it is to be")
            if not self.folders.is_ours(found):
                raise FileNotFoundError
            return file.readall()

    def remove(self, *kinds: str) -> None:
        """Remove those of the files that there are."""
        for kind in kinds:
            self.folders.remove(*self.entry(kind))

    def rename(self, kind: str, to_kind: str) -> None:
        """Give a file the other's name."""
        self.folders.rename(*self.entry(kind), *self.entry(to_kind))

    def link(self, target: str) -> None:
        """Make the whole file a symlink to *target*, in the place of what lies there."""
        with tempfile.TemporaryDirectory(prefix=f"{STATE}-", dir=self.folders.root) as aside:
            os.symlink(target, f"{aside}/link")
            self.folders.rename(os.path.basename(aside), "link", *self.entry(WHOLE))

    def entry(self, kind: str) -> tuple[str, str]:
        """Return the file's folder below the root, and its name."""
        folder, _, name = self.path.rpartition("/")
        return (f"{STATE}/files/{folder}", f"{name}.{kind}") if kind else (folder, name)


@dataclass(frozen=True, slots=True)
class Record:
    """What a whole file is: written after the file bears its name.

    ``target``: the file that the name, a symlink, led to when it was proved. ``compared`` is False
    where the origin could not be asked and the file was taken as it lay there.
    """

    size_bytes: int
    digest: str
    source: str
    version: str | None
    mtime_ns: int
    boot_id: str
    ranges: tuple[DoneRange, ...]
    target: str | None = None
    compared: bool = True


def places(root: Path, artifact: Artifact) -> Places:
    """Return the paths of *artifact* below *root*."""
    return Places(Folders(str(root)), artifact.path)


def whole_place(place: Places, record: Record) -> Places:
    """Return the place of the whole file itself: where its name leads, if that is a symlink."""
    if record.target is None or os.path.realpath(place.whole) != record.target:
        return place
    folder, _, name = record.target.rpartition("/")
    return Places(Folders(folder), name)


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
    with disk_errors(place.part):
        while True:
            fd = _open_part(place)
            try:
                if not _try_lock(fd, fcntl.LOCK_EX):
                    break
                held, whole = os.fstat(fd), place.stat(WHOLE)
                if whole is None and not held.st_size and held.st_nlink:
                    return fd, True  # nobody has written to it or given it the other name
                named = place.stat("part")
                if named is None or not os.path.samestat(held, named):
                    os.close(fd)  # it was renamed or removed before it was locked
                    continue
                if whole is not None and _is_locked(place):
                    break
                return fd, False
            except BaseException:
                os.close(fd)
                raise
    os.close(fd)
    return None


def _open_part(place: Places) -> int:
    """Return the part file's descriptor. One that others made or have is not written to."""
    while True:
        try:
            return place.folders.create(*place.entry("part"), os.O_RDWR)
        except FileExistsError:
            found = place.stat("part")
        if found is None:
            continue
        if stat.S_ISREG(found.st_mode) and (found.st_nlink > 1 or not place.folders.is_ours(found)):
            place.remove("part")
            continue
        with contextlib.suppress(FileNotFoundError):
            return place.open("part", os.O_RDWR)


def _is_locked(place: Places) -> bool:
    try:
        fd = place.open(WHOLE)
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
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True  # without locks, the folder's lease has to do


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


def read_journal(place: Places, key: dict[str, object]) -> tuple[DoneRange, ...]:
    """Return the ranges that a journal of the same *key* holds; a torn last line is left out."""
    try:
        lines = place.read("journal").split(b"\n")
    except OSError:
        return ()
    try:
        if parse_json(lines[0]) != key:
            return ()
    except DAMAGED:
        return ()
    done = []
    for line in lines[1:]:
        with contextlib.suppress(*DAMAGED):
            done.append(_done_range(parse_json(line)))
    return tuple(done)


def _done_range(entry: object) -> DoneRange:
    """Return the range that a journal or a record has as ``[start, end, crc]``."""
    match entry:
        case [int(start), int(end), int(crc)] if 0 <= start < end and 0 <= crc < 1 << 64:
            return DoneRange(start, end, crc)
    raise ValueError("no range")


def write_journal(place: Places, key: dict[str, object], done: tuple[DoneRange, ...]) -> int:
    """Write a journal anew, at once; return its descriptor, which goes on at its end."""
    lines = [json.dumps(key), *(json.dumps([r.start, r.end, r.crc]) for r in done)]
    with disk_errors(place.journal):
        fd = place.create("journal.new", os.O_WRONLY | os.O_APPEND)
        try:
            _write(fd, ("\n".join(lines) + "\n").encode())
            place.rename("journal.new", "journal")
        except BaseException:
            os.close(fd)
            raise
    return fd


def read_record(place: Places) -> Record | None:
    """Return the record, None where there is none that can be read."""
    try:
        fields = parse_json(place.read("record"))
        ranges = tuple(map(_done_range, fields.pop("ranges")))
        record = Record(**fields, ranges=ranges)
    except (OSError, KeyError, AttributeError, *DAMAGED):
        return None
    texts = isinstance(record.version, str | None) and isinstance(record.target, str | None)
    typed = texts and isinstance(record.size_bytes, int)
    return record if typed else None


def write_record(place: Places, record: Record, *, shared: bool = False) -> None:
    """Write the record. One that is not whole is no JSON, and so no record.

    *shared*: other processes may read it meanwhile, and see one that is whole or the earlier one.
    """
    fields = {
        "size_bytes": record.size_bytes,
        "digest": record.digest,
        "source": record.source,
        "version": record.version,
        "mtime_ns": record.mtime_ns,
        "boot_id": record.boot_id,
        "ranges": [[r.start, r.end, r.crc] for r in record.ranges],
    }
    if record.target is not None:
        fields["target"] = record.target
    if not record.compared:
        fields["compared"] = False
    kind = f"record.{os.getpid()}-{threading.get_native_id()}" if shared else "record"
    with disk_errors(place.record):
        fd = place.create(kind, os.O_WRONLY)
        try:
            _write(fd, msgspec.json.encode(fields))
        finally:
            os.close(fd)
        if shared:
            place.rename(kind, "record")


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


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
