"""Files that other tools laid where a fetch would put them, taken where they are proved.

They may lie in ``<download_folder>/<job>/rank-<N>/…``, or in ``<download_folder>/rank-<N>/…`` where
one job is named. Each is read once. Its size proves nothing: a tool that writes ranges leaves holes
when it is killed. Whatever the origin tells it to sum up to is compared; where that is nothing,
some ranges are, and all that is zeros here or was never written. A file whose origin cannot be
asked is taken with its name and size, but not with unwritten ranges.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

from loader.errors import CheckpointError, ExpiredError, FormatError
from loader.fetch.files import (
    WHOLE,
    Places,
    Record,
    boot_id,
    disk_errors,
    places,
    read_record,
    write_record,
)
from loader.fetch.folders import Folders
from loader.fetch.missing_ranges import DoneRange, Range, combine
from loader.fetch.progress import LogProgress, Progress, Working
from loader.fetch.range_read import read_range
from loader.fetch.scan import (
    allocated_only,
    cut_range,
    find_holes,
    merge_ranges,
    sample_ranges,
    scan_file,
)
from loader.fetch.sizes import ask_version
from loader.fetch.snapshot import FetchOptions
from loader.fetch.spans import SpanProgress
from loader.fetch.sums import Check, Sum, choose_check
from loader.fetch.verify import Verify, check_json, check_structure, is_intact
from loader.http.objects import ObjectInfo
from loader.stores.base import Store
from loader.stores.laid_files import is_within
from loader.threads import map_on_threads
from loader.timeline import Timeline
from loader.types import Artifact, Checksum, Manifest
from loader.units import show_bytes, show_seconds

Presence = Literal["proved", "unproved", "missing"]
_RECENT_S = 2.0  # what was written so lately may still be written to
_LOOK_S = 0.2
_UNFINISHED = ".aria2"  # beside a file that aria2, which may have written zeros first, still fills
_COMPARED_BYTES = 16 << 20  # of one request
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class LaidFiles:
    """Where other tools may have laid files. ``flat_job``: whose ranks lie in *folder* itself.

    ``trusted``: further folders that symlinks may lead to.
    """

    folder: Path
    flat_job: str | None = None
    trusted: tuple[Path, ...] = ()

    def find(self, artifact: Artifact) -> tuple[Path, ...]:
        """Return where *artifact* lies: at either place, both, or none."""
        found = [f"{self.folder}/{artifact.path}"]
        if artifact.job == self.flat_job:
            found.append(f"{self.folder}/{artifact.name}")
        return tuple(Path(path) for path in found if os.path.lexists(path))

    def may_lead_to(self, real: str) -> bool:
        """Return whether a resolved path is one that symlinks may lead to."""
        return is_within(real, (self.folder, *self.trusted))


def adopt(
    manifest: Manifest,
    root: Path,
    laid: LaidFiles,
    store: Store,
    options: FetchOptions,
    progress: Progress | None,
    timeline: Timeline,
) -> None:
    """Take those of *manifest*'s files that lie there, and are the origin's, into *root*.

    What is taken has a record there, as if it had been fetched; what lies elsewhere, a symlink.

    Raises:
        CheckpointError: files that cannot be taken, and that there is no origin for.
        FetchError: the origin does not answer.
    """
    root = root.absolute()
    folders = Folders(str(root))
    progress = progress or LogProgress()
    found = _unproved(manifest, folders, laid, options, progress.working)
    if not found:
        return
    with SpanProgress(progress, timeline, "adoption") as watched:
        looked = _Look({p: _stamp(p.stat()) for _, paths in found for p in paths if p.exists()})
        first = (looked.stamps.get(paths[0]) for _, paths in found)
        watched.start(len(found), sum(stamp[0] for stamp in first if stamp), 0)

        def take(one: tuple[Artifact, tuple[Path, ...]]) -> list[_Candidate]:
            """Return those of one artifact's files that are not taken, empty where one is."""
            artifact, paths = one
            place, rejected = Places(folders, artifact.path), []
            for path in paths:
                candidate = _Candidate(artifact, path, laid, store, options, watched, looked)
                candidate.prove(place)
                if not candidate.reason:
                    return []
                rejected.append(candidate)
            with disk_errors(place.whole):
                _make_way(place, laid)
            return rejected

        tried = map_on_threads(take, found, options.concurrency)
    rejected = [candidate for candidates in tried for candidate in candidates]
    for candidate in rejected:
        _log.warning("%s is not taken: %s", candidate.path, candidate.reason)
    if alone := [c for c in rejected if not c.has_origin]:
        raise CheckpointError(
            "files that lie in the download folder cannot be taken",
            where=str(laid.folder),
            problems=[f"{candidate.path}: {candidate.reason}" for candidate in alone],
            next_step="lay them there anew, or name an origin in artifacts that has them",
        )


def presence(manifest: Manifest, root: Path, laid: LaidFiles) -> Mapping[str, Presence]:
    """Return of each file, by its path, whether it is here; only sizes and time stamps are read."""

    folders = Folders(str(root.absolute()))

    def look(artifact: Artifact) -> Presence:
        place = Places(folders, artifact.path)
        record = read_record(place)
        paths = laid.find(artifact)
        believed = record is not None and (record.compared or artifact.url in map(_url, paths))
        if record is not None and believed and is_intact(place, record, "size", record.boot_id):
            return "proved"
        if root != laid.folder and _earlier(artifact, laid, "size"):
            return "proved"
        files = [path for path in paths if path.is_file()]
        wanted = artifact.size_bytes
        fits = any(wanted in (None, path.stat().st_size) for path in files)
        return "unproved" if fits else "missing"

    return {artifact.path: look(artifact) for artifact in manifest.files}


def _unproved(
    manifest: Manifest,
    folders: Folders,
    laid: LaidFiles,
    options: FetchOptions,
    working: Working,
) -> list[tuple[Artifact, tuple[Path, ...]]]:
    """Return what lies here, and has no record that a fetch would believe."""
    jobs = {artifact.job for artifact in manifest.files}
    if not laid.flat_job and not any((laid.folder / job).is_dir() for job in jobs):
        return []
    is_elsewhere = folders.root != str(laid.folder)
    found = []
    for artifact in manifest.files:
        paths, place = laid.find(artifact), Places(folders, artifact.path)
        if not paths:
            if is_elsewhere and place.final.is_symlink():
                _make_way(place, laid)
            continue
        record = read_record(place)
        is_local = artifact.url in map(_url, paths)
        believed = record is not None and (record.compared or is_local)
        if record is not None and (record.target or is_local):
            believed &= is_intact(place, record, options.verify, boot_id(), working)
        if not believed:
            found.append((artifact, paths))
    return found


def _earlier(artifact: Artifact, laid: LaidFiles, verify: Verify) -> Record | None:
    """Return the record of a file that podloader itself once fetched to where it lies."""
    place = places(laid.folder, artifact)
    record = read_record(place)
    whole = record is not None and record.compared and is_intact(place, record, verify, boot_id())
    return record if whole else None


def _make_way(place: Places, laid: LaidFiles) -> None:
    """Remove what was said of files that are not taken, and a symlink to one of them."""
    place.remove("record")  # of when no origin could be asked
    real = os.path.realpath(place.whole)
    if place.final.is_symlink() and laid.may_lead_to(real):
        place.remove(WHOLE)


def _url(path: Path) -> str:
    """Return what the store for local files calls *path*."""
    return f"file://{path}"


class _RejectedError(Exception):
    """Why a file is not taken."""


@dataclass(frozen=True, slots=True)
class _Look:
    """How the files were when they were first looked at, all of them at once."""

    stamps: Mapping[Path, tuple[int, ...]]
    at_s: float = field(default_factory=time.monotonic)

    def wait_until_settled(
        self, fd: int, path: Path, limit_s: float, wait_for: Callable[[str], None]
    ) -> None:
        """Wait until nothing has changed a file for a while; its own clock may not be ours."""
        now_s, found = time.monotonic(), os.fstat(fd)
        if time.time() - found.st_ctime >= _RECENT_S:
            return
        deadline_s, seen = now_s + limit_s, _stamp(found)
        since_s = self.at_s if seen == self.stamps.get(path) else now_s
        while time.monotonic() - since_s < _RECENT_S:
            if time.monotonic() > deadline_s:
                raise _RejectedError(
                    f"it has been written to for {show_seconds(limit_s)}, and still is"
                )
            if time.monotonic() - now_s > _RECENT_S:
                wait_for(f"whoever writes to {path}")
            time.sleep(_LOOK_S)
            stamp = _stamp(os.fstat(fd))
            if stamp != seen:
                seen, since_s = stamp, time.monotonic()


@dataclass(slots=True)
class _Candidate:
    """A file that lies here, and why it is not taken, or "". ``has_origin``: it can be fetched."""

    artifact: Artifact
    path: Path
    laid: LaidFiles
    store: Store
    options: FetchOptions
    progress: Progress
    looked: _Look
    reason: str = ""
    has_origin: bool = True

    def prove(self, place: Places) -> None:
        """Write the record of a file that is proved."""
        self.has_origin = self.artifact.url != _url(self.path)
        try:
            real = Path(os.path.realpath(self.path))
            if (control := Path(f"{real}{_UNFINISHED}")).exists():
                raise _RejectedError(f"it is not finished: {control.name} lies beside it")
            with _open_regular(real, self.laid) as fd:
                wait_for = self.progress.wait_for
                try:
                    self.looked.wait_until_settled(fd, self.path, self.options.settle_s, wait_for)
                finally:
                    wait_for("")
                record = self._known(place) or self._prove(fd)
        except _RejectedError as error:
            self.reason = str(error)
            return
        if place.whole != str(real):
            record = replace(record, target=str(real))
        with disk_errors(place.whole):
            if os.path.realpath(place.whole) != str(real):
                place.link(str(real))
        write_record(place, record, shared=True)
        self.progress.finish_file(self.artifact.path)

    def _known(self, place: Places) -> Record | None:
        """Return what podloader, which fetched the file to where it lies, wrote of it there."""
        folder = self.laid.folder
        if place.folders.root == str(folder) or self.path != folder / self.artifact.path:
            return None
        return _earlier(self.artifact, self.laid, self.options.verify)

    def _prove(self, fd: int) -> Record:
        before = os.fstat(fd)
        info = self._ask_origin()
        wanted = {self.artifact.size_bytes, info.size_bytes if info else None} - {None}
        for size_bytes in sorted(size for size in wanted if size is not None):
            if size_bytes != before.st_size:
                said = f"{before.st_size} bytes, where the origin has {size_bytes}"
                raise _RejectedError(said)
        try:
            check_structure(fd, self.artifact.path)
            if info is None:
                check_json(fd, self.artifact.path)
        except FormatError as error:
            raise _RejectedError(
                f"{error.what} ({error.got})" if error.got else error.what
            ) from None
        told = (*self.artifact.checksums, *(info.checksums if info else ()))
        checks = _checks(told, before.st_size, self.options.range_bytes)
        sums = [check.new_sum(before.st_size) for check in checks]
        tell = partial(self.progress.advance, path=self.artifact.path)
        self.progress.begin_file(self.artifact.path, before.st_size, 0)
        holes = find_holes(fd, before.st_size)
        scan = scan_file(fd, before.st_size, sums, self.options.range_bytes, tell)
        after = os.fstat(fd)
        if _stamp(before) != _stamp(after):
            raise _RejectedError("it changed while it was read")
        unwritten = [*holes, *allocated_only(fd, scan.zeros)]
        if _sums_agree(checks, sums, scan.ranges):
            pass
        elif info is None:
            self._refuse_unwritten(unwritten)
        else:
            self._compare(fd, info, [*scan.zeros, *unwritten])
        return Record(
            before.st_size,
            combine(scan.ranges),
            self.artifact.source,
            info.version if info else None,
            before.st_mtime_ns,
            boot_id(),
            tuple(scan.ranges),
            compared=info is not None,
        )

    def _ask_origin(self) -> ObjectInfo | None:
        """Return what the origin says, None where the file itself is all that there is."""
        if not self.has_origin:
            return None
        try:
            return ask_version(self.artifact, self.store, self.options.retries)
        except ExpiredError:
            self.has_origin = False
            return None

    def _refuse_unwritten(self, unwritten: Sequence[Range]) -> None:
        if unwritten and not self.options.accept_unwritten:
            size = show_bytes(sum(r.size_bytes for r in unwritten))
            first = unwritten[0]
            raise _RejectedError(
                f"{size} of it were never written, the first at byte {first.start}; "
                "accept_unwritten: true takes them for zeros"
            )

    def _compare(self, fd: int, info: ObjectInfo, suspicious: Sequence[Range]) -> None:
        """Compare ranges with the origin's: some at random, all that is *suspicious*."""
        if not info.ranges:
            raise _RejectedError("the origin has no sum of it, and no ranges to compare")
        wanted = [*sample_ranges(info.size_bytes), *merge_ranges(suspicious)]
        for span in (piece for one in wanted for piece in cut_range(one, _COMPARED_BYTES)):
            theirs = bytearray(span.size_bytes)
            read_range(
                self.artifact,
                self.store,
                info,
                span.start,
                memoryview(theirs),
                self.options.retries,
            )
            if theirs != os.pread(fd, span.size_bytes, span.start):
                said = f"its bytes {span.start} to {span.end} are not the origin's"
                raise _RejectedError(said)


@contextlib.contextmanager
def _open_regular(real: Path, laid: LaidFiles) -> Iterator[int]:
    """Give a descriptor of a file that nobody but us and root can have laid there."""
    if not laid.may_lead_to(str(real)):
        raise _RejectedError(
            f"it leads out of the download folder, to {real}; trusted_folders may allow that"
        )
    folders = Folders(str(real.parent))
    try:
        fd = folders.open("", real.name, os.O_RDONLY)
    except OSError as error:
        raise _RejectedError(f"it cannot be opened: {error.strerror}") from None
    try:
        found = os.fstat(fd)
        if not folders.is_ours(found):
            is_open = found.st_mode & stat.S_IWOTH
            raise _RejectedError(
                "everybody may write to it (chmod o-w)"
                if is_open
                else f"it belongs to user {found.st_uid}, not to this one or root (chown)"
            )
        yield fd
    except EOFError:
        raise _RejectedError("it became shorter while it was read") from None
    except OSError as error:
        raise _RejectedError(f"it cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _checks(told: Iterable[Checksum], size_bytes: int, range_bytes: int) -> list[Check]:
    """Return every comparison that what is *told* makes possible."""
    single = (ObjectInfo(size_bytes, checksums=(checksum,)) for checksum in told)
    chosen = (choose_check(one, range_bytes, full=True) for one in single)
    return [check for check in chosen if check is not None]


def _sums_agree(checks: Sequence[Check], sums: Sequence[Sum], ranges: Sequence[DoneRange]) -> bool:
    """Return whether a sum proves the file; one that differs refuses it."""
    proved = False
    for check, one in zip(checks, sums, strict=True):
        same = one.result(ranges) == check.checksum.digest
        if not same and not check.guessed:
            says = check.checksum.said_by or "the origin"
            raise _RejectedError(f"its {check.checksum.algorithm} is not what {says} says")
        proved |= same
    return proved
