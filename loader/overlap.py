"""Adapters over a base that is a training checkpoint, too: checked before its weights are fetched,
merged into them while they are.

The adapters and all small files come first. Of the base's weight files only the headers are read
then, at the origin; an adapter that does not fit costs no download. After that, each file of the
base is merged as soon as it is whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Self

from loader.adapters.incoming import IncomingWeights
from loader.fetch.arrivals import Arrivals
from loader.fetch.background import fetching
from loader.fetch.files import places, read_record
from loader.fetch.progress import Progress
from loader.fetch.snapshot import FetchOptions, fetch
from loader.fetch.spans import SpanProgress
from loader.ready import Arriving, LateWeights, make_ready
from loader.remote import read_headers
from loader.settings import Settings
from loader.stores.base import Store
from loader.timeline import Timeline
from loader.types import Artifact, Manifest, ReadyModel, Snapshot
from loader.weights.inspect import ADAPTER_CONFIG, find_checkpoints, is_safetensors


@dataclass(frozen=True, slots=True)
class LateFetch:
    """A fetch in two parts: all that a merge needs to begin, and the base's weight files."""

    early: Manifest
    late: Manifest
    store: Store
    options: FetchOptions
    progress: Progress | None

    @classmethod
    def split(
        cls,
        manifest: Manifest,
        late: Collection[Artifact],
        store: Store,
        options: FetchOptions,
        progress: Progress | None,
    ) -> Self:
        """Return the fetch of *manifest* with *late* as its second part."""
        early = tuple(a for a in manifest.files if a not in late)
        return cls(
            replace(manifest, files=early),
            replace(manifest, files=tuple(late)),
            store,
            options,
            progress,
        )


def find_late(settings: Settings, manifest: Manifest) -> tuple[Artifact, ...]:
    """Return the weight files that adapters need not wait for; none where all is here already.

    They are those of the base, where it is a training checkpoint in safetensors and adapters come
    with it.
    """
    base = settings.base_checkpoint
    if base is None or not any(a.name.endswith(f"/{ADAPTER_CONFIG}") for a in manifest.files):
        return ()
    folder = PurePosixPath(base.job, base.name)
    late = tuple(
        a
        for a in manifest.files
        if PurePosixPath(a.path).parent == folder and is_safetensors(PurePosixPath(a.path).name)
    )
    root = settings.training.download_folder.absolute()
    return late if any(not _is_here(a, root) for a in late) else ()


def _is_here(artifact: Artifact, root: Path) -> bool:
    place = places(root, artifact)
    return place.final.is_file() and read_record(place.record) is not None


def prepare_while_fetching(
    settings: Settings, fetched: LateFetch, timeline: Timeline
) -> ReadyModel:
    """Return the ReadyModel of both parts of *fetched*.

    Raises:
        LoaderError: as ``fetch`` and ``make_ready``.
    """
    root = settings.training.download_folder.absolute()
    options, store = fetched.options, fetched.store
    with SpanProgress(fetched.progress, timeline, "download of adapters") as watched:
        first = fetch(fetched.early, root, store, options, watched)
    with timeline.stage("headers"):
        tensors = read_headers(
            fetched.late.files,
            root,
            store,
            concurrency=options.concurrency,
            retries=options.retries,
        )

    @contextlib.contextmanager
    def fetch_late() -> Iterator[Arriving]:
        with (
            SpanProgress(fetched.progress, timeline) as watched,
            fetching(fetched.late, root, store, options, watched) as arrivals,
        ):
            files = _as_they_arrive(fetched.late.files, arrivals)
            yield Arriving(
                IncomingWeights(tensors, files), lambda: _join(first, arrivals.wait_all())
            )

    with timeline.stage("inspect"):
        names = [artifact.path for artifact in (*fetched.early.files, *fetched.late.files)]
        checkpoints = find_checkpoints(root, sorted(names))
    return make_ready(settings, first, checkpoints, timeline, LateWeights(tensors, fetch_late))


def _as_they_arrive(artifacts: Sequence[Artifact], arrivals: Arrivals) -> Iterator[Collection[str]]:
    """Yield the names of files that are whole; they arrive in about the order of their paths."""
    left = sorted(artifact.path for artifact in artifacts)
    while left:
        arrivals.wait(left[0])
        here = [path for path in left if arrivals.is_here(path)]
        left = [path for path in left if path not in here]
        yield [PurePosixPath(path).name for path in here]


def _join(first: Snapshot, second: Snapshot) -> Snapshot:
    files = sorted((*first.files, *second.files), key=lambda file: file.path)
    return replace(
        second,
        files=tuple(files),
        seconds=first.seconds + second.seconds,
        fetched_bytes=first.fetched_bytes + second.fetched_bytes,
    )
