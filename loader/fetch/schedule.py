"""What is left to fetch, dealt out to workers: large pieces first, smaller ones towards the end.

A request takes as much as leaves every connection another one (guided self-scheduling), so that
few requests wait for an answer and all connections end together. Whoever finds nothing left takes
over from a connection that is slow: half of what it has still to bring, or all of it where it has
as good as stopped.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from loader.fetch.claim import Claim
from loader.fetch.missing_ranges import Range, guided_bytes, unit_end
from loader.fetch.part import PartFile

_SLOW_S = 0.25  # what a claim would still take, for its rest to be shared
_STALLED_S = 2.0  # without a byte, doubled each time that the same bytes stall
_SPLIT_BYTES = 1 << 20  # less is not worth a request
_FAR_BEHIND = 4.0  # times slower than the others


class Schedule:
    """The parts of one fetch. Every method may be called from any thread.

    *begin* takes a part's lock and finds out what is missing of it: it returns False where another
    process is fetching the file now, and it is tried again later.
    """

    def __init__(self, begin: Callable[[PartFile], bool], range_bytes: int) -> None:
        self.turn = threading.Condition()
        self.limit = 1
        self.active: set[Claim] = set()
        self._begin = begin
        self._range_bytes = range_bytes
        self._holes: deque[tuple[PartFile, Range]] = deque()
        self._waiting: deque[PartFile] = deque()
        self._elsewhere: deque[PartFile] = deque()
        self._beginning = 0
        self._beginning_bytes = 0
        self._left_bytes = 0
        self._ended_bytes, self._ended_s = 0, 0.0  # of claims that are over
        self._is_filled = self._stopped = False

    def stop(self) -> None:
        """Deal out nothing more, note what has come, and end every read that waits."""
        with self.turn:
            self._stopped = True
            claims = tuple(self.active)
            self.turn.notify_all()
        for claim in claims:
            claim.cease()

    def fill(self, parts: Sequence[PartFile]) -> None:
        """Let *parts* be what is dealt out."""
        with self.turn:
            self._waiting.extend(parts)
            self._left_bytes = sum(part.info.size_bytes for part in parts)
            self._is_filled = True
            self.turn.notify_all()

    def set_limit(self, limit: int) -> None:
        """Let so many workers be at work."""
        with self.turn:
            if limit > self.limit:
                self.turn.notify_all()
            self.limit = limit

    def receiving(self) -> int:
        """Return how many claims bring bytes now."""
        with self.turn:
            return sum(1 for claim in self.active if claim.place > claim.start)

    def left_bytes(self) -> int:
        """Return how many bytes are still to come."""
        with self.turn:
            return self._left_bytes + sum(claim.end - claim.place for claim in self.active)

    def stalled(self) -> int:
        """Return how many claims have not brought a byte for a while; they count for none."""
        now = time.monotonic()
        with self.turn:
            return sum(1 for claim in self.active if _is_stalled(claim, now))

    def next(self) -> Claim | None:
        """Wait for something to bring and return it; None at the end of all."""
        with self.turn:
            while not self._stopped:
                if not self._is_filled or len(self.active) + self._beginning >= self.limit:
                    self.turn.wait()
                    continue
                claim = None if self._is_opened() else self._deal()
                if claim is None and (self._is_opened() or self._can_begin()):
                    claim = self._begin_next()
                    if claim is None:
                        continue
                claim = claim or self._take_over()
                if claim is not None:
                    self.active.add(claim)
                    return claim
                if self._elsewhere or self._beginning or self.active:
                    self.turn.wait(0.1)
                else:
                    self.turn.notify_all()
                    return None
            return None

    def complete(self, claim: Claim) -> None:
        """Note that the claim's thread is through with it."""
        with self.turn:
            self.active.discard(claim)
            self._ended_bytes += claim.place - claim.start
            self._ended_s += time.monotonic() - claim.began
            self.turn.notify_all()

    def _deal(self) -> Claim | None:
        """Return as much of the first hole as one request is to bring, None where there is none."""
        if not self._holes:
            return None
        part, hole = self._holes[0]
        size, unit = hole.size_bytes, self._unit(part)
        if part.info.ranges:
            whole = _unit_bytes(part)
            size = guided_bytes(size, self._left_bytes, self.limit, max(unit, whole))
            size = unit_end(hole.start, hole.start + size, whole) - hole.start
            size = min(size, hole.size_bytes)
        end = hole.start + size
        if end == hole.end:
            self._holes.popleft()
        else:
            self._holes[0] = (part, Range(end, hole.end))
        self._left_bytes -= size
        return Claim(part, hole.start, end, unit, time.monotonic())

    def _unit(self, part: PartFile) -> int:
        """Return how many bytes of a file the journal takes at a time."""
        return self._range_bytes if part.info.ranges else max(part.info.size_bytes, 1)

    def _is_opened(self) -> bool:
        """Return whether the next file's bytes are on their way already."""
        first = self._waiting[0] if self._waiting else None
        return first is not None and first.opened is not None

    def _can_begin(self) -> bool:
        if self._waiting:
            # No more large files than keep all busy: each is whole the sooner.
            enough = self._beginning_bytes >= self.limit * self._range_bytes
            return not (enough and self._waiting[0].is_large)
        return bool(self._elsewhere) and not self._beginning and not self.active

    def _begin_next(self) -> Claim | None:
        """Begin a file, without the lock meanwhile: what an earlier run left has to be read.

        Return a claim on its beginning where that has been asked for.
        """
        again = not self._waiting
        part = self._elsewhere.popleft() if again else self._waiting.popleft()
        self._beginning += 1
        size_bytes = part.info.size_bytes
        self._beginning_bytes += size_bytes
        self.turn.release()
        begun = False
        try:
            begun = self._begin(part)
        finally:
            self.turn.acquire()
            self._beginning -= 1
            self._beginning_bytes -= size_bytes
            self.turn.notify_all()
        if not begun:
            self._elsewhere.append(part)
            if again:
                self.turn.wait(0.1)
            return None
        self._left_bytes -= size_bytes - sum(r.size_bytes for r in part.missing)
        holes = [(part, hole) for hole in part.missing]
        opened = part.take_opened()
        if opened is None:
            self._holes.extend(holes)
            return None
        stream, end = opened
        if holes[0][1].end == end:
            del holes[0]
        else:
            holes[0] = (part, Range(end, holes[0][1].end))
        self._holes.extend(holes)
        self._left_bytes -= end
        now, unit = time.monotonic(), self._unit(part)
        return Claim(part, 0, end, unit, now, opened=stream)

    def _take_over(self) -> Claim | None:
        """Return what a slow worker's claim is lightened by, None where nobody is slow."""
        now = time.monotonic()
        slow = sorted(self.active, key=lambda claim: -claim.seconds_left(now))
        for claim in slow:
            if not claim.part.info.ranges or claim.seconds_left(now) < _SLOW_S:
                continue
            with claim.lock:
                if taken := self._share(claim, self._typical_rate(claim, now), now):
                    return taken
        return None

    def _typical_rate(self, claim: Claim, now: float) -> float:
        """Return the bytes per second of the other claims, those that are over included."""
        others = [c for c in self.active if c is not claim and c.place > c.start]
        brought = self._ended_bytes + sum(c.place - c.start for c in others)
        spent = self._ended_s + sum(now - c.began for c in others)
        return brought / max(spent, 1e-9)

    def _share(self, claim: Claim, typical: float, now: float) -> Claim | None:
        left = claim.end - claim.place
        if not left:
            return None
        crawls = now - claim.began > _STALLED_S and claim.seconds_left(now) > _FAR_BEHIND * (
            left / max(typical, 1.0) + _SLOW_S
        )
        if _is_stalled(claim, now) or crawls:
            place, end = claim.place, claim.end
            claim.cut(place)
            claim.drop_stream()
            return Claim(claim.part, place, end, claim.unit, now, claim.stalls + 1)
        if left < 2 * _SPLIT_BYTES or claim.place == claim.start:
            return None
        middle = unit_end(claim.place, claim.place + left // 2, _unit_bytes(claim.part))
        if middle >= claim.end:
            return None  # what is left is hashed as one
        taken = Claim(claim.part, middle, claim.end, claim.unit, now, claim.stalls)
        claim.cut(middle)
        return taken


def _unit_bytes(part: PartFile) -> int:
    """Return how many bytes one connection has to bring for the file's sum."""
    return (part.check and part.check.unit_bytes) or 1


def _is_stalled(claim: Claim, now: float) -> bool:
    return now - claim.last_byte > _STALLED_S * (1 << min(claim.stalls, 5))
