"""What earlier runs left in a download folder and its cache, and nobody needs any more.

Parts and journals of fetches that were given up, records of files that are gone, what killed
writers left; and, of derived models and of bases that were fetched, the least recently used, until
the others are no larger than is allowed. What a process of podloader has in its hands stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loader.errors import DiskError
from loader.fetch.digests import is_stale
from loader.fetch.files import STATE
from loader.weights.publishing import take

_DERIVED = ("merge-*", "consolidate-*", "attach-*")
_BASES = "bases"
_S_PER_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Cleaned:
    """What was removed, with the bytes that each had on the disk, and those of the models kept."""

    removed: tuple[tuple[Path, int], ...]
    kept_bytes: int

    @property
    def freed_bytes(self) -> int:
        """The sum of what was removed."""
        return sum(size for _, size in self.removed)


def clean(
    root: Path,
    cache: Path,
    *,
    keep_bytes: int | None = None,
    older_than_days: float = 1.0,
    dry_run: bool = False,
) -> Cleaned:
    """Return what was removed of the download folder *root* and of *cache*, its models' folder.

    *keep_bytes*: what models may take together, None for as much as they like. Parts and records
    have to be *older_than_days*. *dry_run*: nothing is removed.

    Raises:
        DiskError: the disk refuses.
    """
    before_s = time.time() - older_than_days * _S_PER_DAY
    removed: list[tuple[Path, int]] = []
    try:
        for state in (root / STATE, cache / _BASES / STATE):
            removed += _given_up(state / "files", before_s, dry_run)
        for path in (*(root / STATE / "digests").glob("*"), *(cache / "digests").glob("*")):
            if is_stale(path):
                removed += _remove(path, dry_run)
        for folder in cache.glob(".*.partial"):
            left = _Model(folder, folder.stat().st_mtime, _used_bytes(folder))
            if left.used_s < before_s and _remove_model(left, dry_run):
                removed.append((folder, left.size_bytes))
        found, kept_bytes = sorted(_models(cache), key=lambda m: m.used_s, reverse=True), 0
        for model in found:
            is_kept = keep_bytes is None or kept_bytes + model.size_bytes <= keep_bytes
            if is_kept or not _remove_model(model, dry_run):
                kept_bytes += model.size_bytes
            else:
                removed.append((model.folder, model.size_bytes))
    except OSError as error:
        raise DiskError(
            "the disk refuses",
            where=error.filename or str(root),
            got=error.strerror or type(error).__name__,
            next_step="run it as the owner of the folder",
        ) from None
    return Cleaned(tuple(removed), kept_bytes)


def _given_up(files: Path, before_s: float, dry_run: bool) -> Iterator[tuple[Path, int]]:
    """Remove and yield parts that nobody is fetching, and records of files that are gone."""
    root = files.parent.parent
    for parent, _, names in os.walk(files):
        for path in (Path(parent, name) for name in sorted(names)):
            with contextlib.suppress(FileNotFoundError):  # it has come to its end meanwhile
                if path.lstat().st_mtime >= before_s:
                    continue
                whole = root / path.relative_to(files).with_suffix("")
                part, journal = path.with_suffix(".part"), path.with_suffix(".journal")
                if path == part:
                    with _locked(part) as is_free:
                        for left in (journal, part) if is_free else ():
                            yield from _remove(left, dry_run)
                elif path == journal:
                    yield from () if part.exists() else _remove(path, dry_run)
                elif path.suffix == ".record" and not os.path.lexists(whole):
                    yield from _remove(path, dry_run)


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[bool]:
    """Give whether no process is fetching into *part*, which none does then."""
    fd = os.open(part, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def _remove(path: Path, dry_run: bool) -> list[tuple[Path, int]]:
    if not os.path.lexists(path):
        return []
    size_bytes = path.lstat().st_blocks * 512
    if not dry_run:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()
    return [(path, size_bytes)]


@dataclass(frozen=True, slots=True)
class _Model:
    """A derived model, or what a killed writer left of one; or a base that was fetched, and what
    records its files.
    """

    folder: Path
    used_s: float
    size_bytes: int
    records: Path | None = None


def _models(cache: Path) -> Iterator[_Model]:
    for pattern in _DERIVED:
        for folder in cache.glob(pattern):
            yield _Model(folder, folder.stat().st_mtime, _used_bytes(folder))
    for folder in (cache / _BASES).glob("[!.]*"):
        records = cache / _BASES / STATE / "files" / folder.name
        newest = max((path.stat().st_mtime for path in _files(folder)), default=0.0)
        yield _Model(folder, newest, _used_bytes(folder), records)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _used_bytes(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in _files(folder))


def _remove_model(model: _Model, dry_run: bool) -> bool:
    """Remove it, unless a process of podloader uses it. Return whether it is gone, or would be."""
    with take(model.folder) as is_free:
        if is_free and not dry_run:
            if model.records is not None:
                shutil.rmtree(model.records, ignore_errors=True)
            shutil.rmtree(model.folder)
        return is_free
