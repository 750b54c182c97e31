"""How far a start has come: a value to show, and what keeps it up to date."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from loader.errors import LoaderError, redact
from loader.fetch.progress import Progress, Report, Tell
from loader.timeline import Open, Span, Timeline
from loader.units import show_bytes, show_seconds

Phase = Literal["starting", "ready", "failed", "stopping"]
WEIGHTS = "weights"
_RATE_OVER_S = 10.0
_SAMPLE_EVERY_S = 0.25
_FILES_TOLD = 3


def fact_text(fact: object) -> str:
    """Return a fact about a start as one line."""
    if isinstance(fact, Mapping):
        return ", ".join(f"{name} {value}" for name, value in fact.items())
    return ", ".join(map(str, fact)) if isinstance(fact, list | tuple) else str(fact)


@dataclass(frozen=True, slots=True)
class Boot:
    """A start at one moment. ``now_s`` and ``ready_s`` are seconds since it began.

    ``bytes_done`` includes what an earlier start left here. ``left_s`` is None where nobody knows.
    ``weights`` are the bytes that an engine takes as they arrive, 0 where it reads files.
    ``error`` holds the fields of the error that ended a start. ``facts`` say what it is about;
    ``retried`` is the last request of a running download that had to be made again, and why.
    ``work`` is what goes on beside downloads, such as proving files, and how far it is.
    """

    phase: Phase
    stage: str
    now_s: float
    files: int = 0
    files_done: int = 0
    bytes: int = 0
    bytes_done: int = 0
    bytes_per_s: float = 0.0
    left_s: float | None = None
    weights: int = 0
    weights_done: int = 0
    ready_s: float | None = None
    error: Mapping[str, Any] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    running: tuple[Open, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    retried: str = ""
    work: tuple[str, ...] = ()
    trace_id: str = ""

    @property
    def waiting_for(self) -> list[str]:
        """What the start waits for: stages with their seconds so far, files, the last failure."""
        files = [span.name for span in self.running if span.kind == "file"]
        waits = [
            f"{span.name}, for {show_seconds(self.now_s - span.start_s)}"
            for span in self.running
            if span.kind == "stage"
        ]
        more = f" and {len(files) - _FILES_TOLD} more" if len(files) > _FILES_TOLD else ""
        waits += [f"{', '.join(files[:_FILES_TOLD])}{more}"] if files else []
        waits += self.work
        return waits + ([f"asked for again: {self.retried}"] if self.retried else [])

    @property
    def stages(self) -> tuple[Span, ...]:
        """The stages that are over, as they began."""
        stages = (span for span in self.spans if span.kind == "stage")
        return tuple(sorted(stages, key=lambda span: (span.start_s, span.end_s)))

    def to_json(self) -> dict[str, Any]:
        """Return all of it as a JSON-ready object."""
        return {**asdict(self), "waiting_for": self.waiting_for}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Boot:
        """Return what ``to_json`` was made from."""
        spans = tuple(Span(**span) for span in document["spans"])
        running = tuple(Open(**span) for span in document["running"])
        own = {name: value for name, value in document.items() if name != "waiting_for"}
        work = tuple(document["work"])
        return cls(**{**own, "spans": spans, "running": running, "work": work})


class BootState(Progress):
    """Counts what a fetch tells, passes it on, and gives ``Boot`` values from any thread."""

    def __init__(
        self,
        timeline: Timeline,
        inner: Progress | None = None,
        arrived: Callable[[str], None] = lambda _: None,
        configured: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """*arrived* is told the path of every file that is whole, *configured* other configs."""
        super().__init__(inner)
        self.timeline = timeline
        self._arrived = arrived
        self._configured = configured
        self._lock = threading.Lock()
        self._phase: Phase = "starting"
        self._files = self._files_done = self._bytes = self._bytes_done = 0
        self._samples: deque[tuple[float, int]] = deque()
        self._fetching = False
        self._weights = self._weights_done = 0
        self._taking: Open | None = None
        self._ready_s: float | None = None
        self._error: Mapping[str, Any] | None = None
        self._retried = ""
        self._work: dict[object, str] = {}

    def pass_on(self, inner: Progress) -> None:
        """Tell *inner* too from now on."""
        self._inner = inner

    def start(self, files: int, size_bytes: int, have_bytes: int) -> None:
        """Add what is to come: a start may fetch in several parts."""
        with self._lock:
            self._files += files
            self._bytes += size_bytes
            self._bytes_done += have_bytes
            self._samples = deque([(time.monotonic(), self._bytes_done)])
            self._fetching = True
        super().start(files, size_bytes, have_bytes)

    def advance(self, count_bytes: int, path: str) -> None:
        """Count bytes."""
        now = time.monotonic()
        with self._lock:
            self._bytes_done += count_bytes
            if now - self._samples[-1][0] >= _SAMPLE_EVERY_S:
                self._samples.append((now, self._bytes_done))
                while self._samples[0][0] < now - _RATE_OVER_S:
                    self._samples.popleft()
        super().advance(count_bytes, path)

    def finish_file(self, path: str) -> None:
        """Count a file."""
        with self._lock:
            self._files_done += 1
        super().finish_file(path)
        self._arrived(path)

    def found_config(self, config: Path) -> None:
        """Pass it on."""
        super().found_config(config)
        self._configured(config)

    def retry(self, path: str, reason: str) -> None:
        """Keep the last one; the timeline counts them."""
        self._retried = redact(f"{path}: {reason}")
        super().retry(path, reason)

    def finish(self) -> None:
        """Nothing is on its way any more."""
        with self._lock:
            self._fetching = False
            self._retried = ""
        super().finish()

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[Report]:
        """Keep how far it is."""
        key = object()
        with super().working(what) as tell:

            def report(done: int, total: int) -> None:
                self._work[key] = f"{what} {show_bytes(done)} of {show_bytes(total)}"
                tell(done, total)

            try:
                yield report
            finally:
                self._work.pop(key, None)

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Tell]:
        """Keep how far it is."""
        key = object()
        with super().step(what) as tell_inner:

            def tell(how_far: str) -> None:
                self._work[key] = f"{what}: {how_far}"
                tell_inner(how_far)

            try:
                yield tell
            finally:
                self._work.pop(key, None)

    def wait_for(self, what: str) -> None:
        """Keep it while it lasts."""
        if what:
            self._work["wait"] = f"waiting for {what}"
        else:
            self._work.pop("wait", None)
        super().wait_for(what)

    def take_weights(self, done: int, total: int) -> None:
        """Say how many of the weights' bytes are in the engine, which waits for the rest."""
        with self._lock:
            begins = self._taking is None and not self._weights
            self._weights, self._weights_done = total, done
            if begins:
                self._taking = self.timeline.begin(WEIGHTS, lane="engine")
            ended = self._taking if done == total else None
            if ended is not None:
                self._taking = None
        if ended is not None:
            self.timeline.end(ended)

    def drop_weights(self) -> None:
        """Say that the engine will read files instead."""
        with self._lock:
            ended, self._taking = self._taking, None
            self._weights = self._weights_done = 0
        if ended is not None:
            self.timeline.end(ended, stopped=True)

    def ready(self) -> Boot:
        """Say that requests can be answered from now on."""
        with self._lock:
            self._phase, self._ready_s = "ready", self.timeline.now_s
        return self.boot()

    def stop(self) -> None:
        """Say that requests are answered no more, and none will be."""
        with self._lock:
            self._phase = "stopping"

    def fail(self, error: BaseException) -> Boot:
        """Say that the start is over without a model."""
        if isinstance(error, LoaderError):
            fields = error.to_json()
        else:
            fields = {"error": type(error).__name__, "what": redact(str(error))}
        with self._lock:
            self._phase, self._error = "failed", fields
        return self.boot()

    def boot(self) -> Boot:
        """Return the start as it stands."""
        running = self.timeline.running
        with self._lock:
            rate = self._rate() if self._fetching else 0.0
            left = (self._bytes - self._bytes_done) / rate if rate > 0 else None
            return Boot(
                phase=self._phase,
                stage=", ".join(span.name for span in running if span.kind == "stage"),
                now_s=self.timeline.now_s,
                files=self._files,
                files_done=self._files_done,
                bytes=self._bytes,
                bytes_done=self._bytes_done,
                bytes_per_s=rate,
                left_s=left,
                weights=self._weights,
                weights_done=self._weights_done,
                ready_s=self._ready_s,
                error=self._error,
                counts=self.timeline.counts,
                spans=self.timeline.spans,
                running=running,
                facts=self.timeline.facts,
                retried=self._retried,
                work=tuple(self._work.copy().values()),
                trace_id=self.timeline.trace_id,
            )

    def _rate(self) -> float:
        began, had = self._samples[0]
        seconds = time.monotonic() - began
        return max(self._bytes_done - had, 0) / seconds if seconds > 0 else 0.0
