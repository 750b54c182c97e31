"""The part of a fetch that moves bytes: locks, room, transfer, and what is told of it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loader.errors import DiskError
from loader.fetch.arrivals import Arrivals
from loader.fetch.declared import is_as_declared
from loader.fetch.events import Events, Limits
from loader.fetch.files import STATE, Record, boot_id, disk_errors, read_record
from loader.fetch.part import PartFile
from loader.fetch.progress import Progress
from loader.fetch.transfer import Transfer
from loader.fetch.verify import Verify, is_intact
from loader.http.objects import ObjectInfo, is_same_version
from loader.stores.base import Store
from loader.types import Artifact
from loader.units import show_bytes

_SPARE_BYTES = 64 << 20  # journals, records, folders


class Download:
    """The files of a fetch that have to be brought here, by this process or one beside it.

    *stale*: records already checked and rejected; they do not make a file count as present.
    """

    def __init__(
        self,
        root: Path,
        limits: Limits,
        verify: Verify,
        stale: Mapping[Artifact, Record],
        progress: Progress,
        arrivals: Arrivals,
    ) -> None:
        self._root = root
        self._limits = limits
        self._verify = verify
        self._stale = stale
        self._progress = progress
        self._arrivals = arrivals
        self._waited = False

    def run(
        self,
        artifacts: Sequence[Artifact],
        store: Store,
        reused: Mapping[str, Record],
        make: Callable[[Artifact, ObjectInfo], PartFile],
    ) -> list[PartFile]:
        """Bring all *artifacts*, beside the *reused* files; return what *make* made of them."""
        events = Events(
            make,
            self.claim,
            self._begin,
            self._arrivals.arrive,
            self._arrived,
            self._progress,
            self._arrivals.stop,
        )
        with contextlib.closing(Transfer(artifacts, store, self._limits, events)) as transfer:
            parts = transfer.send_first_requests()
            # Configs, indexes and adapters first: whoever waits for files can begin with them.
            left = sorted((p for p in parts if p.done is None), key=lambda part: part.is_large)
            _check_room(left, self._root)
            self._start(parts, left, reused)
            try:
                transfer.bring(left)
            finally:
                transfer.close()
                self._wait_no_more()
                self._progress.finish()
        return parts

    def claim(self, part: PartFile) -> bool:
        """Take the part's lock, and the file as it is where another process has completed it."""
        if not part.lock():
            return False
        record = None if part.is_new else self._completed(part)
        if record is not None:
            part.keep(record)
        else:
            part.resume()
        return True

    def _start(
        self, parts: Sequence[PartFile], left: Sequence[PartFile], reused: Mapping[str, Record]
    ) -> None:
        """Tell what is to come, and what is here already."""
        have = sum(record.size_bytes for record in reused.values())
        total = have + sum(part.info.size_bytes for part in parts)
        have += sum(part.claimed_bytes for part in left)
        have += sum(f.size_bytes for part in parts if (f := part.done) and f.reused)
        self._progress.start(len(parts) + len(reused), total, have)
        for path in reused:
            self._progress.finish_file(path)
        for part in parts:
            if (file := part.done) is None:
                continue
            if not file.reused:
                self._progress.begin_file(file.path, file.size_bytes, 0)
                self._progress.advance(file.size_bytes, file.path)
            self._progress.finish_file(file.path)

    def _begin(self, part: PartFile, open_part: Callable[[PartFile], None]) -> bool:
        if not part.lock():
            part.drop_opened()
            self._progress.wait_for(f"another process, which fetches {part.artifact.path}")
            self._waited = True
            return False
        self._wait_no_more()
        claimed = 0
        if part.is_confirmed:
            claimed = part.claimed_bytes
        else:
            open_part(part)
        self.claim(part)
        found = part.have_bytes if part.done is None else part.info.size_bytes
        if found != claimed:
            self._progress.advance(found - claimed, part.artifact.path)
        if part.done is not None:
            self._arrived(part)
        return True

    def _wait_no_more(self) -> None:
        if self._waited:
            self._waited = False
            self._progress.wait_for("")

    def _completed(self, part: PartFile) -> Record | None:
        """Return the record of a file that another process has completed meanwhile."""
        record = read_record(part.place)
        if record is None or record == self._stale.get(part.artifact):
            return None
        whole = (
            is_same(part.artifact, record, part.info)
            and is_intact(part.place, record, self._verify, boot_id())
            and is_as_declared(part.artifact, part.place, record, self._progress.working)
        )
        return record if whole else None

    def _arrived(self, part: PartFile) -> None:
        assert part.done is not None
        self._arrivals.arrive(part.done)
        self._progress.finish_file(part.artifact.path)


def _check_room(parts: Sequence[PartFile], root: Path) -> None:
    needed = sum(part.needed_bytes for part in parts)
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    if needed and needed + _SPARE_BYTES > free:
        raise DiskError(
            "not enough free space for the download",
            where=str(root),
            expected=f"{show_bytes(needed + _SPARE_BYTES)} free",
            got=f"{show_bytes(free)} free",
            next_step=f"free some space, choose another download_folder, or remove {STATE}'s parts",
        )


def is_same(artifact: Artifact, record: Record, info: ObjectInfo | None) -> bool:
    """Return whether *record* is of the object that *artifact* names now."""
    same_place = record.source == artifact.source
    if info is None:
        return same_place
    if record.size_bytes != info.size_bytes:
        return False
    if record.version is None or info.version is None:
        return same_place
    return is_same_version(record.version, info.version)  # wherever a new listing says that it lies
