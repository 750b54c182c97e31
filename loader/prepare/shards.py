"""Weights sharded over ranks become one model while they are still at the origin.

Configs, tokenizers and ``.metadata`` come first. Then, with ``weights_only_fetch``, the bytes of
the model, and no others, go by ranges from the origin to their places in the consolidated files.
Else the shards are fetched as any file, and what each holds is written as soon as it is whole.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from loader.adapters.layers import Ask
from loader.arriving.rangefiles import ArrivingFile, RemoteFile, ShardFiles
from loader.config.settings import Settings
from loader.fetch.arrivals import Arrivals
from loader.fetch.background import SplitFetch, are_here, join
from loader.fetch.declared import identify
from loader.fetch.progress import LogProgress, Progress
from loader.http.objects import ObjectInfo
from loader.prepare.consolidated import SHARDED, Report, log_progress
from loader.prepare.ready import make_ready
from loader.timeline import Open, Timeline
from loader.types import Artifact, Checkpoint, Manifest, ReadyModel, Snapshot
from loader.weights.formats.places import weight_folders
from loader.weights.formats.serving import is_shard
from loader.weights.inspect import find_checkpoints


def find_shards(settings: Settings, manifest: Manifest) -> tuple[Artifact, ...]:
    """Return the weight shards of *manifest*; none where all are on this disk already."""
    shards = tuple(a for a in manifest.files if is_shard(a.path))
    return () if are_here(shards, settings.training.download_folder) else shards


def prepare_from_shards(
    settings: Settings, fetched: SplitFetch, timeline: Timeline, ask: Ask | None = None
) -> ReadyModel:
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
        return make_ready(settings, first, checkpoints, timeline, progress=told, ask=ask)
    versions = fetched.ask_versions()
    if settings.weights_only_fetch and _are_pinned(fetched, versions):
        shards = LateShards(fetched, versions, first, timeline, None)
        return make_ready(settings, first, checkpoints, timeline, None, shards, told, ask)
    with fetched.fetching_late(timeline) as arrivals:
        shards = LateShards(fetched, versions, first, timeline, arrivals)
        if sharded and all(info.ranges for info in versions.values()):
            return make_ready(settings, first, checkpoints, timeline, None, shards, told, ask)
        snapshot = shards.wait()
    return make_ready(settings, snapshot, checkpoints, timeline, progress=told, ask=ask)


def _are_pinned(fetched: SplitFetch, versions: Mapping[str, ObjectInfo]) -> bool:
    """Return whether ranges of the shards are known to be of one object each, and of which.

    Else all of their bytes have to come, whose digests tell.
    """
    return all(
        versions[a.path].ranges and identify(a, versions[a.path]) for a in fetched.late.files
    )


@dataclass(frozen=True, slots=True)
class LateShards:
    """Shards that stay at the origin, or with *arrivals* come from there."""

    fetched: SplitFetch
    versions: Mapping[str, ObjectInfo]
    first: Snapshot
    timeline: Timeline
    arrivals: Arrivals | None

    @property
    def identities(self) -> Mapping[str, str] | None:
        """What tells each shard from other versions, by path; None where digests come later."""
        if self.arrivals is not None:
            return None
        told = ((a, identify(a, self.versions[a.path])) for a in self.fetched.late.files)
        return {artifact.path: what for artifact, what in told if what}

    @property
    def can_be_resumed(self) -> bool:
        """Whether what an earlier run read of them is known to be of the same version."""
        return self.arrivals is None and all(info.is_pinned for info in self.versions.values())

    @contextlib.contextmanager
    def opened(self, checkpoint: Checkpoint) -> Iterator[tuple[ShardFiles, Report]]:
        """Give the files of *checkpoint*, and what is to be told how far it has come."""
        places = [folder.relative_to(self.fetched.root) for folder in weight_folders(checkpoint)]
        files = [
            artifact
            for artifact in self.fetched.late.files
            if any(PurePosixPath(artifact.path).is_relative_to(place) for place in places)
        ]
        with contextlib.ExitStack() as stack:
            watch = None
            if self.arrivals is None:
                watch = stack.enter_context(_Watch(self.fetched, self.timeline, files))
            shards = {artifact.path: self._open(artifact, watch) for artifact in files}
            opened = ShardFiles(checkpoint, self.fetched.root, shards)
            yield stack.enter_context(opened), watch.report if watch else log_progress()

    def _open(self, artifact: Artifact, watch: _Watch | None) -> RemoteFile | ArrivingFile:
        info, retries = self.versions[artifact.path], self.fetched.options.retries
        remote = RemoteFile(artifact, self.fetched.store, info, retries, watch)
        return ArrivingFile(remote, self.arrivals) if self.arrivals else remote

    def wait(self) -> Snapshot:
        """Return the snapshot of all that is fetched, when it is.

        Raises:
            LoaderError: the fetch failed.
        """
        return join(self.first, self.arrivals.wait_all()) if self.arrivals else self.first


class _Watch:
    """Tells of files that stay at the origin: a span each, and the model's bytes as they come.

    A context manager: its end ends the spans, with the error that ends it.
    """

    def __init__(
        self, fetched: SplitFetch, timeline: Timeline, files: Collection[Artifact]
    ) -> None:
        self._progress: Progress = fetched.progress or LogProgress()
        self._timeline = timeline
        self._paths = [artifact.path for artifact in files]
        self._spans: dict[str, Open] = {}
        self._lock = threading.Lock()
        self._done: int | None = None

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for span in self._spans.values():
            self._timeline.end(span, failed=kind.__name__ if kind else "")
        if self._done is not None:
            for path in self._paths if kind is None else ():
                self._progress.finish_file(path)
            self._progress.finish()

    def begin(self, path: str) -> None:
        """Begin the file's span at its first request."""
        with self._lock:
            if path not in self._spans:
                self._spans[path] = self._timeline.begin(path, kind="file")

    def retry(self, path: str, reason: str) -> None:
        """Count it."""
        self._timeline.count("retries")
        self._progress.retry(path, reason)

    def report(self, done: int, total: int) -> None:
        """Tell that *done* bytes of the *total* are where they belong."""
        if self._done is None:
            self._progress.start(len(self._paths), total, 0)
        self._progress.advance(done - (self._done or 0), "")
        self._done = done
