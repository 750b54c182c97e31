"""A piece of a file in one worker's hands."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from loader.fetch.crc import crc64nvme
from loader.fetch.missing_ranges import DoneRange
from loader.fetch.part import PartFile
from loader.fetch.sums import Tally
from loader.stores.base import ByteStream


@dataclass(eq=False, slots=True)
class Claim:
    """Bytes ``[start, end)`` of a part that one worker brings; ``place`` is how far it came.

    Another thread may take the rest away: it lowers ``end`` under ``lock``, and nothing is written
    behind it any more. ``unit`` is how many bytes the journal takes at a time; ``stalls`` counts
    how often these bytes were taken over. ``opened``: their stream, where there is one already.
    """

    part: PartFile
    start: int
    end: int
    unit: int
    began: float
    stalls: int = 0
    place: int = 0
    stream: ByteStream | None = None
    last_byte: float = 0.0
    opened: ByteStream | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    _mark: int = 0  # up to which the journal has it
    _crc: int = 0  # of the bytes since then
    _tally: Tally | None = None  # for the sum that the origin gave

    def __post_init__(self) -> None:
        self.place = self._mark = self.start
        self.last_byte = self.began
        self._begin_tally()

    def is_over(self) -> bool:
        """Return whether no byte is left to bring."""
        return self.place >= self.end

    def wanted(self) -> int:
        """Return how many bytes are wanted next, to the end or the journal's next entry."""
        return min(self.end, self._mark + self.unit) - self.place

    def put(self, data: memoryview, now: float) -> int:
        """Write what came and return how much of it is still this claim's."""
        with self.lock:
            data = data[: max(self.end - self.place, 0)]
            if count := len(data):
                self.part.write(data, self.place)
                self._crc = crc64nvme(data, self._crc)
                if self._tally is not None:
                    self._tally.update(data)
                self.place += count
                self.last_byte = now
                if self.place == self._mark + self.unit < self.end:
                    self._note()
            return count

    def settle(self) -> bool:
        """Note what was brought; return whether the file is whole with it."""
        with self.lock:
            return self._note()

    def cut(self, end: int) -> None:
        """Take away what lies behind *end*; with the lock held."""
        self.end = end
        if self.place == end:
            self._note()

    def cease(self) -> None:
        """Note what was brought, write nothing more, and end a read that waits."""
        with self.lock:
            self.cut(self.place)
        self.drop_stream()
        if (opened := self.take_opened()) is not None:
            opened.close()

    def take_opened(self) -> ByteStream | None:
        """Return the stream that is there already, once."""
        with self.lock:
            opened, self.opened = self.opened, None
        return opened

    def restart(self) -> int:
        """Go back to the start, for an origin without ranges; return how many bytes were lost."""
        with self.lock:
            lost = self.place - self.start
            self.place = self._mark = self.start
            self._crc = 0
            self._begin_tally()
            return lost

    def seconds_left(self, now: float) -> float:
        """Return what the rest would take at the rate so far."""
        brought = self.place - self.start
        return (self.end - self.place) * (now - self.began) / brought if brought else float("inf")

    def drop_stream(self) -> None:
        """End a read that waits."""
        if (stream := self.stream) is not None:
            stream.abort()

    def _note(self) -> bool:
        if self.place == self._mark:
            return False
        if not self.part.info.ranges and self.place < self.part.info.size_bytes:
            return False  # such an origin starts over, and then these bytes come again
        entry = DoneRange(self._mark, self.place, self._crc)
        self._mark, self._crc = self.place, 0
        if self._tally is not None:
            self._tally.mark()
        return self.part.finish(entry)

    def _begin_tally(self) -> None:
        self._tally = self.part.sum.tally(self.start) if self.part.sum is not None else None
