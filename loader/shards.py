"""Weights sharded over ranks become one model while they are still at the origin.

Configs, tokenizers and ``.metadata`` come first. Then, with ``weights_only_fetch``, the bytes of
the model, and no others, go by ranges from the origin to their places in the consolidated files.
Else the shards are fetched as any file, and what each holds is written as soon as it is whole.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from loader.fetch.arrivals import Arrivals
from loader.fetch.background import SplitFetch, are_here, join
from loader.rangefiles import ArrivingFile, RemoteFile, ShardFiles
from loader.ready import make_ready
from loader.retry import retrying
from loader.settings import Settings
from loader.sources import SHARDED
from loader.stores.base import ObjectInfo
from loader.timeline import Timeline
from loader.types import Artifact, Checkpoint, Manifest, ReadyModel, Snapshot
from loader.weights.consolidate.serving import is_shard
from loader.weights.inspect import find_checkpoints


def find_shards(settings: Settings, manifest: Manifest) -> tuple[Artifact, ...]:
    """Return the weight shards of *manifest*; none where all are on this disk already."""
    shards = tuple(a for a in manifest.files if is_shard(a.path))
    return () if are_here(shards, settings.training.download_folder) else shards


def prepare_from_shards(settings: Settings, fetched: SplitFetch, timeline: Timeline) -> ReadyModel:
    """Return the ReadyModel of both parts of *fetched*.

    Raises:
        LoaderError: as ``fetch`` and ``make_ready``.
    """
    told = fetched.progress
    first = fetched.fetch_early(timeline, "download of small files")
    with timeline.stage("inspect"):
        checkpoints = find_checkpoints(fetched.root, fetched.paths)
    sharded = any(checkpoint.kind in SHARDED for checkpoint in checkpoints)
    if not sharded and settings.weights_only_fetch:  # beside a model that is whole already
        return make_ready(settings, first, checkpoints, timeline, progress=told)
    versions = _ask_versions(fetched)
    if settings.weights_only_fetch and all(info.ranges for info in versions.values()):
        shards = LateShards(fetched, versions, first, None)
        return make_ready(settings, first, checkpoints, timeline, None, shards, told)
    with fetched.fetching_late(timeline) as arrivals:
        shards = LateShards(fetched, versions, first, arrivals)
        if sharded and all(info.ranges for info in versions.values()):
            return make_ready(settings, first, checkpoints, timeline, None, shards, told)
        snapshot = shards.wait()
    return make_ready(settings, snapshot, checkpoints, timeline, progress=told)


@dataclass(frozen=True, slots=True)
class LateShards:
    """Shards that stay at the origin, or with *arrivals* come from there."""

    fetched: SplitFetch
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

    @property
    def can_be_resumed(self) -> bool:
        """Whether what an earlier run read of them is known to be of the same version."""
        return self.arrivals is None and all(info.version for info in self.versions.values())

    def open(self, checkpoint: Checkpoint) -> ShardFiles:
        """Return the files of *checkpoint*, to be closed."""
        shards: dict[str, RemoteFile | ArrivingFile] = {}
        for artifact in self.fetched.late.files:
            info, retries = self.versions[artifact.path], self.fetched.options.retries
            remote = RemoteFile(artifact, self.fetched.store, info, retries)
            shards[artifact.path] = ArrivingFile(remote, self.arrivals) if self.arrivals else remote
        return ShardFiles(checkpoint, self.fetched.root, shards)

    def wait(self) -> Snapshot:
        """Return the snapshot of all that is fetched, when it is.

        Raises:
            LoaderError: the fetch failed.
        """
        return join(self.first, self.arrivals.wait_all()) if self.arrivals else self.first


def _ask_versions(fetched: SplitFetch) -> dict[str, ObjectInfo]:
    def ask(artifact: Artifact) -> ObjectInfo:
        retries = fetched.options.retries
        for attempt in retrying(lambda s: s.attempt_number > retries, threading.Event()):
            with attempt:
                return fetched.store.stat(artifact)
        raise AssertionError("the loop ends by returning or raising")

    files = fetched.late.files
    with ThreadPoolExecutor(min(fetched.options.concurrency, len(files))) as pool:
        return {a.path: info for a, info in zip(files, pool.map(ask, files), strict=True)}
