"""The part of a fetch that moves bytes: locks, room, transfer, and what is told of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from loader.errors import DiskError
from loader.fetch.arrivals import Arrivals
from loader.fetch.files import STATE, Record, boot_id, disk_errors, places, read_record
from loader.fetch.part import PartFile
from loader.fetch.progress import Progress, show_bytes
from loader.fetch.transfer import Events, Limits, transfer
from loader.fetch.verify import Verify, is_intact
from loader.stores.base import ObjectInfo, Store
from loader.types import Artifact

_SPARE_BYTES = 64 << 20  # journals, records, folders


class Download:
    """The files of a fetch that have to be brought here, by this process or one beside it."""

    def __init__(
        self,
        parts: list[PartFile],
        root: Path,
        store: Store,
        limits: Limits,
        verify: Verify,
        progress: Progress,
        arrivals: Arrivals,
    ) -> None:
        # Configs, indexes and adapters first: whoever waits for files can begin with them.
        self._parts = sorted(parts, key=lambda part: part.is_large)
        self._root = root
        self._store = store
        self._limits = limits
        self._verify = verify
        self._progress = progress
        self._arrivals = arrivals
        self._seen: Mapping[Artifact, Record] = {}

    def run(self, reused: Mapping[str, Record], seen: Mapping[Artifact, Record]) -> None:
        """Bring them all, beside the *reused* files. Records *seen* before prove nothing new."""
        parts, self._seen = self._parts, seen
        here_bytes = sum(record.size_bytes for record in reused.values())
        _check_room(parts, self._root)
        total = sum(part.info.size_bytes for part in parts)
        have = sum(part.claimed_bytes for part in parts)
        self._progress.start(len(parts) + len(reused), total + here_bytes, have + here_bytes)
        for path in reused:
            self._progress.finish_file(path)
        events = Events(self._begin, self._arrived, self._progress, self._arrivals.stop)
        try:
            transfer(parts, self._store, self._limits, events)
        finally:
            for part in parts:
                part.close()
            self._progress.finish()

    def _begin(self, part: PartFile) -> bool:
        """Take the part's lock, and the file as it is where another process has completed it."""
        if not part.lock():
            return False
        claimed = part.claimed_bytes
        record = self._completed(part)
        if record is not None:
            part.keep(record)
            found = part.info.size_bytes
        else:
            part.resume()
            found = part.have_bytes
        if found != claimed:
            self._progress.advance(found - claimed, part.artifact.path)
        if part.done is not None:
            self._arrived(part)
        return True

    def _completed(self, part: PartFile) -> Record | None:
        """Return the record of a file that another process has completed meanwhile."""
        place = places(self._root, part.artifact)
        record = read_record(place.record)
        if record is None or record == self._seen.get(part.artifact):
            return None
        whole = is_same(part.artifact, record, part.info) and is_intact(
            place.final, record, self._verify, boot_id()
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
    return record.version == info.version  # wherever a new listing says that it lies
