"""What vLLM has compiled, as one file that another pod unpacks.

::

    4096 bytes    a JSON object, filled up with blanks: {"podloader": "kernel cache", "version": 1,
                  "facts": {…}, "sha256": …, "size_bytes": …, "unpacked_bytes": …, "entries": n}
    the rest      a gzipped tar of files and folders; size and SHA-256 are of this

SAFETY: what is unpacked is code, which vLLM runs. The digest tells a broken archive from a whole
one, not a foreign one from one's own: whoever may write where archives lie is trusted.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import stat
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from loader.errors import FormatError
from loader.json_text import parse_json
from loader.units import show_bytes
from loader.weights.publishing import check_room

MOST_BYTES = 4 << 30
"""Of all files in an archive."""
_MOST_ENTRIES = 200_000
_HEAD_BYTES = 4096
_CHUNK_BYTES = 1 << 20
_KIND = {"podloader": "kernel cache", "version": 1}
STAMP = ".archive"
"""A file beside the folders that are packed."""
# vLLM's account of what its keys are made of, which nothing reads: variables are among it.
_LEFT_OUT = {"cache_key_factors.json", STAMP}
_BROKEN = (
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
)


def pack(root: Path, file: Path, facts: Mapping[str, object]) -> int:
    """Write *root*'s files into the archive *file*; return their count.

    Files that go or come meanwhile may be in it or not.

    Raises:
        FormatError: there are too many, they are too large, or one is being written.
        OSError: the disk refuses.
    """
    entries = unpacked_bytes = 0
    with file.open("wb") as out:
        out.write(bytes(_HEAD_BYTES))
        digest = _Digest(out)
        with (
            gzip.GzipFile("", "wb", compresslevel=1, fileobj=digest, mtime=0) as zipped,
            tarfile.open(fileobj=zipped, mode="w|") as tar,
        ):
            for path in _files(root):
                try:
                    opened = path.open("rb")
                except FileNotFoundError:
                    continue
                with opened:
                    member = tar.gettarinfo(fileobj=opened, arcname=str(path.relative_to(root)))
                    member.uid = member.gid = 0
                    member.uname = member.gname = ""
                    entries, unpacked_bytes = entries + 1, unpacked_bytes + member.size
                    _check_bounds(entries, unpacked_bytes, root)
                    tar.addfile(member, opened)
                    if os.fstat(opened.fileno()).st_size != member.size:
                        raise FormatError("a compiled file that still grows", where=str(path))
        head = _KIND | {
            "facts": facts,
            "sha256": digest.sum.hexdigest(),
            "size_bytes": digest.size_bytes,
            "unpacked_bytes": unpacked_bytes,
            "entries": entries,
        }
        written = json.dumps(head).encode()
        if len(written) > _HEAD_BYTES:
            raise FormatError("a kernel cache says too much of itself", where=str(file))
        out.seek(0)
        out.write(written.ljust(_HEAD_BYTES))
    return entries


def unpack(file: Path, folder: Path, facts: Mapping[str, object]) -> None:
    """Put the files of the archive *file* into the empty *folder*, nothing outside of it.

    Raises:
        FormatError: it is broken, or was made of other *facts*.
        DiskError: no room.
        OSError: the disk refuses.
    """
    try:
        # What others laid there may be a FIFO, which nobody ever writes to.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise _broken(file, "it is no file")
            head = _read_head(opened)
            if head["facts"] != facts:
                raise _broken(file, "it was made by another machine, image or configuration")
            _check_bounds(head["entries"], head["unpacked_bytes"], file)
            size_bytes, digest = 0, hashlib.sha256()
            while chunk := opened.read(_CHUNK_BYTES):
                size_bytes += len(chunk)
                digest.update(chunk)
            if (size_bytes, digest.hexdigest()) != (head["size_bytes"], head["sha256"]):
                raise _broken(file, f"{show_bytes(size_bytes)} that do not sum up")
            check_room([(folder, head["unpacked_bytes"])])
            opened.seek(_HEAD_BYTES)
            with tarfile.open(fileobj=opened, mode="r|gz") as tar:
                _extract(tar, folder, head)
    except FormatError:
        raise
    except _BROKEN as error:
        raise _broken(file, f"{type(error).__name__}: {error}") from error


def merge_into(fresh: Path, root: Path) -> None:
    """Move what is in *fresh* to *root*, whole folders where *root* has none; the rest stays.

    Raises:
        OSError: the disk refuses.
    """
    for path in fresh.iterdir():
        there = root / path.name
        if not there.exists():
            path.rename(there)
        elif path.is_dir() and there.is_dir():
            merge_into(path, there)


def _files(root: Path) -> Iterator[Path]:
    """Yield regular files, and no links, in one order."""
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            if name not in _LEFT_OUT and path.is_file() and not path.is_symlink():
                yield path


def _extract(tar: tarfile.TarFile, folder: Path, head: Mapping[str, Any]) -> None:
    entries = unpacked_bytes = 0
    for member in tar:
        if not (member.isreg() or member.isdir()):
            raise ValueError(f"{member.name!r} is neither a file nor a folder")
        if member.issparse():
            raise ValueError(f"{member.name!r} is sparse")
        entries, unpacked_bytes = entries + 1, unpacked_bytes + member.size
        if entries > head["entries"] or unpacked_bytes > head["unpacked_bytes"]:
            raise ValueError("more than was announced")
        # SAFETY: the filter refuses names that lead out of the folder, and what is no plain file.
        tar.extract(member, folder, filter="data")


def _read_head(opened: IO[bytes]) -> Mapping[str, Any]:
    head = parse_json(opened.read(_HEAD_BYTES))
    if {name: head[name] for name in _KIND} != _KIND:
        raise ValueError("no kernel cache of this version")
    if not all(isinstance(head[n], int) for n in ("entries", "unpacked_bytes", "size_bytes")):
        raise ValueError("counts that are no numbers")
    found: Mapping[str, Any] = head
    return found


def _check_bounds(entries: int, unpacked_bytes: int, where: Path) -> None:
    if entries > _MOST_ENTRIES or unpacked_bytes > MOST_BYTES:
        raise FormatError(
            "a kernel cache that is too large",
            where=str(where),
            expected=f"at most {_MOST_ENTRIES} files of {show_bytes(MOST_BYTES)} in all",
            got=f"{entries} files, {show_bytes(unpacked_bytes)}",
            next_step="remove the folder, which the next start fills anew",
        )


def _broken(file: Path, got: str) -> FormatError:
    return FormatError("a kernel cache that cannot be used", where=str(file), got=got)


class _Digest:
    """Writes to *out*, and sums up."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self.sum = hashlib.sha256()
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        self.sum.update(data)
        self.size_bytes += len(data)
        return self._out.write(data)

    def flush(self) -> None:
        self._out.flush()
