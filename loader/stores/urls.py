"""The newest entry of every artifact: read again from its source when the signed URL ends, or when
the size is not the origin's.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from loader.errors import LoaderError
from loader.http.expiry import expiry
from loader.types import Artifact, Listing

_AHEAD_S = 60.0  # so long before its end a URL is not begun with any more
_PAUSE_S = 10.0  # between two tries to renew URLs that are still honoured
_log = logging.getLogger("podloader")


class ListingSource(Protocol):
    """A place that listings can be read from, once and again."""

    def read(self) -> tuple[Listing, ...]:
        """Return the listings.

        Raises:
            LoaderError: they cannot be read, or are none.
        """

    def has_news(self) -> bool:
        """Return whether reading again may bring other URLs."""


@dataclass(frozen=True, slots=True)
class ReadSource:
    """A source and the listings that were read from it."""

    source: ListingSource
    listings: tuple[Listing, ...]


class SignedUrls:
    """The URLs of artifacts. Safe to use from many threads: one of them renews for all.

    *on_renewal* is called whenever listings were read again.
    """

    def __init__(
        self, sources: Sequence[ReadSource] = (), on_renewal: Callable[[], object] | None = None
    ) -> None:
        self._on_renewal = on_renewal or (lambda: None)
        self._sources = [
            (one.source, frozenset(listing.job for listing in one.listings)) for one in sources
        ]
        self._lock = threading.Lock()
        self._newer: dict[str, Artifact] = {}  # by its path; empty until one is renewed
        self._sized: set[str] = set()  # jobs that were listed again for a size
        self._ends_s: dict[str, float] = {}  # epoch seconds, by URL
        self._quiet_until = 0.0

    def current(self, artifact: Artifact) -> str:
        """Return the newest URL; one that ends soon is renewed first where that is possible."""
        url = self._newest(artifact)
        if not self._ends_soon(url) or time.monotonic() < self._quiet_until:
            return url
        if not self._lock.acquire(blocking=False):
            return url  # another thread is at it, and this URL is still honoured
        try:
            self._quiet_until = time.monotonic() + _PAUSE_S
            self._read_again(artifact.job)
        except LoaderError as error:
            _log.warning("signed URLs end soon and cannot be renewed yet: %s", error.what)
        finally:
            self._lock.release()
        return self._newest(artifact)

    def renewed(self, artifact: Artifact, refused: str) -> str | None:
        """Return another URL than the *refused* one, None where the source has none.

        Raises:
            LoaderError: the source cannot be read now.
        """
        with self._lock:
            if self._newest(artifact) == refused:
                self._read_again(artifact.job)
            url = self._newest(artifact)
        return url if url != refused else None

    def listed_size(self, artifact: Artifact) -> int | None:
        """Return the size in its listing, read again, once; None where that cannot be or has none.

        Raises:
            LoaderError: the source cannot be read now.
        """
        with self._lock:
            if artifact.job not in self._sized:
                self._read_again(artifact.job, "a size is another than the origin's")
                self._sized.add(artifact.job)
            newest = self._newer.get(artifact.path)
        return newest.size_bytes if newest is not None else None

    def _newest(self, artifact: Artifact) -> str:
        return self._newer.get(artifact.path, artifact).url

    def _ends_soon(self, url: str) -> bool:
        ends_s = self._ends_s.get(url)
        if ends_s is None:
            ends = expiry(url)
            ends_s = self._ends_s[url] = ends.timestamp() if ends else math.inf
        return ends_s - time.time() < _AHEAD_S

    def _read_again(self, job: str, why: str = "its signed URLs end") -> None:
        sources = [source for source, jobs in self._sources if job in jobs and source.has_news()]
        newer: dict[str, Artifact] = {}
        for source in sources:
            for listing in source.read():
                newer.update((artifact.path, artifact) for artifact in listing.artifacts)
        if newer:
            _log.info("the listing of %s was read again: %s", job, why)
            self._newer = {**self._newer, **newer}
            self._ends_s.clear()
            self._on_renewal()
