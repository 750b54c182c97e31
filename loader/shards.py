"""Weights sharded over ranks become one model while they are still at the origin.

Configs, tokenizers and ``.metadata`` come first. Then, with ``weights_only_fetch``, the bytes of
the model, and no others, go by ranges from the origin to their places in the consolidated files.
Else the shards are fetched as any file, and what each holds is written as soon as it is whole.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from loader.fetch.arrivals import Arrivals
from loader.fetch.background import fetching
from loader.fetch.files import places, read_record
from loader.fetch.progress import Progress
from loader.fetch.snapshot import FetchOptions, fetch
from loader.fetch.spans import SpanProgress
from loader.rangefiles import ArrivingFile, RemoteFile, ShardFiles
from loader.ready import make_ready
from loader.retry import retrying
from loader.settings import Settings
from loader.sources import SHARDED
from loader.stores.base import ObjectInfo, Store
from loader.timeline import Timeline
from loader.types import Artifact, Checkpoint, Manifest, ReadyModel, Snapshot
from loader.weights.consolidate.serving import is_shard
from loader.weights.inspect import find_checkpoints


@dataclass(frozen=True, slots=True)
class ShardFetch:
    """A fetch in two parts: all small files, and the weight shards."""

    early: Manifest
    late: Manifest
    store: Store
    options: FetchOptions
    progress: Progress | None


def find_shards(settings: Settings, manifest: Manifest) -> tuple[Artifact, ...]:
    """Return the weight shards of *manifest*; none where all are on this disk already."""
    root = settings.training.download_folder.absolute()
    shards = tuple(a for a in manifest.files if is_shard(a.path))
    return shards if any(not _is_here(a, root) for a in shards) else ()


def split(
    manifest: Manifest,
    shards: Sequence[Artifact],
    store: Store,
    options: FetchOptions,
    progress: Progress | None,
) -> ShardFetch:
    """Return the fetch of *manifest* with *shards* as its second part."""
    late = {artifact.path for artifact in shards}
    early = tuple(a for a in manifest.files if a.path not in late)
    return ShardFetch(
        replace(manifest, files=early),
        replace(manifest, files=tuple(shards)),
        store,
        options,
        progress,
    )


def prepare_from_shards(settings: Settings, fetched: ShardFetch, timeline: Timeline) -> ReadyModel:
    """Return the ReadyModel of both parts of *fetched*.

    Raises:
        LoaderError: as ``fetch`` and ``make_ready``.
    """
    root = settings.training.download_folder.absolute()
    store, options = fetched.store, fetched.options
    with SpanProgress(fetched.progress, timeline, "download of small files") as watched:
        first = fetch(fetched.early, root, store, options, watched)
    with timeline.stage("inspect"):
        names = [artifact.path for artifact in (*fetched.early.files, *fetched.late.files)]
        checkpoints = find_checkpoints(root, sorted(names))
    sharded = any(checkpoint.kind in SHARDED for checkpoint in checkpoints)
    if not sharded and settings.weights_only_fetch:  # beside a model that is whole already
        return make_ready(settings, first, checkpoints, timeline)
    versions = _ask_versions(fetched)
    if settings.weights_only_fetch and all(info.ranges for info in versions.values()):
        shards = LateShards(fetched, root, versions, first, None)
        return make_ready(settings, first, checkpoints, timeline, shards=shards)
    with (
        SpanProgress(fetched.progress, timeline) as watched,
        fetching(fetched.late, root, store, options, watched) as arrivals,
    ):
        shards = LateShards(fetched, root, versions, first, arrivals)
        if sharded and all(info.ranges for info in versions.values()):
            return make_ready(settings, first, checkpoints, timeline, shards=shards)
        snapshot = shards.wait()
    return make_ready(settings, snapshot, checkpoints, timeline)


@dataclass(frozen=True, slots=True)
class LateShards:
    """Shards that stay at the origin, or with *arrivals* come from there."""

    fetched: ShardFetch
    root: Path
    versions: Mapping[str, ObjectInfo]
    first: Snapshot
    arrivals: Arrivals | None

    @property
    def identities(self) -> Mapping[str, str] | None:
        """What tells each shard from other versions, by path; None where digests come later."""
        if self.arrivals is not None:
            return None
        return {
            a.path: f"{info.size_bytes} bytes of version {info.version or a.source}"
            for a in self.fetched.late.files
            for info in [self.versions[a.path]]
        }

    def open(self, checkpoint: Checkpoint) -> ShardFiles:
        """Return the files of *checkpoint*, to be closed."""
        shards: dict[str, RemoteFile | ArrivingFile] = {}
        for artifact in self.fetched.late.files:
            info, retries = self.versions[artifact.path], self.fetched.options.retries
            remote = RemoteFile(artifact, self.fetched.store, info, retries)
            shards[artifact.path] = ArrivingFile(remote, self.arrivals) if self.arrivals else remote
        return ShardFiles(checkpoint, self.root, shards)

    def wait(self) -> Snapshot:
        """Return the snapshot of all that is fetched, when it is.

        Raises:
            LoaderError: the fetch failed.
        """
        return join(self.first, self.arrivals.wait_all()) if self.arrivals else self.first


def join(first: Snapshot, second: Snapshot) -> Snapshot:
    """Return the snapshot of two fetches into one folder."""
    files = sorted((*first.files, *second.files), key=lambda file: file.path)
    return replace(
        second,
        files=tuple(files),
        seconds=first.seconds + second.seconds,
        fetched_bytes=first.fetched_bytes + second.fetched_bytes,
    )


def _ask_versions(fetched: ShardFetch) -> dict[str, ObjectInfo]:
    def ask(artifact: Artifact) -> ObjectInfo:
        retries = fetched.options.retries
        for attempt in retrying(lambda s: s.attempt_number > retries, threading.Event()):
            with attempt:
                return fetched.store.stat(artifact)
        raise AssertionError("the loop ends by returning or raising")

    files = fetched.late.files
    with ThreadPoolExecutor(min(fetched.options.concurrency, len(files))) as pool:
        return {a.path: info for a, info in zip(files, pool.map(ask, files), strict=True)}


def _is_here(artifact: Artifact, root: Path) -> bool:
    place = places(root, artifact)
    return place.final.is_file() and read_record(place.record) is not None
