"""Where the seconds of a start went: spans of stages and files, and what was counted on the way."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from loader.units import show_seconds

Kind = Literal["stage", "file"]
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class Open:
    """A span that has begun. ``lane`` is what does the work: podloader, or the engine beside it."""

    name: str
    start_s: float
    kind: Kind = "stage"
    lane: str = "podloader"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a start, in seconds since the timeline began.

    ``failed`` is the type of the error that ended it, if one did; ``stopped`` says that nothing was
    wrong with it, but that nobody waits for it any more.
    """

    name: str
    start_s: float
    end_s: float
    kind: Kind = "stage"
    lane: str = "podloader"
    failed: str = ""
    stopped: bool = False
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s

    @property
    def note(self) -> str:
        """How it ended, in words; empty where all was well."""
        return f"failed: {self.failed}" if self.failed else "stopped" if self.stopped else ""


Listener = Callable[[Open, Span | None], None]
"""Told of spans as they begin (None) and of what they have become, from the threads that work."""


class Timeline:
    """Collects spans, and logs each stage as it ends unless it is to be *quiet*.

    Every method may be called from any thread. Times are those of ``time.monotonic()``, which all
    processes of a machine share.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._level = logging.DEBUG if quiet else logging.INFO
        self._lock = threading.RLock()  # held while listeners are told, so that they miss nothing
        self._spans: list[Span] = []
        self._open: list[Open] = []
        self._counts: Counter[str] = Counter()
        self._facts: dict[str, object] = {}
        self._listeners: list[Listener] = []
        self._closed = False
        self.began = time.monotonic()
        self.began_epoch = time.time()
        self.trace_id = os.urandom(16).hex()
        """What its OpenTelemetry spans and log lines are found by."""

    @property
    def now_s(self) -> float:
        """The seconds since the timeline began."""
        return time.monotonic() - self.began

    @property
    def spans(self) -> tuple[Span, ...]:
        """All that is over, in the order of their ends."""
        with self._lock:
            return tuple(self._spans)

    @property
    def stages(self) -> tuple[Span, ...]:
        """The stages that are over, in the order of their ends."""
        return tuple(span for span in self.spans if span.kind == "stage")

    @property
    def running(self) -> tuple[Open, ...]:
        """What has begun and is not over."""
        with self._lock:
            return tuple(self._open)

    @property
    def counts(self) -> dict[str, int]:
        """What was counted, by name."""
        with self._lock:
            return dict(self._counts)

    @property
    def facts(self) -> dict[str, object]:
        """What this start is about, such as the model and where its bytes come from."""
        with self._lock:
            return dict(self._facts)

    def note(self, **facts: object) -> None:
        """Keep *facts*, JSON-ready, about this start; later ones replace earlier ones."""
        with self._lock:
            self._facts.update(facts)

    def listen(self, listener: Listener) -> None:
        """Tell *listener* of every span, also of those that have begun or ended before."""
        with self._lock:
            over = [(Open(s.name, s.start_s, s.kind, s.lane), s) for s in self._spans]
            begun_ones = [*self._open, *(begun for begun, _ in over)]
            events: list[tuple[float, int, Open, Span | None]] = [
                *((begun.start_s, 0, begun, None) for begun in begun_ones),
                *((span.end_s, 1, begun, span) for begun, span in over),
            ]
            for _, _, begun, span in sorted(events, key=lambda event: event[:2]):
                listener(begun, span)
            self._listeners.append(listener)

    def count(self, name: str, more: int = 1) -> None:
        """Count an event, such as a retry."""
        with self._lock:
            self._counts[name] += more

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note how long the block takes, and that it failed or was stopped where it was."""
        begun = self.begin(name)
        try:
            yield
        except Exception as error:
            self.end(begun, failed=type(error).__name__)
            raise
        except BaseException:  # a signal
            self.end(begun, stopped=True)
            raise
        self.end(begun)

    def begin(
        self, name: str, *, kind: Kind = "stage", lane: str = "podloader", at: float | None = None
    ) -> Open:
        """Return a span that has begun now, or *at* a time of ``time.monotonic()``."""
        begun = Open(name, self._since(at), kind, lane)
        with self._lock:
            if self._closed:
                return begun
            self._open.append(begun)
            for listener in self._listeners:
                listener(begun, None)
        return begun

    def end(
        self,
        begun: Open,
        *,
        failed: str = "",
        stopped: bool = False,
        at: float | None = None,
        attributes: Mapping[str, str | int | float] | None = None,
    ) -> Span:
        """Return the span that *begun* has become."""
        end_s = self._since(at)
        span = Span(
            begun.name,
            begun.start_s,
            end_s,
            begun.kind,
            begun.lane,
            failed,
            stopped,
            attributes or {},
        )
        with self._lock:
            if begun not in self._open:  # the timeline was closed meanwhile
                return span
            self._open.remove(begun)
            self._spans.append(span)
            for listener in self._listeners:
                listener(begun, span)
        if span.kind == "stage" and not span.note:
            _log.log(self._level, "%s: %s", span.name, show_seconds(span.seconds))
        return span

    def close(self) -> None:
        """End what runs as stopped; what begins from now on is not noted any more."""
        with self._lock:
            self._closed = True
            left = tuple(self._open)
        for begun in left:
            self.end(begun, stopped=True)

    def _since(self, at: float | None) -> float:
        return (time.monotonic() if at is None else at) - self.began
