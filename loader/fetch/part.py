"""A file that is on its way: bytes at their offsets, a journal of what is whole, a last rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from loader.errors import DiskError, FormatError, TransientError
from loader.fetch.crc import crc64nvme
from loader.fetch.files import (
    WHOLE,
    Places,
    Record,
    disk_errors,
    lock_part,
    read_journal,
    write_journal,
    write_record,
)
from loader.fetch.guesses import Guesses
from loader.fetch.missing_ranges import (
    DoneRange,
    Range,
    combine,
    missing_ranges,
    sound_ranges,
    unit_end,
)
from loader.fetch.progress import Working, add_up, say_nothing
from loader.fetch.stopping import StoppedError
from loader.fetch.sums import Check, Sum
from loader.fetch.verify import check_structure, proved_ranges
from loader.http.objects import Checksum, ObjectInfo
from loader.stores.base import ByteStream
from loader.types import Artifact, FetchedFile

LARGE_BYTES = 1 << 20  # smaller files come first, and several at a time
OnRange = Callable[[str, str, int, int], None]
Order = Callable[[Artifact, ObjectInfo, tuple[Range, ...]], tuple[Range, ...]]


class PartFile:
    """One artifact's part file. ``lock`` and ``resume`` come first; then ``write`` and ``finish``
    may be called from many threads.

    Files that are not worth a journal are fetched from their start after an interruption. *choose*
    says which of the origin's sums is compared. *on_range* is called with the artifact's path, the
    file that it is in, start and end of what has come, and with what was here; not of what comes
    whole at once. *order* says in which order what is missing is fetched, in which pieces.
    *working* is told of bytes that are read again.
    ``is_confirmed``: ``info`` is the origin's, not the listing's. ``opened``: the stream of the
    file's beginning, and where it was to end. ``is_new``: ``lock`` found nothing of it here.
    ``missing`` is what ``resume`` left to be fetched, ``done`` the file once it is whole.
    """

    def __init__(
        self,
        artifact: Artifact,
        info: ObjectInfo,
        place: Places,
        boot_id: str,
        choose: Callable[[ObjectInfo, Artifact], Check | None] = lambda info, artifact: None,
        *,
        guesses: Guesses | None = None,
        journaled: bool = True,
        on_range: OnRange = lambda path, part, start, end: None,
        order: Order = lambda artifact, info, missing: missing,
        working: Working = say_nothing,
    ) -> None:
        self.artifact = artifact
        self._choose = choose
        self._guesses = guesses
        self._set_info(info)
        self._journaled = journaled
        self._on_range = on_range
        self._order = order
        self._working = working
        self.done: FetchedFile | None = None
        self.missing: tuple[Range, ...] = ()
        self.is_new = False
        self.is_confirmed = True
        self.opened: tuple[ByteStream, int] | None = None
        self.fetched_bytes = 0
        self.place = place
        self._boot_id = boot_id
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._journal: int | None = None
        self._is_prepared = False
        self._closed = False
        self._have: list[DoneRange] = []
        self._have_bytes = 0
        self._began = time.monotonic()

    @property
    def is_large(self) -> bool:
        """Whether it keeps many connections busy."""
        return self.info.size_bytes > LARGE_BYTES

    @property
    def claimed_bytes(self) -> int:
        """The bytes that an earlier run says are here; ``resume`` proves it."""
        return sum(r.end - r.start for r in self._claimed())

    @property
    def have_bytes(self) -> int:
        """The bytes that need not be fetched any more."""
        return self._have_bytes

    @property
    def needed_bytes(self) -> int:
        """The bytes that the disk has yet to find room for."""
        try:
            found = self.place.stat("part")
        except OSError:
            found = None
        held = found.st_blocks * 512 if found is not None else 0
        return max(0, self.info.size_bytes - held)

    def confirm(self, info: ObjectInfo) -> None:
        """Take what the origin says of the object."""
        self._set_info(info)
        self.is_confirmed = True

    def take_opened(self) -> tuple[ByteStream, int] | None:
        """Return the stream of the file's beginning and where it ends, once; None: not wanted."""
        opened, self.opened = self.opened, None
        if opened is None:
            return None
        stream, end = opened[0], min(opened[1], self.info.size_bytes)
        unit_bytes = (self.check and self.check.unit_bytes) or 1
        end = unit_end(0, end, unit_bytes) if end < self.info.size_bytes else end
        first = self.missing[0] if self.missing else Range(0, 0)
        if self.info.ranges and not first.start and 0 < end <= min(opened[1], first.end):
            return stream, end
        stream.close()
        return None

    def drop_opened(self) -> None:
        """Let go of the file's beginning: somebody else brings it."""
        if self.opened is not None:
            self.opened[0].close()
            self.opened = None

    def lock(self) -> bool:
        """Take the file's lock. Return False where another process, or thread, has it."""
        with self._lock:
            self._check_open()
            if self._fd is None and (held := lock_part(self.place)):
                self._fd, self.is_new = held
            return self._fd is not None

    def keep(self, record: Record) -> None:
        """Take the file as *record* says: it was found whole."""
        self.done = fetched_file(self.artifact, record, reused=True)
        self.place.remove("part")
        self.close()

    def resume(self) -> None:
        """Find out, and prove, what an earlier run left; publish the file where that is all."""
        self._began = time.monotonic()
        if self.is_new and self.info.size_bytes:
            everything = (Range(0, self.info.size_bytes),)
            self.missing = self._order(self.artifact, self.info, everything)
            return
        self._have = list(self._proved(self._claimed(), self.sum))
        self._have_bytes = sum(entry.end - entry.start for entry in self._have)
        missing = missing_ranges(self._have, self.info.size_bytes)
        self.missing = self._order(self.artifact, self.info, missing) if missing else ()
        for entry in self._have:
            self._on_range(self.artifact.path, self.place.part, entry.start, entry.end)
        self.done = self._adopt()
        if self.done is not None:
            self.missing = ()
            self.place.remove("part")
            self.close()
        elif not self.missing:
            self.publish()

    def write(self, data: memoryview, place: int) -> None:
        """Put *data* at the offset *place*."""
        if not self._is_prepared:
            self._prepare()
        assert self._fd is not None
        with disk_errors(self.place.part):
            while data:
                count = os.pwrite(self._fd, data, place)
                data, place = data[count:], place + count

    def put(self, data: memoryview) -> None:
        """Put all bytes of the file, and publish it. Raises as ``publish`` does."""
        self.write(data, 0)
        if self.sum is not None:
            tally = self.sum.tally(0)
            tally.update(data)
            tally.mark()
        with self._lock:
            self._have = [DoneRange(0, len(data), crc64nvme(data))] if data else []
            self._have_bytes = self.fetched_bytes = len(data)
        self.publish()

    def finish(self, entry: DoneRange) -> bool:
        """Note a range as whole. Return whether it was the last one, after which to publish."""
        with self._lock:
            if self._journal is not None:
                line = json.dumps([entry.start, entry.end, entry.crc]) + "\n"
                with disk_errors(self.place.journal):
                    os.write(self._journal, line.encode())
            self._have.append(entry)
            self._have_bytes += entry.end - entry.start
            self.fetched_bytes += entry.end - entry.start
            is_whole = self._have_bytes == self.info.size_bytes
        self._on_range(self.artifact.path, self.place.part, entry.start, entry.end)
        return is_whole

    def publish(self) -> None:
        """Give the whole file its name, then write its record.

        Raises:
            FetchError: the bytes do not sum up to what the origin says.
            FormatError: the bytes are what the origin sent, and no whole file of their format.
        """
        if not self._is_prepared:
            self._prepare()
        place = self.place
        assert self._fd is not None
        have = sound_ranges(self._have, self.info.size_bytes)
        self._compare_sum(have)
        try:
            check_structure(self._fd, self.artifact.path)
        except FormatError as error:
            place.remove("journal")
            raise FormatError(
                f"the origin's file is broken: {error.what}",
                where=self.artifact.path,
                expected=error.expected,
                got=error.got,
                problems=error.problems,
                next_step="wait until the training job has uploaded it whole, or leave it out",
            ) from None
        with disk_errors(place.whole):
            if not self.is_new:
                place.remove("record")
            held, named = os.fstat(self._fd), place.stat("part")
            if named is None or not os.path.samestat(held, named):
                raise OSError(errno.EEXIST, "another file has the part file's name")
            place.rename("part", WHOLE)
        mtime_ns = held.st_mtime_ns
        self.done = self._promote(have, mtime_ns)
        self.close()

    def close(self) -> None:
        """Close what is open and let go of the lock, for good; nothing is lost."""
        if self._closed and self._fd is None:
            return
        with self._lock:
            self._closed = True
            self.drop_opened()
            for fd in (self._fd, self._journal):
                if fd is not None:
                    with contextlib.suppress(OSError):
                        os.close(fd)
            self._fd = self._journal = None

    def ended_early(self, place: int, end: int) -> TransientError:
        """Return the error for a body that stopped at *place*."""
        return TransientError(
            "the body ended before the range did",
            where=self.artifact.source,
            expected=f"bytes up to {end}",
            got=f"bytes up to {place}",
        )

    def _set_info(self, info: ObjectInfo) -> None:
        if info.version is None:  # ranges that nothing ties together might be of two versions
            info = replace(info, ranges=False)
        self.info = info
        self.check = self._choose(info, self.artifact)
        self.sum = self.check.new_sum(info.size_bytes) if self.check is not None else None

    def _prepare(self) -> None:
        """Give the part file its size and its journal, or go on with those of an earlier run."""
        with self._lock, disk_errors(self.place.part):
            self._check_open()
            assert self._fd is not None
            if self._is_prepared:
                return
            if self._journaled or not self.is_new:
                os.ftruncate(self._fd, self.info.size_bytes)
            if self._journaled:
                self._journal = write_journal(self.place, self._key(), tuple(self._have))
            self._is_prepared = True

    def _check_open(self) -> None:
        """A thread that comes late must not take the lock again, or write without it."""
        if self._closed:
            raise StoppedError("the fetch is over")

    def _compare_sum(self, have: tuple[DoneRange, ...]) -> None:
        if self.check is None or self.sum is None:
            return
        found = self.sum.result(have)
        if found is None and (self.check.rereads or self.fetched_bytes < self.info.size_bytes):
            # An earlier run left ranges behind holes, where no hash could go on.
            again = self.check.sum_again(self.info.size_bytes)
            if len(self._proved(have, again)) < len(have):
                self._drop_part()
                raise DiskError(
                    "the disk does not give back what was written",
                    where=self.place.part,
                    next_step="run again; a second time means that the disk is failing",
                )
            found = again.result(have)
        if found is None or self._is_right(self.check.checksum, found, have):
            return
        # Nobody can say which of the bytes are wrong: they all come again.
        self._drop_part()
        raise self.check.differs(found, self.artifact.source)

    def _proved(self, claimed: tuple[DoneRange, ...], sum_: Sum | None) -> tuple[DoneRange, ...]:
        """Return those of the *claimed* ranges that are here; *sum_* takes them in."""
        with self._working(f"proved {self.artifact.path}:") as report:
            tell = add_up(report, sum(r.end - r.start for r in claimed))
            return proved_ranges(self.place, "part", claimed, sum_, tell)

    def _drop_part(self) -> None:
        self.place.remove("journal", "part")

    def _is_right(self, wanted: Checksum, found: bytes, have: tuple[DoneRange, ...]) -> bool:
        """Return whether the bytes sum up, or are right although a guess of their sum is not."""
        fits, guesses = found == wanted.digest, self._guesses
        if not wanted.guessed or guesses is None:
            return fits
        if fits:
            guesses.note_fit(self.artifact, wanted)
            return True
        return guesses.is_refuted(self.artifact, self.place, self.info, wanted, combine(have))

    def _adopt(self) -> FetchedFile | None:
        """Return the final file where an earlier run was killed between its name and record."""
        place = self.place
        assert self._fd is not None
        if os.fstat(self._fd).st_size or (found := place.stat(WHOLE)) is None:
            return None
        have = sound_ranges(read_journal(place, self._key()), self.info.size_bytes)
        whole = sum(entry.end - entry.start for entry in have) == self.info.size_bytes
        if not whole or found.st_size != self.info.size_bytes:
            return None
        if not place.folders.is_ours(found) or len(proved_ranges(place, WHOLE, have)) != len(have):
            return None
        self._have_bytes = self.info.size_bytes
        return self._promote(have, found.st_mtime_ns, reused=True)

    def _promote(
        self, have: tuple[DoneRange, ...], mtime_ns: int, *, reused: bool = False
    ) -> FetchedFile:
        with self._lock:
            self._check_open()
        size, digest = self.info.size_bytes, combine(have)
        record = Record(
            size, digest, self.artifact.source, self.info.version, mtime_ns, self._boot_id, have
        )
        write_record(self.place, record)
        if self._journaled or not self.is_new:
            with disk_errors(self.place.journal):
                self.place.remove("journal")
        seconds = 0.0 if reused else time.monotonic() - self._began
        return fetched_file(self.artifact, record, reused=reused, seconds=seconds)

    def _claimed(self) -> tuple[DoneRange, ...]:
        if not self.info.ranges or not self._journaled:
            return ()
        return sound_ranges(read_journal(self.place, self._key()), self.info.size_bytes)

    def _key(self) -> dict[str, object]:
        """What a journal must have been written for, to be believed."""
        version = self.info.version or f"at {self.artifact.source}"
        return {"size_bytes": self.info.size_bytes, "version": version}


def fetched_file(
    artifact: Artifact, record: Record, *, reused: bool, seconds: float = 0.0
) -> FetchedFile:
    """Return what a snapshot says about a whole file."""
    return FetchedFile(
        path=artifact.path,
        job=artifact.job,
        rank=artifact.node_rank,
        size_bytes=record.size_bytes,
        digest=record.digest,
        source=record.source,
        reused=reused,
        seconds=seconds,
    )
