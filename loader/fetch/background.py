"""A fetch that runs behind other work, or in two parts of which the second does."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from loader.fetch.arrivals import Arrivals
from loader.fetch.files import WHOLE, places, read_record, whole_place
from loader.fetch.progress import Progress
from loader.fetch.sizes import ask_version
from loader.fetch.snapshot import FetchOptions, fetch
from loader.fetch.spans import SpanProgress
from loader.http.objects import ObjectInfo
from loader.stores.base import Store
from loader.threads import map_on_threads
from loader.timeline import Timeline
from loader.types import Artifact, Manifest, Snapshot

_STOP_S = 1.0  # a thread that waits for an answer is not waited for much longer


@contextlib.contextmanager
def fetching(
    manifest: Manifest,
    root: Path,
    store: Store,
    options: FetchOptions | None = None,
    progress: Progress | None = None,
) -> Iterator[Arrivals]:
    """Fetch *manifest* while the block runs, which waits for the files as it needs them.

    Small files come first, then the large ones in the order of their paths. The block's end waits
    for the fetch; a block that fails stops it, and what has arrived stays for the next run.

    Raises:
        LoaderError: as ``fetch``, whether the block asked for a file or not.
    """
    arrivals = Arrivals(root, (artifact.path for artifact in manifest.files))

    def run() -> None:
        # The error is the waiting threads' to raise; ``end`` has passed it on.
        with contextlib.suppress(BaseException):
            fetch(manifest, root, store, options, progress, arrivals)

    thread = threading.Thread(target=run, name="fetch", daemon=True)
    thread.start()
    try:
        yield arrivals
    except BaseException:
        arrivals.stop.set()
        raise
    else:
        thread.join()
    finally:
        thread.join(_STOP_S)
    arrivals.wait_all()


@dataclass(frozen=True, slots=True)
class SplitFetch:
    """A fetch into *root* in two parts: what other work needs to begin, and the weight files."""

    early: Manifest
    late: Manifest
    root: Path
    store: Store
    options: FetchOptions
    progress: Progress | None

    @classmethod
    def split(
        cls,
        manifest: Manifest,
        late: Collection[Artifact],
        root: Path,
        store: Store,
        options: FetchOptions,
        progress: Progress | None,
    ) -> Self:
        """Return the fetch of *manifest* with *late* as its second part."""
        later = {artifact.path for artifact in late}
        early = tuple(a for a in manifest.files if a.path not in later)
        return cls(
            replace(manifest, files=early),
            replace(manifest, files=tuple(late)),
            root.absolute(),
            store,
            options,
            progress,
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of both parts, sorted."""
        return tuple(sorted(a.path for a in (*self.early.files, *self.late.files)))

    def fetch_early(self, timeline: Timeline, stage: str) -> Snapshot:
        """Return the snapshot of the first part; *stage* is what its download is called.

        Raises:
            LoaderError: as ``fetch``.
        """
        with SpanProgress(self.progress, timeline, stage) as watched:
            return fetch(self.early, self.root, self.store, self.options, watched)

    def ask_versions(self) -> dict[str, ObjectInfo]:
        """Return which version of each file of the second part lies at the origin now, by path.

        Raises:
            FetchError: the origin does not tell.
        """

        def ask(artifact: Artifact) -> ObjectInfo:
            return ask_version(artifact, self.store, self.options.retries)

        found = map_on_threads(ask, self.late.files, self.options.concurrency)
        return {a.path: info for a, info in zip(self.late.files, found, strict=True)}

    @contextlib.contextmanager
    def fetching_late(self, timeline: Timeline) -> Iterator[Arrivals]:
        """Fetch the second part while the block runs; see ``fetching``."""
        with (
            SpanProgress(self.progress, timeline) as watched,
            fetching(self.late, self.root, self.store, self.options, watched) as arrivals,
        ):
            yield arrivals


def are_here(artifacts: Sequence[Artifact], root: Path) -> bool:
    """Return whether an earlier fetch into *root* brought all *artifacts*."""

    def is_here(artifact: Artifact) -> bool:
        place = places(root.absolute(), artifact)
        record = read_record(place)
        return record is not None and whole_place(place, record).size(WHOLE) is not None

    return all(map(is_here, artifacts))


def join(first: Snapshot, second: Snapshot) -> Snapshot:
    """Return the snapshot of two fetches into one folder."""
    files = sorted((*first.files, *second.files), key=lambda file: file.path)
    return replace(
        second,
        files=tuple(files),
        seconds=first.seconds + second.seconds,
        fetched_bytes=first.fetched_bytes + second.fetched_bytes,
    )
