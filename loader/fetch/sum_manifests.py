"""Manifests of sums: read from where a listing has them, written for a folder on this disk."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

from loader.config.paths import suggest_path
from loader.errors import CheckpointError, DiskError, FetchError, FormatError
from loader.fetch.background import are_here
from loader.fetch.digests import read_digest
from loader.fetch.files import STATE
from loader.fetch.progress import Report
from loader.fetch.snapshot import read_artifact, read_small
from loader.resolve.sum_files import (
    OURS,
    SUM_FILES,
    Sums,
    declare,
    find_sum_files,
    parse_sums,
    write_sums,
)
from loader.stores.base import Store
from loader.threads import map_on_threads
from loader.types import Algorithm, Artifact, Checksum
from loader.weights.byte_files import regular_files
from loader.weights.publishing import replace_file

_ALGORITHMS: Sequence[Algorithm] = ("crc64nvme", "sha256")
_THREADS = 4
_log = logging.getLogger("podloader")


def declare_sums(
    files: Sequence[Artifact], listed: Iterable[Artifact], root: Path, store: Store
) -> tuple[Artifact, ...]:
    """Return *files* with what the manifests among the *listed* artifacts declare of them.

    Raises:
        FetchError: one cannot be read, and there is something to be fetched into *root*.
        FormatError: one is malformed.
        ResolveError: they contradict each other.
    """
    found: dict[str, Sums] = {}
    for manifest in find_sum_files(listed, files):
        try:
            text = read_small(manifest, store)
        except FetchError as error:
            if are_here([manifest], root):
                text = read_artifact(manifest, root, store)
            elif are_here(files, root):
                _log.warning("%s cannot be read: %s", manifest.path, error.what)
                continue
            else:
                raise
        found[manifest.path] = parse_sums(text, manifest.path)
    return declare(files, found) if found else tuple(files)


def sum_folder(folder: Path, report: Report = lambda done, total: None) -> tuple[Path, Sums]:
    """Return the manifest of *folder*, which is written, and what it says of each file.

    *report* is told of bytes, a file at a time.

    Raises:
        CheckpointError: no such folder, or nothing in it.
        FormatError: a file is none, or not what a ``SHA256SUMS`` there says; nothing is written.
        DiskError: a file cannot be read, or the manifest not be written.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "no such folder",
            where=str(folder.absolute()),
            got="a file" if folder.exists() else "nothing",
            next_step="give the folder that it lies in"
            if folder.exists()
            else suggest_path(folder, "give a checkpoint's folder"),
        )
    names = sorted(path.relative_to(folder).as_posix() for path in regular_files(_paths(folder)))
    if not names:
        raise CheckpointError("a folder without files", where=str(folder))

    sizes = {name: (folder / name).stat().st_size for name in names}
    total, done, lock = sum(sizes.values()), [0], threading.Lock()

    def read(name: str) -> tuple[Checksum, ...]:
        try:
            found = read_digest(folder / name, _ALGORITHMS)
        except OSError as error:
            raise _refused(folder / name, error) from None
        with lock:
            done.append(sizes[name])
            report(sum(done), total)
        return tuple(Checksum(algorithm, digest) for algorithm, digest in found.items())

    sums = dict(zip(names, map_on_threads(read, names, _THREADS), strict=True))
    _compare(folder, sums)
    path = folder / OURS
    try:
        replace_file(path, write_sums(sums))
    except OSError as error:
        raise _refused(path, error) from None
    return path, sums


def _paths(folder: Path) -> Iterable[Path]:
    """What lies below *folder*, but for folders, manifests and what is hidden there."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != STATE and not name.startswith(".")]
        for name in names:
            if name not in SUM_FILES and not name.startswith("."):
                yield Path(parent, name)


def _compare(folder: Path, sums: Sums) -> None:
    """Refuse to declare what somebody else declares to be otherwise."""
    for path in regular_files(folder / name for name in SUM_FILES if name != OURS):
        told = parse_sums(path.read_bytes(), str(path))
        differ = [name for name in sums if not set(told.get(name, ())) <= set(sums[name])]
        if differ:
            raise FormatError(
                f"files that are not what {path.name} says",
                where=str(folder),
                problems=differ,
                next_step=f"bring them again, or take {path.name} away where it is an older one",
            )


def _refused(path: Path, error: OSError) -> DiskError:
    return DiskError(
        "the disk refuses", where=str(path), got=error.strerror or type(error).__name__
    )
