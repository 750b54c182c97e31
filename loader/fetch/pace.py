"""How many connections are worth having: pure arithmetic over rates, told the time."""

from __future__ import annotations

FIRST = 4
_WINDOW_S = 0.06  # over which a rate is measured
_WORTH_S = 1.0  # what is over sooner is not worth finding out for: each try costs handshakes
_SETTLE_S = 0.5  # new connections that bring nothing by then are measured all the same
_FACTOR = 2  # while it pays
_MISSES = 1
_GAIN = 1.2  # what a larger number has to bring to be kept
_HOLD_S = 2.0  # between two tries with more; doubled each time in vain
_LONGEST_HOLD_S = 30.0
_COOL_S = 5.0  # after an origin said that it is too much


class Pace:
    """The number of connections: multiplied while the rate grows, halved when told to slow.

    ``limit`` is the number now, never more than *most*.
    """

    def __init__(self, most: int, now: float, first: int = FIRST) -> None:
        self.limit = min(first, most)
        self._most = most
        self._ceiling = most
        self._best_rate = 0.0
        self._best_limit = self.limit
        self._hold_s = _HOLD_S
        self._next_try = now
        self._growing = True
        self._misses = 0
        self._changed = now
        self._began: float | None = None
        self._began_bytes = 0

    def begin_again(self, first: int, now: float) -> None:
        """Begin with *first* for another sort of requests; what was too much stays known."""
        if self._ceiling < self._most:
            self.limit = min(self.limit, first)
            return
        self._best_rate = 0.0
        self._set(first, now)

    def tick(self, now: float, total_bytes: int, receiving: int, left_bytes: int) -> None:
        """Take note of the bytes so far and to come, and of how many connections bring some now."""
        if not receiving:  # nothing is to be learnt from an origin that has not answered yet
            self._began = None
            return
        if self._began is None:
            if receiving < self.limit and now - self._changed < _SETTLE_S:
                return
            self._began, self._began_bytes = now, total_bytes
            return
        if now - self._began < _WINDOW_S:
            return
        rate = (total_bytes - self._began_bytes) / (now - self._began)
        self._began, self._began_bytes = now, total_bytes
        if left_bytes < rate * _WORTH_S:
            return
        if self._growing:
            self._judge(rate, now)
        elif now >= self._next_try:
            self._ceiling = min(self._most, self._ceiling + 1)
            self._best_rate, self._best_limit = rate, self.limit
            self._set(self.limit + max(1, self.limit // 2), now)

    def slow_down(self, now: float) -> None:
        """Halve the number: the origin is busy. Several complaints of one moment count once."""
        if not self._growing and now < self._next_try - _COOL_S * 0.8:
            return
        self._ceiling = max(1, self.limit // 2)
        self._set(self._ceiling, now)
        self._growing = False
        self._next_try = now + _COOL_S

    def _judge(self, rate: float, now: float) -> None:
        if rate > self._best_rate * _GAIN:
            self._best_rate, self._best_limit = rate, self.limit
            self._hold_s = _HOLD_S
            self._set(self.limit * _FACTOR, now)
            if self.limit > self._best_limit:
                return
        elif self._misses < _MISSES:  # connections that pause for a moment all at once
            self._misses += 1
            return
        else:
            self._set(self._best_limit, now)
            self._hold_s = min(self._hold_s * 2, _LONGEST_HOLD_S)
        self._growing = False
        self._next_try = now + self._hold_s

    def _set(self, limit: int, now: float) -> None:
        self.limit = max(1, min(limit, self._ceiling, self._most))
        self._growing = True
        self._misses = 0
        self._changed = now
        self._began = None
