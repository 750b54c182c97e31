"""Manifest -> Snapshot: look, prove, ask the origin, bring what is small, then the rest."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

from loader.errors import FetchError, LoaderError, SumError
from loader.fetch.arrivals import Arrivals
from loader.fetch.declared import is_as_declared
from loader.fetch.download import Download, is_same
from loader.fetch.events import Limits
from loader.fetch.files import (
    STATE,
    WHOLE,
    Places,
    Record,
    boot_id,
    places,
    read_record,
    whole_place,
)
from loader.fetch.folders import Folders
from loader.fetch.guesses import Guesses
from loader.fetch.lease import leased
from loader.fetch.missing_ranges import DoneRange
from loader.fetch.part import LARGE_BYTES, Order, PartFile, fetched_file
from loader.fetch.path_check import check_still, check_way
from loader.fetch.progress import LogProgress, Progress, add_up
from loader.fetch.range_read import read_range
from loader.fetch.sizes import ask_version
from loader.fetch.stopping import check_stop
from loader.fetch.sums import Check, choose_check
from loader.fetch.verify import Verify, has_ranges, is_intact, ranges_to_prove
from loader.http.objects import ObjectInfo
from loader.stores.base import Store
from loader.threads import map_on_threads
from loader.types import Artifact, Manifest, Snapshot
from loader.units import show_bytes

if TYPE_CHECKING:
    from loader.config.settings import Settings

_SMALL_BYTES = 256 << 20
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """Limits of one fetch.

    ``concurrency``: the most connections at a time. ``retries``: how often one range or file is
    asked for again without any progress, for ``deadline_s`` at the most. ``range_bytes``: the least
    that is asked for of a large file, proved and resumed alone. ``verify``: what files of an
    earlier fetch have to prove; ``full``: and all that the origin says of new ones is compared.
    ``accept_unwritten``, ``settle_s``: of files that other tools laid here, see ``adoption``.
    ``order``: what of a large file is fetched first, and in which pieces. ``is_curable``: whether a
    file that does not sum up may be another when it is fetched anew, at once.
    """

    concurrency: int = 16
    retries: int = 6
    deadline_s: float = 300.0
    range_bytes: int = 16 << 20
    verify: Verify = "sample"
    accept_unwritten: bool = False
    settle_s: float = 30.0
    order: Order = lambda artifact, info, missing: missing
    is_curable: Callable[[], bool] = lambda: False

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Return what the settings say."""
        return cls(
            concurrency=settings.concurrency,
            retries=settings.retries,
            range_bytes=int(settings.range_size),
            verify=settings.verify,
            accept_unwritten=settings.accept_unwritten,
            settle_s=settings.stall_timeout_s,
        )


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
    options, progress = options or FetchOptions(), progress or LogProgress()
    try:
        while True:
            try:
                with leased(root, arrivals.stop, progress.wait_for):
                    snapshot = _fetch(manifest, root, store, options, progress, arrivals)
                break
            except SumError as error:
                if arrivals.is_followed or not options.is_curable():
                    raise
                _log.warning("%s: %s; it is fetched anew", error.where, error.what)
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
    began = time.monotonic()
    boot = boot_id()
    folders = Folders(str(root))
    at = {artifact: Places(folders, artifact.path) for artifact in manifest.files}
    seen = {}
    if (root / STATE).is_dir():  # else there is nothing to be looked for, file by file
        seen = {a: r for a, place in at.items() if (r := read_record(place))}
    kept = _kept(seen, at, options, boot, progress, arrivals.stop)
    check_way(root, [artifact for artifact in manifest.files if artifact not in kept])
    own = {a for a in kept if _is_own_origin(a, at[a])}
    infos = _ask([a for a in kept if a not in own], store, options, arrivals.stop)
    reused = {a.path: r for a, r in kept.items() if a in own or is_same(a, r, infos[a])}
    for artifact in kept:
        if artifact.path in reused:
            arrivals.arrive(fetched_file(artifact, reused[artifact.path], reused=True))

    full = options.verify == "full"
    guesses = Guesses(store, options.retries, arrivals.stop)

    def choose(info: ObjectInfo, artifact: Artifact) -> Check | None:
        return choose_check(info, options.range_bytes, full=full, declared=artifact.checksums)

    def make(artifact: Artifact, info: ObjectInfo) -> PartFile:
        large = info.size_bytes > min(options.range_bytes, LARGE_BYTES)
        return PartFile(
            artifact,
            info,
            at[artifact],
            boot,
            choose,
            guesses=guesses,
            journaled=large,
            on_range=arrivals.advance,
            order=options.order,
            working=progress.working,
        )

    limits = Limits(options.concurrency, options.retries, options.deadline_s, options.range_bytes)
    download = Download(root, limits, options.verify, seen, progress, arrivals)
    left = [artifact for artifact in manifest.files if artifact.path not in reused]
    parts = download.run(left, store, reused, make)
    check_still(folders)
    files = tuple(arrivals.file(a.path) for a in manifest.files)
    fetched_bytes = sum(part.fetched_bytes for part in parts)
    return Snapshot(root, files, time.monotonic() - began, fetched_bytes)


def read_artifact(artifact: Artifact, root: Path, store: Store) -> bytes:
    """Return the contents of a small file: from *root* where it was fetched, else from the origin.

    Raises:
        FetchError: it cannot be read, or is longer than 256 MiB.
    """
    place = places(root, artifact)
    record = read_record(place)
    if record is not None and is_intact(place, record, "size", boot_id()):
        return whole_place(place, record).read(WHOLE, _SMALL_BYTES)
    return read_small(artifact, store)


def read_small(artifact: Artifact, store: Store) -> bytes:
    """Return the contents of a small file at the origin. Raises as ``read_artifact`` does."""
    info = ask_version(artifact, store, FetchOptions().retries)
    if info.size_bytes > _SMALL_BYTES:
        raise FetchError(
            "a small file was expected",
            where=artifact.path,
            expected=f"at most {show_bytes(_SMALL_BYTES)}",
            got=show_bytes(info.size_bytes),
        )
    content = bytearray(info.size_bytes)
    if content:
        read_range(artifact, store, info, 0, memoryview(content), FetchOptions().retries)
    return bytes(content)


def _kept(
    seen: dict[Artifact, Record],
    at: Mapping[Artifact, Places],
    options: FetchOptions,
    boot: str,
    progress: Progress,
    stop: threading.Event,
) -> dict[Artifact, Record]:
    """Return those files that an earlier fetch completed which are still intact."""

    def look(artifact: Artifact) -> Sequence[DoneRange] | None:
        return ranges_to_prove(at[artifact], seen[artifact], options.verify, boot)

    def is_kept(fitting: tuple[Artifact, Sequence[DoneRange] | None]) -> bool:
        artifact, wanted = fitting
        record, place = seen[artifact], at[artifact]
        if wanted is not None and has_ranges(place, record, wanted, tell):
            if is_as_declared(artifact, place, record, progress.working):
                return True
            says = artifact.checksums[0].said_by
            _log.warning("%s is not what %s says; it is fetched again", artifact.path, says)
            return False
        if place.final.exists():
            _log.warning("%s is not what was fetched; it is fetched again", artifact.path)
        return False

    check = partial(check_stop, stop)
    fitting = [a for a, r in seen.items() if a.size_bytes in (None, r.size_bytes)]
    ranges = map_on_threads(look, fitting, options.concurrency, check)
    total = sum(r.end - r.start for wanted in ranges for r in wanted or ())
    with progress.working("proved files that are here:") as report:
        tell = add_up(report, total)
        pairs = tuple(zip(fitting, ranges, strict=True))
        found = map_on_threads(is_kept, pairs, options.concurrency, check)
    return {a: seen[a] for a, kept in zip(fitting, found, strict=True) if kept}


def _is_own_origin(artifact: Artifact, place: Places) -> bool:
    """Return whether *artifact* was found where it would be fetched to."""
    url = artifact.url
    return url.startswith("file://") and os.path.realpath(url[7:]) == os.path.realpath(place.whole)


def _ask(
    kept: Sequence[Artifact], store: Store, options: FetchOptions, stop: threading.Event
) -> dict[Artifact, ObjectInfo | None]:
    """Return the version of every kept file's object, None where the origin does not answer."""
    silent: list[LoaderError] = []

    def ask(artifact: Artifact) -> ObjectInfo | None:
        try:
            return None if silent else store.stat(artifact)
        except FetchError as error:
            silent.append(error)
            return None

    infos = map_on_threads(ask, kept, options.concurrency, partial(check_stop, stop))
    if silent:
        _log.warning(
            "the origin does not tell whether %d files here are its newest: %s",
            sum(1 for info in infos if info is None),
            silent[0].what,
        )
    return dict(zip(kept, infos, strict=True))
