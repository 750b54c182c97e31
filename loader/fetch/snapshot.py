"""Manifest -> Snapshot: look, prove, ask the origin, check the room, transfer, publish."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tenacity import Retrying

from loader.errors import DiskError, FetchError, LoaderError, TransientError
from loader.fetch.arrivals import Arrivals
from loader.fetch.files import (
    STATE,
    Record,
    boot_id,
    check_way,
    disk_errors,
    lock,
    places,
    read_record,
)
from loader.fetch.part import PartFile, fetched_file
from loader.fetch.progress import LogProgress, Progress, show_bytes
from loader.fetch.transfer import transfer
from loader.fetch.verify import Verify, is_intact
from loader.retry import retrying
from loader.stores.base import ObjectInfo, Store
from loader.types import Artifact, FetchedFile, Manifest, Snapshot

_SMALL_BYTES = 256 << 20
_SMALL_FIRST_BYTES = 1 << 20
_SPARE_BYTES = 64 << 20  # journals, records, folders
_log = logging.getLogger("podloader")
_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Limits of one fetch.

    ``concurrency``: connections at a time. ``retries``: how often one range or file is asked for
    again without any progress. ``range_bytes``: asked for in one request. ``verify``: what files
    of an earlier fetch have to prove.
    """

    concurrency: int = 16
    retries: int = 6
    range_bytes: int = 16 << 20
    verify: Verify = "sample"


def fetch(
    manifest: Manifest,
    root: Path,
    store: Store,
    options: FetchOptions | None = None,
    progress: Progress | None = None,
    arrivals: Arrivals | None = None,
) -> Snapshot:
    """Return *manifest*'s files, every one whole below *root*.

    A file that an earlier fetch completed is proved and kept; one that it began is completed.
    *arrivals* is told of each file as soon as it is whole, and how it all ended.

    Raises:
        ResolveError: something lies in the way.
        DiskError: no room, or the disk refuses.
        FetchError: bytes could not be brought here; what has arrived stays for the next run.
        FormatError: the origin's file is broken.
    """
    arrivals = arrivals or Arrivals(root, (artifact.path for artifact in manifest.files))
    try:
        snapshot = _fetch(
            manifest, root, store, options or FetchOptions(), progress or LogProgress(), arrivals
        )
    except BaseException as error:
        arrivals.end(error)
        raise
    arrivals.end(snapshot)
    return snapshot


def _fetch(
    manifest: Manifest,
    root: Path,
    store: Store,
    options: FetchOptions,
    progress: Progress,
    arrivals: Arrivals,
) -> Snapshot:
    root = root.absolute()
    check_way(root, manifest.files)
    began = time.monotonic()
    with lock(root):
        boot = boot_id()
        kept = _kept(manifest.files, root, options, boot)
        infos = _ask(manifest.files, kept, store, options)
        reused = {a.path: r for a, r in kept.items() if _is_same(a, r, infos[a])}
        done = {
            a.path: fetched_file(a, reused[a.path], reused=True)
            for a in manifest.files
            if a.path in reused
        }

        def begin(artifact: Artifact) -> PartFile:
            # A file from elsewhere is kept only where the origin says that it is the same.
            info = infos[artifact] or _stat(artifact, store, options.retries)
            return PartFile(artifact, info, places(root, artifact), options.range_bytes, boot)

        parts = _map(begin, [a for a in manifest.files if a.path not in done], options.concurrency)
        done |= {part.artifact.path: part.done for part in parts if part.done}
        parts = [part for part in parts if part.done is None]
        for file in done.values():
            arrivals.arrive(file)
        fetched_bytes = _transfer(parts, done, root, store, options, progress, arrivals)
    files = tuple(done[a.path] for a in manifest.files)
    return Snapshot(root, files, time.monotonic() - began, fetched_bytes)


def sizes(manifest: Manifest, store: Store, concurrency: int) -> Manifest:
    """Return *manifest* with the sizes that the listing lacks, asked of the origin.

    Raises:
        FetchError: the origin does not tell.
    """
    unknown = [a for a in (*manifest.files, *manifest.left_out) if a.size_bytes is None]
    found = dict(zip(unknown, _map(store.stat, unknown, concurrency), strict=True))

    def known(artifacts: Sequence[Artifact]) -> tuple[Artifact, ...]:
        return tuple(
            Artifact(a.job, a.node_rank, a.relative_file_name, a.url, found[a].size_bytes)
            if a in found
            else a
            for a in artifacts
        )

    return replace(manifest, files=known(manifest.files), left_out=known(manifest.left_out))


def read_artifact(artifact: Artifact, root: Path, store: Store) -> bytes:
    """Return the contents of a small file: from *root* where it was fetched, else from the origin.

    Raises:
        FetchError: it cannot be read, or is longer than 256 MiB.
    """
    place = places(root, artifact)
    record = read_record(place.record)
    if record is not None and is_intact(place.final, record, "size", boot_id()):
        return place.final.read_bytes()
    info = _stat(artifact, store, FetchOptions().retries)
    if info.size_bytes > _SMALL_BYTES:
        raise FetchError(
            "a small file was expected",
            where=artifact.path,
            expected=f"at most {show_bytes(_SMALL_BYTES)}",
            got=show_bytes(info.size_bytes),
        )
    for attempt in _attempts(FetchOptions().retries):
        with attempt:
            return _read_whole(artifact, info, store)
    raise AssertionError("the loop ends by returning or raising")


def _read_whole(artifact: Artifact, info: ObjectInfo, store: Store) -> bytes:
    if not info.size_bytes:
        return b""
    content = bytearray(info.size_bytes)
    rest = memoryview(content)
    stream = store.open_range(artifact, 0, info.size_bytes, info)
    try:
        while rest and (count := stream.readinto(rest)):
            rest = rest[count:]
    finally:
        stream.close()
    if rest:
        raise TransientError("the body ended before its length", where=artifact.source)
    return bytes(content)


def _kept(
    files: Sequence[Artifact], root: Path, options: FetchOptions, boot: str
) -> dict[Artifact, Record]:
    """Return the files that an earlier fetch completed and that are still intact."""

    def look(artifact: Artifact) -> Record | None:
        place = places(root, artifact)
        record = read_record(place.record)
        if record is None or artifact.size_bytes not in (None, record.size_bytes):
            return None
        if is_intact(place.final, record, options.verify, boot):
            return record
        if place.final.exists():
            _log.warning("%s is not what was fetched; it is fetched again", artifact.path)
        return None

    records = _map(look, files, options.concurrency)
    return {a: r for a, r in zip(files, records, strict=True) if r is not None}


def _ask(
    files: Sequence[Artifact], kept: dict[Artifact, Record], store: Store, options: FetchOptions
) -> dict[Artifact, ObjectInfo | None]:
    """Return every object's version; None for kept files where the origin does not answer."""
    silent: list[LoaderError] = []

    def ask(artifact: Artifact) -> ObjectInfo | None:
        if artifact not in kept:
            return _stat(artifact, store, options.retries)
        try:
            return None if silent else store.stat(artifact)
        except FetchError as error:
            silent.append(error)
            return None

    infos = _map(ask, files, options.concurrency)
    if silent:
        _log.warning(
            "the origin does not tell whether %d files here are its newest: %s",
            sum(1 for info in infos if info is None),
            silent[0].what,
        )
    return dict(zip(files, infos, strict=True))


def _stat(artifact: Artifact, store: Store, retries: int) -> ObjectInfo:
    for attempt in _attempts(retries):
        with attempt:
            return store.stat(artifact)
    raise AssertionError("the loop ends by returning or raising")


def _attempts(retries: int) -> Retrying:
    return retrying(lambda state: state.attempt_number > retries, threading.Event())


def _is_same(artifact: Artifact, record: Record, info: ObjectInfo | None) -> bool:
    """Return whether *record* is of the object that *artifact* names now."""
    same_place = record.source == artifact.source
    if info is None:
        return same_place
    if record.size_bytes != info.size_bytes:
        return False
    if record.version is None or info.version is None:
        return same_place
    return record.version == info.version  # wherever a new listing says that it lies


def _transfer(
    parts: list[PartFile],
    done: dict[str, FetchedFile],
    root: Path,
    store: Store,
    options: FetchOptions,
    progress: Progress,
    arrivals: Arrivals,
) -> int:
    """Fetch *parts* into *done* and return the count of bytes that moved."""
    _check_room(parts, root)
    total = sum(part.info.size_bytes for part in parts)
    have = sum(part.have_bytes for part in parts)
    here = sum(file.size_bytes for file in done.values())
    progress.start(len(parts) + len(done), total + here, have + here)
    for path in done:
        progress.finish_file(path)
    # Configs, indexes and adapters first: whoever waits for files can begin with them.
    parts.sort(key=lambda part: part.info.size_bytes > _SMALL_FIRST_BYTES)
    try:
        for part in parts:
            if not part.missing:
                part.publish()
                _arrived(part, progress, arrivals)
        transfer(
            (p for p in parts if p.missing),
            store,
            progress,
            concurrency=options.concurrency,
            retries=options.retries,
            stop=arrivals.stop,
            arrived=lambda part: _arrived(part, progress, arrivals),
        )
    finally:
        for part in parts:
            part.close()
        progress.finish()
    for part in parts:
        assert part.done is not None
        done[part.artifact.path] = part.done
    return total - have


def _arrived(part: PartFile, progress: Progress, arrivals: Arrivals) -> None:
    assert part.done is not None
    arrivals.arrive(part.done)
    progress.finish_file(part.artifact.path)


def _check_room(parts: Sequence[PartFile], root: Path) -> None:
    needed = sum(part.needed_bytes for part in parts)
    with disk_errors(root):
        free = shutil.disk_usage(root).free
    if needed and needed + _SPARE_BYTES > free:
        raise DiskError(
            "not enough free space for the download",
            where=str(root),
            expected=f"{show_bytes(needed + _SPARE_BYTES)} free",
            got=f"{show_bytes(free)} free",
            next_step=f"free some space, choose another download_folder, or remove {STATE}'s parts",
        )


def _map(function: Callable[[_In], _Out], values: Sequence[_In], concurrency: int) -> list[_Out]:
    """Return *function* of each value, on threads; the first failure stops the rest."""
    if len(values) < 2:
        return [function(value) for value in values]
    with ThreadPoolExecutor(min(concurrency, len(values))) as pool:
        futures = [pool.submit(function, value) for value in values]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
