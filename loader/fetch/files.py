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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from loader.errors import DiskError, ResolveError
from loader.fetch.plan import DoneRange
from loader.types import Artifact

STATE = ".podloader"
_KINDS = ("part", "journal", "record", "lock")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Places:
    """Where one artifact goes, and where its state is kept."""

    final: Path
    part: Path
    journal: Path
    record: Path
    lock: Path


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
    state = root / STATE / "files" / artifact.path
    kinds = (state.with_name(f"{state.name}.{kind}") for kind in _KINDS)
    return Places(root / artifact.path, *kinds)


def boot_id() -> str:
    """Return what identifies this run of the machine, empty where the system does not tell."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def try_lock(path: Path) -> int | None:
    """Return the descriptor that holds the lock *path*, None where another one does.

    The system lets go of it when the descriptor is closed, by whatever end of the process. The
    file stays: were it removed, two processes could hold two of the same name.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return fd


def check_way(root: Path, artifacts: Sequence[Artifact]) -> None:
    """Look below *root* at every place that is going to be written.

    Raises:
        ResolveError: symlinks, files in a folder's place, folders in a file's place; all of them.
    """
    finals: set[Path] = set()
    folders: set[Path] = {root / STATE}
    for artifact in artifacts:
        place = places(root, artifact)
        finals |= {place.final, place.part, place.journal, place.record, place.lock}
        for leaf in (place.final, place.part):
            depth = len(leaf.parts) - len(root.parts) - 1
            folders.update(leaf.parents[:depth])
    problems = [f"{path}: a symlink" for path in sorted(finals | folders) if path.is_symlink()]
    problems += [f"{p}: a file, where a folder is needed" for p in sorted(folders) if p.is_file()]
    problems += [f"{p}: a folder, where a file is needed" for p in sorted(finals) if p.is_dir()]
    if problems:
        raise ResolveError(
            "something lies in the way below the download folder",
            where=str(root),
            problems=problems,
            next_step="remove it, or use an empty download_folder",
        )


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


def read_journal(path: Path, key: dict[str, object]) -> tuple[DoneRange, ...]:
    """Return the ranges that a journal of the same *key* holds; a torn last line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
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


def write_journal(path: Path, key: dict[str, object], done: tuple[DoneRange, ...]) -> None:
    """Write a journal anew, at once."""
    lines = [json.dumps(key), *(json.dumps([r.start, r.end, r.crc]) for r in done)]
    replace_text(path, "\n".join(lines) + "\n")


def read_record(path: Path) -> Record | None:
    """Return the record, None where there is none that can be read."""
    try:
        fields = json.loads(path.read_bytes())
        ranges = tuple(DoneRange(*map(int, entry)) for entry in fields.pop("ranges"))
        return Record(**fields, ranges=ranges)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_record(path: Path, record: Record) -> None:
    """Write the record, at once."""
    fields = asdict(record) | {"ranges": [[r.start, r.end, r.crc] for r in record.ranges]}
    replace_text(path, json.dumps(fields))


def replace_text(path: Path, text: str) -> None:
    """Put *text* at *path*, whole or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    with disk_errors(path):
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
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
